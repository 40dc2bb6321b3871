"""What the benches of the GPU suite share: the problems, the clock, and the check of values against float64."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mosaics_jax import visibility
from pallas_kernels.retrieval import retrieve

HEADS, WIDTH = 32, 128
DELAY, WINDOW, BANDWIDTH = 64, 256, 20.0
MEAN_DOCUMENT = 1024
BACKWARD = 2.5  # FLOPs of backward over those of forward: five products of the size of forward's two
TOLERANCE = 2e-2  # of bfloat16, as in the tests

NAMES = ("output", "d_key", "d_value", "d_bandwidth")

Call = Callable[[], Any]
Record = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Place:
    """What is read, of which rows."""

    memory: str
    rows: str
    time: int


class Problem:
    """Seeded arrays of one row: keys of norm 1 in bfloat16, one interval for each query."""

    def __init__(self, place: Place, heads: int = HEADS, width: int = WIDTH):
        seeds = jax.random.split(jax.random.key(0), 3)
        shape = (1, place.time, heads, width)
        self.key_BTHK, self.value_BTHV, self.cotangent_BTHV = _normal(seeds, shape)
        self.bandwidth_BTH = jnp.full(shape[:3], BANDWIDTH, jnp.float32)
        start_BT = visibility.document_start(jnp.asarray(documents(place)))
        read = {
            "long-term": functools.partial(visibility.long_term, delay=DELAY),
            "short-term": functools.partial(visibility.short_term, window=WINDOW),
        }[place.memory]
        self.interval = read(start_BT)
        self.arrays = (self.cotangent_BTHV, self.key_BTHK, self.value_BTHV, self.bandwidth_BTH)
        self.pairs = int(np.asarray(self.interval.count_BT).sum(dtype=np.int64))

    def flops(self, what: str) -> float:
        """Those that the visible pairs need: 4 K a pair and head forward, and BACKWARD times that backward."""
        _, _, heads, width = self.key_BTHK.shape
        return 4.0 * width * heads * self.pairs * (1 if what == "forward" else 1 + BACKWARD)


@functools.partial(jax.jit, static_argnames="shape")
def _normal(seeds: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    key_BTHK, *rest = (jax.random.normal(seed, shape) for seed in seeds)
    key_BTHK /= jnp.linalg.norm(key_BTHK, axis=-1, keepdims=True)
    return tuple(array.astype(jnp.bfloat16) for array in (key_BTHK, *rest))


def documents(place: Place) -> np.ndarray:
    """Document ids [1, T]: one document, or many of exponential lengths of mean MEAN_DOCUMENT, cut at the row's end."""
    if place.rows == "unpacked":
        return np.zeros((1, place.time), np.int32)
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.exponential(MEAN_DOCUMENT, place.time).astype(np.int64))
    ends = np.cumsum(lengths)
    return np.searchsorted(ends, np.arange(place.time), side="right").astype(np.int32)[None]


def places(quick: bool, packed: bool = True) -> list[Place]:
    """The most telling first."""
    if quick:
        return [Place(memory, "unpacked", 4096) for memory in ("long-term", "short-term")]
    kinds = [("unpacked", 16384), ("packed", 32768), ("unpacked", 32768), ("unpacked", 4096)]
    return [
        Place(memory, rows, length)
        for rows, length in kinds
        for memory in ("long-term", "short-term")
        if packed or rows == "unpacked"
    ]


def with_gradients(function: Callable[..., jax.Array], count: int) -> Callable[..., Any]:
    """(cotangent, *arguments) -> the output and the gradients of the first `count` arguments."""

    def both(cotangent: jax.Array, *arguments: jax.Array) -> Any:
        output, pull = jax.vjp(lambda *moving: function(*moving, *arguments[count:]), *arguments[:count])
        return output, pull(cotangent)

    return both


def milliseconds(call: Call, limit: float = 2.0) -> list[float]:
    """Per call, of every round: in a round of 20 ms or more, calls are sent one after the other and waited for once.

    After two calls that warm up, 3 to 30 rounds of about `limit` seconds in all; one, where a call alone takes as long.
    """
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    single = time.perf_counter() - start
    calls = max(1, min(200, math.ceil(0.02 / single)))
    rounds = 1 if single > limit else max(3, min(30, int(limit / (single * calls))))
    record = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        record.append((time.perf_counter() - start) / calls * 1e3)
        del result
    return record


def spread(record: list[float]) -> dict[str, float]:
    """The figures of a record of milliseconds."""
    return {
        "milliseconds": statistics.median(record), "least": min(record), "greatest": max(record), "rounds": len(record)
    }  # fmt: skip


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def missing(error: BaseException) -> dict[str, Any]:
    """What stands in the place of a figure. A peer that is not there did not fail; one that breaks as it loads did."""
    absent = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in ("torch", "tokamax")
    return {"missing": "not installed" if absent else first_line(error), "failed": not absent}


def errors(measured: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Greatest difference of each, as a share of the greatest number expected or of 1; and whether all will do."""
    found = {}
    for name, array in measured.items():
        truth = np.asarray(expected[name], np.float64)
        difference = np.abs(np.asarray(array).astype(np.float64) - truth).max()
        found[name] = float(difference / max(1.0, np.abs(truth).max()))
    return {"errors": found, "ok": all(error <= TOLERANCE for error in found.values())}  # a NaN is not small


def small(memory: str, rows: str) -> tuple[Problem, dict[str, Any]]:
    """A problem for checks, and its values and gradients in float64, made on the CPU. Queries are keys."""
    problem = Problem(Place(memory, rows, 512 if rows == "unpacked" else 4096), heads=2)
    with jax.default_device(jax.local_devices(backend="cpu")[0]), jax.enable_x64(True):
        cotangent, *arrays = (jnp.asarray(np.asarray(array).astype(np.float64)) for array in problem.arrays)
        ends = [jnp.asarray(np.asarray(end)) for end in problem.interval]

        def read(key_BTHK: jax.Array, value_BTHV: jax.Array, bandwidth_BTH: jax.Array) -> jax.Array:
            return retrieve(key_BTHK, key_BTHK, value_BTHV, bandwidth_BTH, *ends, implementation="reference")

        output, gradients = jax.jit(with_gradients(read, 3))(cotangent, *arrays)
        return problem, dict(zip(NAMES, map(np.asarray, (output, *gradients)), strict=True))
