"""`leaky_average` beside a copy that moves the least bytes it needs, by turns."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from launch.gpu import problem as lib
from launch.gpu.parts import read_programs
from launch.gpu.parts.context import Context, by_turns, spread
from launch.gpu.problem import Place, Setting
from launch.gpu.programs import (
    WHAT,
    Made,
    Program,
    average,
    average_arguments,
    average_kernels,
    struct,
    with_gradients,
)  # fmt: skip
from pallas_kernels.leaky_average import leaky_average


def average_program(setting: Setting, by: str, what: str, time: int) -> Program:
    """(cotangent, input, log gate, log decay, restart) -> output, or output and three gradients."""
    operation = average(setting)
    if by == "xla":
        operation = lambda *given: leaky_average(*given, implementation="xla")[0]  # noqa: E731
    arguments = average_arguments(1, time, setting.heads, setting.width, jnp.bfloat16)
    function = with_gradients(operation, (0, 1, 2))
    if what == "forward":
        function = lambda cotangent, *given: (operation(*given),)  # noqa: E731
    kernels = tuple(average_kernels(setting.width).values())[: 1 if what == "forward" else 2] if by == "hopper" else ()
    return Program(f"recurrence {by}, {what}, T = {time}", functools.partial(Made, function, arguments), kernels)


def copy_program(numbers: int) -> Program:
    """float32 in, float32 out: what the recurrence is held against."""
    return Program(f"copy {numbers}", lambda: Made(lambda array: (-array,), (struct(numbers),)))


def lengths(setting: Setting) -> list[int]:
    return list(dict.fromkeys((setting.time, setting.packed, *setting.more)))


def all_programs(setting: Setting) -> list[Program]:
    found = []
    for length in lengths(setting):
        for what in WHAT:
            found += [average_program(setting, by, what, length) for by in ("hopper", "xla")]
            found.append(copy_program(lib.half_the_numbers(setting, length, what)))
    return found


def inputs(setting: Setting, length: int) -> list[np.ndarray]:
    """Log gates, log decays and restarts of a packed row."""
    rng = np.random.default_rng(1)
    shape = (1, length, setting.heads)
    document_BT = lib.documents(setting, Place("long-term", "packed", length))
    restart_BT = np.diff(document_BT, axis=1, prepend=-1) != 0
    decay = -np.exp(rng.normal(size=shape) - 2)
    return [rng.normal(size=shape).astype(np.float32), decay.astype(np.float32), restart_BT]


def run(context: Context) -> None:
    import jax

    setting = context.setting
    for length in lengths(setting):
        cotangent, key, _ = context.load(read_programs.arrays(setting, length))()
        arguments = (cotangent, key, *map(jax.device_put, inputs(setting, length)))
        for what in WHAT:
            fields: dict[str, Any] = {"memory": "recurrence", "rows": "packed", "time": length, "what": what}
            calls = {}
            for by in ("hopper", "xla"):
                with context.attempt(by=by, **fields):
                    call, _ = context.first(average_program(setting, by, what, length), *arguments)
                    calls[by] = functools.partial(call, *arguments)
            least = lib.least_bytes(setting, length, what)
            copy = context.load(copy_program(lib.half_the_numbers(setting, length, what)))
            source = jax.device_put(np.ones(lib.half_the_numbers(setting, length, what), np.float32))
            times = by_turns({"copy": functools.partial(copy, source), **calls}, setting.seconds / 2)
            bandwidth = least / np.median(times["copy"]) / 1e6
            for by in calls:
                figures = spread(times[by], times["copy"])
                context.record(
                    "figure", by=by, **fields, **figures, least_bytes=least, share=1 / figures["ratio"],
                    copy_gigabytes_per_second=bandwidth,
                )  # fmt: skip
