"""The bench of `leaky_average`, beside a copy that moves the least bytes."""

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from launch import gpu_bench
from launch.gpu_report import OUT_OF_TIME, WHAT
from pallas_kernels.leaky_average import leaky_average


def recurrence_bytes(length: int, what: str, heads: int = gpu_bench.HEADS, width: int = gpu_bench.WIDTH) -> int:
    """The least that must be moved for one row of bfloat16.

    Forward reads the input, two float32 gates and a bool, and writes the output: 2 large arrays. Backward reads the
    input, the output, its cotangent, the gates, the bool and the norm that forward then has to write, and writes the
    gradients of input and gates: 4 large arrays more.
    """
    large, gate, restart = 2 * length * heads * width, 4 * length * heads, length
    forward = 2 * large + 2 * gate + restart
    return forward if what == "forward" else forward + gate + 4 * large + 5 * gate + restart


def _averages(length: int) -> tuple[jax.Array, ...]:
    place = gpu_bench.Place("long-term", "packed", length)
    problem = gpu_bench.Problem(place)
    seeds = jax.random.split(jax.random.key(1), 2)
    log_gate_BTH, normal_BTH = (jax.random.normal(seed, (1, length, gpu_bench.HEADS)) for seed in seeds)
    document_BT = gpu_bench.documents(place)
    restart_BT = jnp.asarray(np.diff(document_BT, axis=1, prepend=-1) != 0)
    return problem.cotangent_BTHV, problem.key_BTHK, log_gate_BTH, -jnp.exp(normal_BTH - 2), restart_BT


def _average(by: str) -> Callable[..., jax.Array]:
    return lambda *arguments: leaky_average(*arguments, implementation=by)[0]


def recurrence(quick: bool, deadline: float, record: gpu_bench.Record) -> None:
    """The bench of `leaky_average`, packed rows, beside a copy that moves the least bytes."""
    for length in (4096,) if quick else (16384, 32768, 4096):
        for what, by in ((what, by) for by in ("hopper", "xla") for what in WHAT):
            fields = {"by": by, "memory": "recurrence", "rows": "packed", "time": length, "what": what}
            if time.monotonic() > deadline:
                record("figure", **fields, missing=OUT_OF_TIME, failed=False)
                continue
            try:
                cotangent, *arguments = _averages(length)
                function = jax.jit(_average(by) if what == "forward" else gpu_bench.with_gradients(_average(by), 3))
                arguments = arguments if what == "forward" else [cotangent, *arguments]
                least = recurrence_bytes(length, what)
                # Read and written: half the bytes each.
                source = jnp.ones(least // 2 // 4, jnp.float32)
                copy = statistics.median(gpu_bench.milliseconds(functools.partial(jax.jit(jnp.negative), source), 0.5))
                figures = gpu_bench.spread(gpu_bench.milliseconds(functools.partial(function, *arguments), 1.0))
                share = copy / figures["milliseconds"]
                record("figure", **fields, **figures, least_bytes=least, copy_milliseconds=copy, share=share)
            except Exception as error:
                record("figure", **fields, **gpu_bench.missing(error))
