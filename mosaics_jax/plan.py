"""The real train step of a config, compiled for a mesh of devices that are not there, and what the compiler tells."""

import contextlib
import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from mosaics_jax import sharding
from mosaics_jax.config import Config
from mosaics_jax.data.source import Batch
from mosaics_jax.program import Collective, collectives
from mosaics_jax.restore import state_shardings
from mosaics_jax.step import init_state, make_train_step
from pallas_kernels import choice, h100

_CAPABILITY = {"h100": "9.0"}
_KERNELS = ("pallas_call", "core_map", "run_state")  # what is inside is counted as reads, by visible pairs


@dataclasses.dataclass(frozen=True)
class Program:
    """What one device holds and does in one step. Bytes, FLOPs, seconds."""

    how: str  # what it was compiled for
    held: dict[str, float]  # bytes by kind; "temporary" is what the others leave of the compiler's sum
    peak: float  # bytes, by the compiler's account
    matmul_flops: float  # matrix products with what is recomputed, without the reads
    collectives: list[Collective]
    kernels: int  # calls of Mosaic GPU kernels in its text
    seconds: float  # that compiling took


def devices_for(target: str, count: int) -> tuple[list[Any], str]:
    """Devices to compile for, and what they are: the target's where its compiler is installed, else CPU devices.

    Of CPU devices there must be enough (`jax_num_cpu_devices`, before jax's first use).
    """
    if not (absent := h100.missing()):
        return h100.devices(count), f"{count} {target}, by its compiler, without hardware"
    here = jax.devices("cpu")[:count]
    return here, (
        f"{count} fake CPU devices, since {', '.join(absent)} are not installed ({h100.INSTALL}): "
        "its memory and collectives are the CPU compiler's"
    )


def compile_step(config: Config, target: str, count: int) -> Program:
    """The train step of `config` on `count` devices; nothing is allocated or run."""
    begin = time.perf_counter()
    devices, how = devices_for(target, count)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch(mesh, config.data.batch, config.data.context, config.run.accumulation)
    is_target = not h100.missing()
    choosing = choice.compiling_for(_CAPABILITY[target]) if is_target else contextlib.nullcontext()
    with jax.set_mesh(mesh), choosing:
        state, placed = _state(config, mesh)
        step = jax.jit(make_train_step(config), donate_argnums=0, out_shardings=(placed, None))
        traced = step.trace(state, _batch(config, mesh))
        compiled = traced.lower().compile()
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text()
    weights, optimizer = _bytes_here(state.params), _bytes_here(state.opt_state)
    saved = _saved(traced.jaxpr.jaxpr, config.model.layers)
    held = {"weights": weights, "optimizer": optimizer, "gradients": weights, "activations": saved}
    peak = memory.peak_memory_in_bytes
    if not is_target:  # the CPU compiler's peak leaves out what is temporary
        kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak = kept + memory.temp_size_in_bytes
    rest = peak - sum(held.values())
    return Program(
        how=how,
        held={**held, "temporary": rest},
        peak=peak,
        matmul_flops=_dot_flops(traced.jaxpr.jaxpr),
        collectives=collectives(text, dict(mesh.shape)),
        kernels=text.count('custom_call_target="mosaic_gpu'),
        seconds=time.perf_counter() - begin,
    )


def _state(config: Config, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """The shapes of the state with their shardings, and the shardings."""
    shapes = jax.eval_shape(lambda: init_state(config))
    placed = state_shardings(config, mesh, shapes)
    return jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, placed), placed


def _batch(config: Config, mesh: jax.sharding.Mesh) -> Batch:
    shape, rows = (config.data.batch, config.data.context), NamedSharding(mesh, sharding.BATCH)
    whole = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    return Batch(whole, whole, whole, whole, jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows))


def _bytes_here(tree: Any) -> float:
    """Bytes of one device's shards."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def _inner(equation: Any) -> list[Any]:
    """The programs inside an equation."""
    found = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns"))
    return [getattr(leaf, "jaxpr", leaf) for leaf in found if hasattr(leaf, "eqns")]


def _saved(jaxpr: Any, layers: int) -> float:
    """Bytes that the forward scan over depth stacks up for the backward one."""
    total = 0.0
    for equation in jaxpr.eqns:
        forward = equation.primitive.name == "scan" and not equation.params["reverse"]
        if forward and equation.params["length"] == layers:
            (body,) = _inner(equation)
            stacked = [v for v, one in zip(equation.outvars, body.outvars, strict=True) if v.aval.ndim > one.aval.ndim]
            total = max(total, sum(float(v.aval.size * v.aval.dtype.itemsize) for v in stacked))
        else:
            total = max([total, *(_saved(inner, layers) for inner in _inner(equation))])
    return total


def _dot_flops(jaxpr: Any) -> float:
    """FLOPs of all matrix products, those in scans as often as they run. Loops of unknown length (the XLA path's reads)
    and kernels are left out."""
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2.0 * equation.outvars[0].aval.size * depth
        elif name not in (*_KERNELS, "while"):
            inner = [_dot_flops(program) for program in _inner(equation)]
            times = equation.params["length"] if name == "scan" else 1
            total += times * (max(inner, default=0.0) if name == "cond" else sum(inner))
    return total
