"""The kernels' variants beside the kernels as they are, by turns; each is checked against float64 first."""

import functools

from launch.gpu import problem as lib
from launch.gpu.parts import read_programs
from launch.gpu.parts.context import Context, by_turns, errors, spread
from launch.gpu.parts.reads import answer_name
from launch.gpu.problem import Setting
from launch.gpu.programs import (
    READ_MOVING,
    READ_RESULTS,
    Made,
    Program,
    read,
    read_arguments,
    read_kernels,
    with_gradients,
)  # fmt: skip
from pallas_kernels.retrieval.hopper import TILING, Tiling

VARIANTS = {
    "forward": {
        "64 pairs, 2 buffers": Tiling(block=64, stages=2),
        "64 pairs, 3 buffers": Tiling(block=64, stages=3),
        "64 pairs, 4 buffers": Tiling(block=64, stages=4),
    },
    "query gradient": {
        "64 pairs, 3 buffers": Tiling(query_stages=3),
        "128 pairs, 2 buffers": Tiling(query_block=128),
    },
    "key gradient": {"3 buffers": Tiling(key_stages=3)},
}


def variant(setting: Setting, kernel: str, name: str, tiling: Tiling) -> Program:
    """(cotangent, query, key, value, bandwidth, start, stop) -> output, or output and what the kernel makes."""
    operation = read(setting, tiling=tiling)
    function = with_gradients(operation, READ_MOVING[kernel]) if kernel != "forward" else None
    made = functools.partial(
        Made,
        function or (lambda cotangent, *given: (operation(*given),)),
        read_arguments(1, setting.time, setting.heads, setting.width),
    )
    names = read_kernels(setting.width)
    kernels = (names["forward"],) if kernel == "forward" else (names["forward"], names[kernel])
    return Program(f"variant of {kernel}: {name}", made, kernels)


def programs(setting: Setting) -> dict[str, dict[str, Program]]:
    """By kernel, then by what they change; today's tiling first."""
    return {
        kernel: {
            name: variant(setting, kernel, name, tiling)
            for name, tiling in {"as it is": TILING, **others}.items()
        }
        for kernel, others in VARIANTS.items()
    }  # fmt: skip


def run(context: Context) -> None:
    import jax

    setting = context.setting
    (place,) = lib.places(setting)["reads_long"]
    cotangent, key, value = context.load(read_programs.arrays(setting, place.time))()
    ends = tuple(map(jax.device_put, lib.interval(setting, place)))
    for by, bandwidth in (("hopper", lib.model_bandwidth), ("hopper, small bandwidth", lib.small_bandwidth)):
        beta = bandwidth(setting, place)
        expected = context.bundle.answers(answer_name(place, by)) or lib.answer(setting, place, beta)
        arguments = (cotangent, key, key, value, jax.device_put(beta), *ends)
        for kernel, group in programs(setting).items():
            calls = {}
            for name, program in group.items():
                fields = {"kernel": kernel, "variant": name, "by": by}
                with context.attempt("variant", **fields):
                    call, results = context.first(program, *arguments)
                    measured = lib.sampled(dict(zip(READ_RESULTS[kernel], results, strict=True)), place.time)
                    found = errors(measured, expected)
                    context.record("check", **fields, memory=place.memory, rows=place.rows, **found)
                    if found["ok"]:
                        calls[name] = functools.partial(call, *arguments)
                    else:
                        context.record("variant", **fields, missing="wrong values", failed=False)
            times = by_turns(calls, setting.seconds)
            for name in calls:
                figures = spread(times[name], times.get("as it is"))
                context.record("variant", kernel=kernel, variant=name, by=by, **figures)


def all_programs(setting: Setting) -> list[Program]:
    return [program for group in programs(setting).values() for program in group.values()]
