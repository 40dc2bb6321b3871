"""Every shared case of the two kernels at the widths they take, values and gradients, against float64.

Each kind of case is padded to one shape, so a handful of programs serves all: queries that are added see nothing, pairs
that are added are seen by nobody, and positions that are added hand the recurrence's state on.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.gpu.parts.context import Context, Skipped
from launch.gpu.problem import Setting
from launch.gpu.programs import (
    Made,
    Program,
    average_arguments,
    average_kernels,
    interpret,
    read,
    read_arguments,
    read_kernels,
    struct,
    with_gradients,
)  # fmt: skip
from launch.gpu.records import first_line
from pallas_kernels import answers
from pallas_kernels.leaky_average import LeakyState
from pallas_kernels.leaky_average import cases as average_cases
from pallas_kernels.leaky_average.hopper import leaky_average_hopper
from pallas_kernels.retrieval import cases as read_cases

LEAST_QUERIES = 64  # fewer, as in decoding, are left to the XLA path
# Twice what the narrow case in bfloat16 is allowed: there are 30 times the numbers to find the worst of. On CPU the XLA
# path reaches 2.1e-2 of the greatest gradient here.
TOLERANCE = 4e-2
_FEW = 2  # cases of a dry run


def run(context: Context) -> None:
    setting = context.setting
    few = 1 if setting.interpret else None
    for width, unit_norm in READ_CASES[:few]:
        _run(context, read_case(setting, width, unit_norm), _reads(setting, width, unit_norm))
    for width, dtype in AVERAGE_CASES[:few]:
        _run(context, average_case(setting, width, dtype), _averages(setting, width, dtype))


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Arguments of the program, and what is to come of them."""

    name: str
    arguments: tuple[np.ndarray, ...]
    expected: dict[str, np.ndarray]
    limits: dict[str, float]
    measured: Any  # (results of the program) -> the arrays that `expected` names


def _run(context: Context, program: Program, problems: Iterator[_Problem]) -> None:
    call, failure, outcome = None, "", "failed"
    try:
        call = context.load(program)
    except Skipped as skipped:
        failure, outcome = str(skipped), "skipped"
    except Exception as error:
        failure = first_line(error)
    if call is None:
        context.record("case", name=program.name, outcome=outcome, message=failure)
        return
    for problem in problems:
        name = f"{program.name}: {problem.name}"
        try:
            with context.record.running(name, program.kernels):
                results = call(*problem.arguments)
                measured = problem.measured([np.asarray(array).astype(np.float64) for array in results])
            wrong = [
                f"{result} is {worst:.2g} off, {limit:.2g} allowed"
                for result, limit in problem.limits.items()
                # Not "greater": a NaN is wrong too.
                if not (worst := float(np.abs(measured[result] - problem.expected[result]).max(initial=0))) <= limit
            ]
            message = "; ".join(wrong)
        except Exception as error:
            message = first_line(error)
        context.record("case", name=name, outcome="failed" if message else "passed", message=message)


# --- Programs. ---


CASE_SHAPES = {"read": (2, 1536, 2), "average": (2, 1024, 2)}  # B, T, H on the card
DRY_SHAPES = {"read": (1, 384, 1), "average": (1, 128, 1)}


def case_shape(setting: Setting, kind: str) -> tuple[int, int, int]:
    return (DRY_SHAPES if setting.interpret else CASE_SHAPES)[kind]


def read_case(setting: Setting, width: int, unit_norm: bool) -> Program:
    """(cotangent, query, key, value, bandwidth, start, stop) -> output and all four gradients."""
    batch, time, heads = case_shape(setting, "read")
    function = with_gradients(read(setting, unit_norm), (0, 1, 2, 3))
    made = functools.partial(Made, function, read_arguments(batch, time, heads, width))
    names = read_kernels(width, unit_norm)
    return Program(f"read cases, K = {width}, {'unit' if unit_norm else 'any'} norm", made, tuple(names.values()))


def average_case(setting: Setting, width: int, dtype: str) -> Program:
    """(cotangent of output, cotangent of state, unit, input, log gate, log decay, restart, average, log scale) ->
    output, state, and the gradients of the three sequences, average and log scale.

    The state is exp(log scale - unit) average, at the row's end.
    """
    batch, time, heads = case_shape(setting, "average")

    def function(on_output: jax.Array, on_state: jax.Array, unit: jax.Array, *given: jax.Array) -> tuple[Any, ...]:
        *sequences, restart, average_BHK, log_scale_BH = given

        def of(*moving: jax.Array) -> tuple[jax.Array, ...]:
            state = LeakyState(*moving[3:])
            raw, log_gate, log_decay = moving[:3]
            how = interpret(setting)
            output, final = leaky_average_hopper(raw, log_gate, log_decay, restart, state, interpret=how)
            return output, final.average_BHK, final.log_scale_BH

        (output, final_BHK, final_scale_BH), pull = jax.vjp(of, *sequences, average_BHK, log_scale_BH)
        scale_BH1 = jnp.exp(final_scale_BH - unit)[..., None]
        return output, scale_BH1 * final_BHK, *pull((on_output, scale_BH1 * on_state, jnp.zeros_like(final_scale_BH)))

    row, _, gate, _, restart = average_arguments(batch, time, heads, width, dtype)
    state, scale = struct(batch, heads, width), struct(batch, heads)
    made = functools.partial(Made, function, (row, state, scale, row, gate, gate, restart, state, scale))
    kernels = tuple(average_kernels(width).values())
    return Program(f"average cases, K = {width}, {dtype}", made, kernels)


READ_CASES = [(width, unit_norm) for width in (64, 128) for unit_norm in (True, False)]
AVERAGE_CASES = [(64, "bfloat16"), (128, "bfloat16"), (128, "float32")]


def all_programs(setting: Setting) -> list[Program]:
    reads = [read_case(setting, *kind) for kind in READ_CASES]
    return reads + [average_case(setting, *kind) for kind in AVERAGE_CASES]


# --- Reads. ---


def _reads(setting: Setting, width: int, unit_norm: bool) -> Iterator[_Problem]:
    batch, time, heads = case_shape(setting, "read")
    chosen = [
        case for case in read_cases.cases()
        if LEAST_QUERIES <= case.start_BT.shape[1] <= time and not (unit_norm and case.is_exact)
    ]  # fmt: skip
    for case in chosen[:_FEW] if setting.interpret else chosen:
        yield _read(wide_read(case, width), batch, time, heads)


def _read(case: read_cases.Case, batch: int, time: int, heads: int) -> _Problem:
    query, key, value, bandwidth = (array[:batch, :, :heads] for array in case.arrays)
    query = key if case.is_one_array else query
    weight = case.weight_BTHV[:batch, :, :heads]
    start, stop = case.start_BT[:batch], np.maximum(case.start_BT, case.stop_BT)[:batch]
    expected = answers.reads(query, key, value, bandwidth, start, stop, weight)
    queries, stored = query.shape[1], key.shape[1]
    arrays = (weight, query, key, value)
    arguments = (
        *(_padded(array, time).astype(jnp.bfloat16) for array in arrays),
        _padded(bandwidth, time).astype(np.float32),
        *(_padded(end, time, stored).astype(np.int32) for end in (start, stop)),
    )

    def measured(results: list[np.ndarray]) -> dict[str, np.ndarray]:
        output, d_query, d_key, d_value, d_bandwidth = results
        found = {"output": output[:, :queries], "d_value": d_value[:, :stored], "d_bandwidth": d_bandwidth[:, :queries]}
        if case.is_one_array:
            return found | {"d_key": d_query[:, :queries] + d_key[:, :stored]}
        return found | {"d_query": d_query[:, :queries], "d_key": d_key[:, :stored]}

    if case.is_one_array:
        expected["d_key"] += expected.pop("d_query")
    largest = {name: np.abs(array).max(initial=0) for name, array in expected.items()}
    limits = {name: TOLERANCE * (size if case.is_exact else max(1.0, size)) for name, size in largest.items()}
    return _Problem(case.name, arguments, expected, limits, measured)


def wide_read(case: read_cases.Case, width: int) -> read_cases.Case:
    """The case in bfloat16, with keys of `width` features that have the products of the old ones, and as wide values.

    Features of an exact case are only spread out. There, values are ±1 and the loss sees one column, so that the mean
    of 64 values and the difference of two of them fit bfloat16's 8 bits: what cancels is exact, as in the narrow case.
    """
    query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH = case.arrays
    rng = np.random.default_rng(width)
    narrow = key_BSHK.shape[-1]
    value_BSHV = rng.normal(size=(*value_BSHV.shape[:3], width))
    # do·v and its rounding keep the size they have in the narrow case.
    weight_BTHV = rng.normal(size=(*case.weight_BTHV.shape[:3], width)) * (case.weight_BTHV.shape[-1] / width) ** 0.5
    if case.is_exact:
        turn_KK = np.eye(width)[:: width // narrow]
        value_BSHV, weight_BTHV = np.sign(value_BSHV), np.sign(weight_BTHV) * (np.arange(width) == 0)
    else:
        turn_KK = np.linalg.qr(rng.normal(size=(width, width)))[0][:narrow]
    rounded = [_rounded(array) for array in (query_BTHK @ turn_KK, key_BSHK @ turn_KK, value_BSHV, weight_BTHV)]
    return dataclasses.replace(case, arrays=(*rounded[:3], bandwidth_BTH), weight_BTHV=rounded[3], dtype="bfloat16")


# --- Averages. ---


def _averages(setting: Setting, width: int, dtype: str) -> Iterator[_Problem]:
    batch, time, heads = case_shape(setting, "average")
    chosen = [case for case in average_cases.cases() if case.restart_BT.shape[1] <= time]
    for case in chosen[:_FEW] if setting.interpret else chosen:
        yield _average(wide_average(case, width, dtype), batch, time, heads)


def _average(case: average_cases.Case, batch: int, time: int, heads: int) -> _Problem:
    input_BTHK, log_gate, log_decay = (array[:batch, :, :heads] for array in case.arrays[:3])
    average, scale = (array[:batch, :heads] for array in case.arrays[3:])
    unit = average_cases.unit(case)[:batch, :heads]
    weights = case.weights[0][:batch, :, :heads], case.weights[1][:batch, :heads]
    restart = case.restart_BT[:batch]
    expected = answers.averages(input_BTHK, log_gate, log_decay, restart, average, scale, weights, unit)
    length = restart.shape[1]
    arguments = (
        _padded(weights[0], time).astype(case.dtype), weights[1].astype(np.float32), unit.astype(np.float32),
        _padded(input_BTHK, time).astype(case.dtype),
        _padded(log_gate, time, -np.inf).astype(np.float32), _padded(log_decay, time).astype(np.float32),
        _padded(restart, time), average.astype(np.float32), scale.astype(np.float32),
    )  # fmt: skip

    def measured(results: list[np.ndarray]) -> dict[str, np.ndarray]:
        output, state, *gradients = results
        names = ("d_input", "d_log_gate", "d_log_decay", "d_average", "d_log_scale")
        found = {name: a[:, :length] if name in names[:3] else a for name, a in zip(names, gradients, strict=True)}
        return found | {"output": output[:, :length], "state": state}

    tolerance = 2e-2 if case.dtype == "bfloat16" else 2e-5
    limits = {}
    for name, array in expected.items():
        largest = np.abs(array).max()
        limits[name] = tolerance * (largest if case.name == "tiny_decay" else max(1.0, largest))
    if not case.has_state:  # nothing gives the zero state's log scale, -inf, a derivative
        limits = {name: limit for name, limit in limits.items() if name not in ("d_average", "d_log_scale")}
    return _Problem(case.name, arguments, expected, limits, measured)


def wide_average(case: average_cases.Case, width: int, dtype: str) -> average_cases.Case:
    """The case with `width` features and inputs of `dtype`; what was zero stays zero."""
    input_BTHK, log_gate_BTH, log_decay_BTH, average_BHK, log_scale_BH = case.arrays
    rng = np.random.default_rng(width)

    def widened(array: np.ndarray) -> np.ndarray:
        return rng.normal(size=(*array.shape[:-1], width)) * (array != 0).any(-1, keepdims=True)

    arrays = (
        _rounded(widened(input_BTHK), dtype), log_gate_BTH, log_decay_BTH,
        _rounded(widened(average_BHK), "float32"), log_scale_BH,
    )  # fmt: skip
    weights = (_rounded(rng.normal(size=arrays[0].shape), dtype), rng.normal(size=arrays[3].shape))
    return dataclasses.replace(case, arrays=arrays, weights=weights, dtype=dtype)


# --- Both. ---


def _rounded(array: np.ndarray, dtype: str = "bfloat16") -> np.ndarray:
    return array.astype(jnp.dtype(dtype)).astype(np.float64)


def _padded(array: np.ndarray, time: int, value: float = 0) -> np.ndarray:
    padding = [(0, 0)] * array.ndim
    padding[1] = (0, time - array.shape[1])
    return np.pad(array, padding, constant_values=value)
