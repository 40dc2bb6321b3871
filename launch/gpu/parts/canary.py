"""Each kernel by itself at a size that takes microseconds: right against float64, and twice the same bits.

One process for each group, all at once, and each is killed after a few seconds: what fails or hangs here is run nowhere
else.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from launch.gpu.parts.context import Context, errors
from launch.gpu.problem import Setting
from launch.gpu.programs import (
    CANARY,
    CANARY_HEADS,
    CANARY_TIME,
    READ_MOVING,
    READ_RESULTS,
    Flat,
    Made,
    Program,
    average,
    average_arguments,
    average_kernels,
    read,
    read_arguments,
    read_kernels,
    with_gradients,
)  # fmt: skip
from launch.gpu.records import first_line
from pallas_kernels import answers
from pallas_kernels.retrieval import cases

_AVERAGE_RESULTS = {"forward": ("output",), "gradient": ("output", "d_input", "d_log_gate", "d_log_decay")}


def programs(setting: Setting, group: str) -> dict[str, Program]:
    """The programs of a group by their kernel's name; of the same arguments each, less the cotangent in forward."""
    width, unit_norm = CANARY[group]
    heads, time = (1, 128) if setting.interpret else (CANARY_HEADS, CANARY_TIME)
    if unit_norm is None:
        names = average_kernels(width)
        arguments = average_arguments(1, time, heads, width, jnp.bfloat16)
        operation = average(setting)
        functions: dict[str, Flat] = {"gradient": with_gradients(operation, (0, 1, 2))}
    else:
        names = read_kernels(width, unit_norm)
        arguments = read_arguments(1, time, heads, width)
        operation = read(setting, unit_norm)
        functions = {kernel: with_gradients(operation, moving) for kernel, moving in READ_MOVING.items()}
    functions = {"forward": lambda cotangent, *arrays: (operation(*arrays),), **functions}
    return {
        kernel: Program(f"canary {names[kernel]}", functools.partial(Made, function, arguments), (names[kernel],))
        for kernel, function in functions.items()
    }


def results_of(group: str) -> dict[str, tuple[str, ...]]:
    """The names of what each kernel's program gives."""
    return READ_RESULTS if group.startswith("retrieve") else _AVERAGE_RESULTS


def inputs(setting: Setting, group: str) -> list[np.ndarray]:
    """A packed row of documents of 1 to 100 positions, as a program of the group takes it, in float32.

    Bandwidths lie on both sides of what the constant in place of the maximum allows, and where no norm is promised keys
    are longer than 1 and some bandwidths negative: every way through the forward kernel is taken.
    """
    width, unit_norm = CANARY[group]
    shape = next(iter(programs(setting, group).values())).make().arguments[0].shape
    rng = np.random.default_rng(width)
    document_BT = cases.documents(shape[1])[:1]
    cotangent, query, key, value = (rng.normal(size=shape).astype(np.float32) for _ in range(4))
    if unit_norm is None:
        log_gate, log_decay = rng.normal(size=shape[:3]), -np.abs(rng.normal(size=shape[:3]))
        restart_BT = np.diff(document_BT, axis=1, prepend=-1) != 0
        return [cotangent, key, log_gate.astype(np.float32), log_decay.astype(np.float32), restart_BT]
    query, key = (a * (1 if unit_norm else 2) / np.linalg.norm(a, axis=-1, keepdims=True) for a in (query, key))
    bandwidth_BTH = np.exp(rng.uniform(0, 4, shape[:3]))
    bandwidth_BTH[:, shape[1] // 2 :] *= 3
    if not unit_norm:
        bandwidth_BTH[:, :64] *= -1
    start_BT, stop_BT = cases.long_term(cases.document_start(document_BT), 4)
    return [cotangent, query, key, value, bandwidth_BTH.astype(np.float32), start_BT, stop_BT]


def rounded(setting: Setting, group: str) -> list[np.ndarray]:
    """The inputs in the types of the programs' arguments."""
    arguments = next(iter(programs(setting, group).values())).make().arguments
    return [array.astype(argument.dtype) for array, argument in zip(inputs(setting, group), arguments, strict=True)]


def answer(setting: Setting, group: str) -> answers.Answers:
    """The float64 answers to the rounded inputs."""
    cotangent, *given = rounded(setting, group)
    if group.startswith("retrieve"):
        query, key, value, bandwidth, start, stop = given
        return answers.reads(query, key, value, bandwidth, start, stop, cotangent)
    on_output, raw, log_gate, log_decay = (array.astype(np.float64) for array in (cotangent, *given[:3]))
    zero_BHK = np.zeros_like(raw[:, 0])
    nothing_BH, unit_BH = np.full(zero_BHK.shape[:2], -np.inf), np.zeros(zero_BHK.shape[:2])
    return answers.averages(
        raw, log_gate, log_decay, given[3], zero_BHK, nothing_BH, (on_output, zero_BHK), unit_BH
    )  # fmt: skip


def run(context: Context, group: str) -> None:
    expected = context.bundle.answers(f"canary {group}") or answer(context.setting, group)
    arguments = rounded(context.setting, group)
    for kernel, program in programs(context.setting, group).items():
        (name,) = program.kernels
        found: dict[str, Any] = {"errors": {}, "same_bits": False}
        if context.broken:
            problem = "not run: a kernel before it failed"
        else:
            try:
                problem = _problem(context, program, arguments, results_of(group)[kernel], expected, found)
            except Exception as error:
                problem = first_line(error)
        if problem:
            context.broken[name] = problem
        context.record("canary", kernel=name, ok=not problem, message=problem, **found)


def _problem(
    context: Context,
    program: Program,
    arguments: list[np.ndarray],
    names: tuple[str, ...],
    expected: answers.Answers,
    found: dict[str, Any],
) -> str:
    """What is wrong with a kernel's results, or ""; the errors, and whether two runs agree, go to `found`."""
    call, results = context.first(program, *arguments)
    first, second = ([np.asarray(array) for array in given] for given in (results, call(*arguments)))
    found["same_bits"] = all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))
    checked = errors(dict(zip(names, first, strict=True)), expected)
    found["errors"] = checked["errors"]
    if not checked["ok"]:
        return f"wrong values: {checked['errors']}"
    return "" if found["same_bits"] else "two runs gave different bits"


def all_programs(setting: Setting) -> list[Program]:
    return [program for group in CANARY for program in programs(setting, group).values()]
