"""Prints the table of parameter counts: python docs/results/parameters.py"""

import dataclasses
import pathlib
import sys

import jax

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from mosaics_jax import config as config_lib  # noqa: E402
from mosaics_jax import dims  # noqa: E402
from mosaics_jax.nn.model import abstract, parameter_axes, to_values  # noqa: E402


def row(name: str, config: config_lib.ModelConfig) -> str:
    """All parameters; and the matrices of the paper's count, which leaves gates, norms and per-head scalars aside."""
    axes = jax.tree.leaves(parameter_axes(config), is_leaf=lambda leaf: isinstance(leaf, tuple))
    sizes = [shape.size for shape in jax.tree.leaves(to_values(abstract(config)))]
    matrices = sum(n for n, names in zip(sizes, axes, strict=True) if dims.is_matrix(names))
    if config.architecture == "mosaic":
        matrices -= 2 * len(config.memories) * config.layers * config.width * config.heads
    return f"| {name} | {matrices:,} | {sum(sizes):,} |"


print("| model | matrices, without W_g and W_lambda | all parameters |\n|---|---|---|")
for recipe in ("tiny", "small", "large"):
    for name in (f"transformer_{recipe}", recipe):
        path = str(ROOT / "configs" / f"{name}.py")
        config = config_lib.Config.from_config_dict(config_lib.load_config(path)).model
        print(row(name, config))
    print(row(f"{recipe}, long-term memory removed", dataclasses.replace(config, memories=("short",))))
