"""The mesh and its table: all parameters match, and what does not divide is refused."""

import pathlib

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
        of_a_layer = shape.size // (config.layers if "blocks" in jax.tree_util.keystr(path) else 1)
        if of_a_layer * 4 > 2**20:
            assert any(made.spec), f"{jax.tree_util.keystr(path)} is whole on every device"


def test_what_does_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match=r"mesh is data 1 x fsdp 3 .* there are 1 devices; legal: a product of 1"):
        sharding.make_mesh(config_lib.MeshConfig(data=1, fsdp=3))
    config = helpers.tiny_config().model
    mesh = AbstractMesh((1, 1, 1, 3), dims.MESH_AXES)
    with pytest.raises(ValueError, match=r"mesh.tensor is 3, which does not divide the heads axis of .*, 2"):
        sharding.parameter_shardings(mesh, parameter_axes(config), to_values(abstract(config)))
    with pytest.raises(ValueError, match=r"data.batch is 6; legal: a multiple of .* = 4"):
        sharding.check_batch(AbstractMesh((2, 1, 1, 1), dims.MESH_AXES), 6, 32, 2)
    with pytest.raises(ValueError, match=r"mesh.sequence is 3, which does not divide data.context = 32"):
        sharding.check_batch(AbstractMesh((1, 1, 3, 1), dims.MESH_AXES), 6, 32, 1)
