"""The bench of `retrieve` beside the peers that run in jax, each checked before it is timed."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from launch import gpu_bench
from launch.gpu_report import OUT_OF_TIME, WHAT
from mosaics_jax import visibility
from pallas_kernels.retrieval import peers, retrieve


def operation(by: str, memory: str, interval: visibility.Interval) -> Callable[..., jax.Array]:
    """The whole of the read as a function of (key_BTHK, value_BTHV, bandwidth_BTH): queries are keys."""

    def read(key_BTHK: jax.Array, value_BTHV: jax.Array, bandwidth_BTH: jax.Array) -> jax.Array:
        arrays = (key_BTHK, key_BTHK, value_BTHV, bandwidth_BTH)
        if by == "cudnn":
            if memory == "long-term":
                return peers.cudnn_long_term(*arrays, gpu_bench.DELAY)
            return peers.cudnn_short_term(*arrays, gpu_bench.WINDOW)
        if by == "tokamax":
            return peers.tokamax(*arrays, *interval)
        return retrieve(*arrays, *interval, implementation=by, unit_norm=by == "hopper")

    return read


def timed(by: str, memory: str, problem: gpu_bench.Problem) -> tuple[Callable[..., jax.Array], tuple[Any, ...]]:
    """What the clock sees: a function, and its arguments, of which the first three get gradients."""
    key_BTHK, value_BTHV, bandwidth_BTH = problem.key_BTHK, problem.value_BTHV, problem.bandwidth_BTH
    if by == "cudnn":
        shift, pairs = (gpu_bench.DELAY, None) if memory == "long-term" else (1, gpu_bench.WINDOW - 1)
        arrays = jax.jit(peers.shifted, static_argnums=4)(key_BTHK, key_BTHK, value_BTHV, bandwidth_BTH, shift)
        return functools.partial(peers.shifted_attention, pairs=pairs), arrays
    if by == "tokamax":
        return peers.tokamax_attention, (peers.scaled(key_BTHK, bandwidth_BTH), key_BTHK, value_BTHV, *problem.interval)

    def read(key_BTHK: jax.Array, value_BTHV: jax.Array, bandwidth_BTH: jax.Array, *interval: jax.Array) -> jax.Array:
        return operation(by, memory, visibility.Interval(*interval))(key_BTHK, value_BTHV, bandwidth_BTH)

    return read, (key_BTHK, value_BTHV, bandwidth_BTH, *problem.interval)


def check_reads(by: str, quick: bool, record: gpu_bench.Record, packed: bool = True) -> None:
    for memory, rows in dict.fromkeys((place.memory, place.rows) for place in gpu_bench.places(quick, packed)):
        problem, expected = gpu_bench.small(memory, rows)
        both = jax.jit(gpu_bench.with_gradients(operation(by, memory, problem.interval), 3))
        output, gradients = both(*problem.arrays)
        measured = dict(zip(gpu_bench.NAMES, (output, *gradients), strict=True))
        record("check", by=by, memory=memory, rows=rows, **gpu_bench.errors(measured, expected))


def reads(by: str, quick: bool, deadline: float, record: gpu_bench.Record) -> None:
    """The bench of one implementation of `retrieve` in jax."""
    todo = gpu_bench.places(quick, packed=by != "cudnn")
    try:
        check_reads(by, quick, record, packed=by != "cudnn")
    except Exception as error:
        if not gpu_bench.missing(error)["failed"]:
            for place in todo:
                for what in WHAT:
                    record("figure", by=by, **dataclasses.asdict(place), what=what, **gpu_bench.missing(error))
            return
        record("error", message=f"the check of values: {gpu_bench.first_line(error)}")
    done = []
    for place in todo:
        for what in WHAT:
            fields = {"by": by, **dataclasses.asdict(place), "what": what}
            if time.monotonic() > deadline:
                record("figure", **fields, missing=OUT_OF_TIME, failed=False)
                continue
            try:
                problem = gpu_bench.Problem(place)
                function, call = _call(by, place, what, problem)
                figures = gpu_bench.spread(gpu_bench.milliseconds(call, 0.3 if quick else 2.0))
                rate = problem.flops(what) / figures["milliseconds"] / 1e9
                record("figure", **fields, **figures, pairs=problem.pairs, tflops=rate)
                done.append((fields, place, function))
            except Exception as error:
                record("figure", **fields, **gpu_bench.missing(error))
    if by != "xla":  # a loop of thousands of small kernels, and what lies between them, is its cost
        _kernel_times(by, done, deadline, record)


def _call(
    by: str, place: gpu_bench.Place, what: str, problem: gpu_bench.Problem, function: Any = None
) -> tuple[Any, gpu_bench.Call]:
    """The compiled function, and a call of it; a function that was compiled before is used again."""
    bare, arguments = timed(by, place.memory, problem)
    if what == "forward":
        function = function or jax.jit(bare)
        return function, functools.partial(function, *arguments)
    function = function or jax.jit(gpu_bench.with_gradients(bare, 3))
    cotangent = problem.cotangent_BTHV[:, : arguments[0].shape[1]]
    return function, functools.partial(function, cotangent, *arguments)


def _kernel_times(
    by: str, done: list[tuple[dict[str, Any], gpu_bench.Place, Any]], deadline: float, record: gpu_bench.Record
) -> None:
    """The device's own account, last: its profiler is the part of all this that may not work."""
    from jax.experimental.mosaic.gpu import profiler

    for fields, place, function in done:
        if time.monotonic() > deadline:
            return
        try:
            problem = gpu_bench.Problem(place)
            _, call = _call(by, place, fields["what"], problem, function)
            _, runs = profiler.measure(function, iterations=5)(*call.args)  # type: ignore[attr-defined]
            if runs is None:
                raise RuntimeError("the profiler saw no kernel")
            median = statistics.median(runs)
            record("kernels", **fields, milliseconds=median, tflops=problem.flops(fields["what"]) / median / 1e9)
        except Exception as error:
            record("note", message=f"kernel times: {gpu_bench.first_line(error)}")
            return
