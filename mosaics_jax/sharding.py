"""The mesh, and the one table from logical axes to mesh axes."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mosaics_jax import dims
from mosaics_jax.config import MeshConfig

# Weights: fsdp on the model width, tensor on heads, feed-forward and vocabulary. Every logical axis must stand here.
RULES: dict[str, str | None] = {
    dims.LAYER: None,
    dims.MEMORY: None,
    dims.WIDTH: dims.FSDP,
    dims.HEADS: dims.TENSOR,
    dims.HEAD_WIDTH: None,
    dims.FFN: dims.TENSOR,
    dims.VOCABULARY: dims.TENSOR,
    dims.NORM: None,
}

# Activations and batches: rows over data and fsdp, time over sequence.
BATCH = PartitionSpec((dims.DATA, dims.FSDP), dims.SEQUENCE)


def sizes(config: MeshConfig, devices: int) -> MeshConfig:
    """The axes with data = -1 filled in. Raises ValueError where their product is not the number of devices."""
    others = config.fsdp * config.sequence * config.tensor
    data = devices // others if config.data == -1 else config.data
    if data * others != devices:
        raise ValueError(
            f"mesh is data {config.data} x fsdp {config.fsdp} x sequence {config.sequence} x tensor {config.tensor}, "
            f"but there are {devices} devices; legal: a product of {devices}"
        )
    return dataclasses.replace(config, data=data)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh (data, fsdp, sequence, tensor) of all devices, tensor innermost: its members are nearest."""
    devices = jax.devices() if devices is None else devices
    full = sizes(config, len(devices))
    shape = tuple(getattr(full, axis) for axis in dims.MESH_AXES)
    return Mesh(np.asarray(devices).reshape(shape), dims.MESH_AXES)


def rows_here(mesh: Mesh, batch: int) -> range:
    """The rows of a global batch that this process's devices hold, in whole or in part."""
    held: Any = NamedSharding(mesh, PartitionSpec(BATCH[0])).addressable_devices_indices_map((batch,))
    ends = [rows.indices(batch)[:2] for (rows,) in held.values()]
    first, stop = min(start for start, _ in ends), max(stop for _, stop in ends)
    assert stop - first == sum(stop - start for start, stop in set(ends)), "a process's rows do not lie together"
    return range(first, stop)


def check_batch(mesh: Mesh, batch: int, context: int, accumulation: int) -> None:
    """Raises ValueError where the rows of a micro-batch, or their positions, do not divide among the devices."""
    if context % mesh.shape[dims.SEQUENCE]:
        raise ValueError(
            f"mesh.sequence is {mesh.shape[dims.SEQUENCE]}, which does not divide data.context = {context}"
        )
    shards = mesh.shape[dims.DATA] * mesh.shape[dims.FSDP]
    if batch % (shards * accumulation):
        raise ValueError(
            f"data.batch is {batch}; legal: a multiple of mesh data x fsdp x run.accumulation = {shards * accumulation}"
        )


def parameter_specs(axes: dict[str, Any]) -> dict[str, Any]:
    """The table applied: a PartitionSpec for every parameter, from its logical axes (`nn.model.parameter_axes`)."""
    return jax.tree.map(
        lambda names: PartitionSpec(*(RULES[name] for name in names)),
        axes,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def over_mesh[Function: Callable](function: Function, in_specs: Any, out_specs: Any) -> Function:
    """`function` run by every device of the mesh on its own shards; what passes between them is in `collectives`.

    Under a mesh of one device, or none, it is the function itself. What `out_specs` leaves out must be equal on the
    devices: jax is not asked to prove it (it cannot follow loops whose bounds vary, which the reads have).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def parameter_shardings(mesh: Mesh, axes: dict[str, Any], shapes: dict[str, Any]) -> dict[str, Any]:
    """A NamedSharding for every parameter, from its logical axes (`nn.model.parameter_axes`)."""

    def sharding(path: Any, names: tuple[str, ...], shape: jax.ShapeDtypeStruct) -> NamedSharding:
        unknown = [name for name in names if name not in RULES]
        assert not unknown, f"{jax.tree_util.keystr(path)} has the axes {unknown}, which have no rule in RULES"
        for name, size in zip(names, shape.shape, strict=True):
            shards = mesh.shape[RULES[name]] if RULES[name] else 1
            if size % shards:
                raise ValueError(
                    f"mesh.{RULES[name]} is {shards}, which does not divide the {name} axis of "
                    f"{jax.tree_util.keystr(path)}, {size}"
                )
        return NamedSharding(mesh, PartitionSpec(*(RULES[name] for name in names)))

    return jax.tree_util.tree_map_with_path(sharding, axes, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def count(values: Any) -> int:
    """Numbers held by a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(values))
