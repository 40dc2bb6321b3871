"""Writes the newest checkpoint of a run as safetensors, reads them back, and compares every bit.

python -m launch.export --workdir=runs/tiny --output=exports/tiny
"""

import pathlib

from absl import flags

from launch import command
from mosaics_jax import place

_WORKDIR = command.define_path("workdir", None, "directory of the run")
_OUTPUT = command.define_path("output", None, "directory for model.safetensors, config.json and the tokenizer")
_WITHOUT_LONG_TERM = flags.DEFINE_bool("without_long_term", False, "drop the long-term memories' weights")


def main() -> None:
    if not _WORKDIR.value or not _OUTPUT.value:
        raise ValueError("--workdir and --output must both be set; legal: a run's directory, and one to write")
    import jax
    import numpy as np

    import mosaics_jax
    from mosaics_jax.nn.model import to_values

    place.check(pathlib.Path(_OUTPUT.value), (place.EMPTY, place.EXPORT), "--output")  # before the weights are read
    model, tokenizer = mosaics_jax.load(_WORKDIR.value)
    if _WITHOUT_LONG_TERM.value:
        model = model.remove_long_term()
    mosaics_jax.save_safetensors(model, _OUTPUT.value, tokenizer)
    written, read = to_values(model), to_values(mosaics_jax.load_safetensors(_OUTPUT.value))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), written, read))
    total = sum(leaf.size for leaf in jax.tree.leaves(read))
    print(f"wrote {_OUTPUT.value}/model.safetensors: {total:,} parameters, read back bit for bit")


if __name__ == "__main__":
    command.run(main)
