"""The mesh and its table: all parameters match, what does not divide is refused, a mesh gives the same numbers."""

import pathlib
import subprocess
import sys
import textwrap

import helpers
import jax
import pytest
from jax.sharding import AbstractMesh

from mosaics_jax import config as config_lib
from mosaics_jax import dims, sharding
from mosaics_jax.nn.model import abstract, parameter_axes, to_values

ROOT = pathlib.Path(__file__).parent.parent
RECIPES = ["tiny", "small", "large", "transformer_tiny", "transformer_small", "transformer_large"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_parameter_has_axes_that_the_table_knows(recipe: str) -> None:
    config = config_lib.Config.from_config_dict(config_lib.load_config(str(ROOT / "configs" / f"{recipe}.py"))).model
    axes, shapes = parameter_axes(config), to_values(abstract(config))
    mesh = AbstractMesh((1, 4, 1, 2), dims.MESH_AXES)
    shardings = sharding.parameter_shardings(mesh, axes, shapes)
    for (path, shape), made in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
    ):
        if shape.size * 4 > 2**20 * config.layers:
            assert any(made.spec), f"{jax.tree_util.keystr(path)} is whole on every device"


def test_what_does_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match=r"mesh is data 1 x fsdp 3 .* there are 1 devices; legal: a product of 1"):
        sharding.make_mesh(config_lib.MeshConfig(data=1, fsdp=3))
    config = helpers.tiny_config().model
    mesh = AbstractMesh((1, 1, 1, 3), dims.MESH_AXES)
    with pytest.raises(ValueError, match=r"mesh.tensor is 3, which does not divide the heads axis of .*, 2"):
        sharding.parameter_shardings(mesh, parameter_axes(config), to_values(abstract(config)))
    with pytest.raises(ValueError, match=r"data.batch is 6; legal: a multiple of .* = 4"):
        sharding.check_batch(AbstractMesh((2, 1, 1, 1), dims.MESH_AXES), 6, 2)


@pytest.mark.slow
def test_a_mesh_gives_the_losses_of_one_device(tmp_path: pathlib.Path) -> None:
    """data 2 x fsdp 2 x tensor 2 on eight fake CPU devices; the state is made sharded and restored sharded."""
    helpers.make_corpus(tmp_path)
    code = """
    import json, pathlib, sys, jax, helpers
    from mosaics_jax.train import train
    out = {}
    for name, mesh in {"one": {}, "eight": {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}}.items():
        if name == "one":
            jax.devices = lambda *a, d=jax.devices()[:1]: d
        config = helpers.tiny_config(sys.argv[1] + "/corpus", **mesh)
        train(config, sys.argv[1] + "/" + name)
        jax.devices = jax.local_devices
    """
    environment = {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], check=True, env=environment)
    losses = []
    for name in ("one", "eight"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([line.split('"loss": ')[1].split(",")[0] for line in lines if '"loss"' in line])
    assert len(losses[0]) == len(losses[1]) > 4
    for a, b in zip(*losses, strict=True):
        assert float(a) == pytest.approx(float(b), rel=2e-5)
