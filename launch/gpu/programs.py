"""What a program of the GPU suite is: compiled without a GPU, carried, and loaded on the card. And our kernels in one.

A program takes arrays and gives a flat tuple of arrays, so that nothing but arrays passes between it and the suite. How
it is made is asked only where it must be compiled: a carried one is loaded without tracing anything. The programs stand
beside what runs them, in `parts`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from launch.gpu.problem import Setting
from pallas_kernels.leaky_average.hopper import leaky_average_hopper
from pallas_kernels.retrieval.hopper import TILING, Tiling
from pallas_kernels.retrieval.hopper_vjp import retrieve_hopper

WHAT = ("forward", "forward + backward")
Flat = Callable[..., tuple[Any, ...]]


class Made(NamedTuple):
    """What the compiler needs."""

    function: Flat
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    donate: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Program:
    """`kernels`: those of ours that run in it, by the canary's names. `carried`: whether it compiles without a GPU."""

    name: str
    make: Callable[[], Made]
    kernels: tuple[str, ...] = ()
    carried: bool = True


def struct(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def wide(*shape: int) -> jax.ShapeDtypeStruct:
    return struct(*shape, dtype=jnp.bfloat16)


def file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def with_gradients(function: Callable[..., jax.Array], moving: tuple[int, ...]) -> Flat:
    """(cotangent, *arguments) -> (output, gradients of the arguments at `moving`)."""

    def both(cotangent: jax.Array, *arguments: jax.Array) -> tuple[jax.Array, ...]:
        def of(*values: jax.Array) -> jax.Array:
            given = list(arguments)
            for place, value in zip(moving, values, strict=True):
                given[place] = value
            return function(*given)

        output, pull = jax.vjp(of, *(arguments[i] for i in moving))
        return output, *pull(cotangent)

    return both


# --- Ours, and the canary's groups of them. ---


def interpret(setting: Setting) -> Any:
    return plgpu.InterpretGPUParams() if setting.interpret else None


def read(setting: Setting, unit_norm: bool = True, tiling: Tiling = TILING) -> Callable[..., jax.Array]:
    """(query, key, value, bandwidth, start, stop) -> output, by the Hopper kernels."""
    return lambda *arrays: retrieve_hopper(*arrays, unit_norm, interpret(setting), tiling)


def average(setting: Setting) -> Callable[..., jax.Array]:
    """(input, log_gate, log_decay, restart) -> output, by the Hopper kernels."""

    def operation(*arrays: jax.Array) -> jax.Array:
        raw, log_gate, log_decay, restart = arrays
        return leaky_average_hopper(raw, log_gate, log_decay, restart, None, interpret=interpret(setting))[0]

    return operation


def read_kernels(width: int = 128, unit_norm: bool = True) -> dict[str, str]:
    """The canary's names of the three kernels of `retrieve`."""
    kind = f"K = {width}, {'unit norm' if unit_norm else 'any norm'}"
    return {kernel: f"retrieve {kernel}, {kind}" for kernel in ("forward", "query gradient", "key gradient")}


# Of one kernel by itself: which of (query, key, value, bandwidth) get gradients, and what its program gives. What no
# gradient is asked of is cut out of the program, so that each runs one backward kernel.
READ_MOVING = {"query gradient": (0, 3), "key gradient": (1, 2)}
READ_RESULTS = {
    "forward": ("output",),
    "query gradient": ("output", "d_query", "d_bandwidth"),
    "key gradient": ("output", "d_key", "d_value"),
}


def average_kernels(width: int = 128) -> dict[str, str]:
    return {kernel: f"leaky_average {kernel}, K = {width}" for kernel in ("forward", "gradient")}


def read_arguments(batch: int, time: int, heads: int, width: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """cotangent, query, key, value, bandwidth, start, stop."""
    end = struct(batch, time, dtype=jnp.int32)
    return (*(wide(batch, time, heads, width),) * 4, struct(batch, time, heads), end, end)


def average_arguments(batch: int, time: int, heads: int, width: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """cotangent, input, log gate, log decay, restart."""
    row, gate = struct(batch, time, heads, width, dtype=dtype), struct(batch, time, heads)
    return row, row, gate, gate, struct(batch, time, dtype=jnp.bool_)


CANARY_TIME, CANARY_HEADS = 256, 2
CANARY = {
    "retrieve, K = 128, unit norm": (128, True),
    "retrieve, K = 128, any norm": (128, False),
    "retrieve, K = 64, unit norm": (64, True),
    "leaky_average, K = 128": (128, None),
    "leaky_average, K = 64": (64, None),
}
