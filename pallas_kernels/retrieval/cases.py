"""Cases of `retrieve` for all its implementations, on any device, and the float64 answer to compare with.

For tests, and for the checks on a GPU (`launch/gpu`); no model uses it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.retrieval.api import retrieve

Operation = Callable[..., jax.Array]
B, H, K, V = 2, 2, 4, 3
NAMES = ("output", "d_query", "d_key", "d_value", "d_bandwidth")
EXTREME_BANDWIDTH = 2.0**27  # of one bit, above e^10 · 4096: β1 at its bound, α = 1 and n = 4096


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: float64 arrays that `dtype` can hold, and the weights that make a loss of the output."""

    name: str
    arrays: tuple[np.ndarray, ...]  # query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH
    start_BT: np.ndarray
    stop_BT: np.ndarray
    weight_BTHV: np.ndarray
    is_one_array: bool = False  # the queries are the keys: d_key is the gradient of the one array, d_query is 0
    is_exact: bool = False  # sums of few bits: no rounding is excused by the size of what cancels
    dtype: str = "float32"


def cases() -> Iterator[Case]:
    """Everything that has its own way of going wrong; of one T and S where they do not matter, to compile once."""
    T = 300  # three tiles, the last one in part
    random = _spread(T, T)
    start_BT = document_start(documents(T))
    whole_BT = np.zeros((B, T), np.int32)
    yield _case("random", random)
    yield _case("random_one_array", random, is_one_array=True)
    yield _case("empty_everywhere", _spread(T, T, empty=1.0))
    yield _case("empty_here_and_there", _spread(T, T, empty=0.5))
    yield _case("empty_first_row", _constant(T, 0, lambda t: t))
    yield _case("empty_at_both_ends", (np.where(random[0] % 2, T, 0), np.where(random[0] % 2, T, 0)))
    yield _case("empty_tiles", _constant(T, 0, lambda t: np.where((t >= 128) & (t < 256), 0, t)))
    yield _case("one_pair", _constant(T, lambda t: T - 1 - t, lambda t: T - t))
    yield _case("everything", _constant(T, 0, T))
    yield _case("documents_of_one_position", causal(np.broadcast_to(np.arange(T), (B, T))))
    yield _case("short_term", short_term(start_BT, window=20), is_one_array=True)
    yield _case("short_term_across_tiles", short_term(whole_BT, window=200))
    yield _case("long_term", long_term(start_BT, delay=5), is_one_array=True)
    yield _case("long_term_across_tiles", long_term(whole_BT, delay=130))
    yield _case("causal", causal(start_BT))
    yield _case("causal_window", causal(start_BT, window=7))
    yield _case("one_query_of_many_pairs", _spread(1, T), S=T)
    yield _case("more_queries_than_pairs_in_whole_tiles", _spread(256, 128), S=128)
    yield _case("zero_queries_and_keys", random, keep=_coin(T, 0.7)[..., None, None])
    yield _case("zero_bandwidth", random, bandwidth_BTH=np.zeros((B, T, H)))
    yield _case("negative_bandwidth", random, bandwidth_BTH=_normal(T, H))
    yield _case("identical_keys", random, key=_constant_key(T))
    # One term beside exact zeros, or a mean of 64 values, all of few bits: nothing that cancels may have been rounded.
    yield _case("one_key_dominates", *_dominated(T), is_one_array=True, **_extreme(T))
    yield _case("one_key_dominates_from_below", *_dominated(T), is_one_array=True, **_extreme(T, sign=-1))
    yield _case("identical_keys_dominate", *_identical(T), **_extreme(T))
    yield _case("identical_keys_dominate_one_array", *_identical(T), is_one_array=True, **_extreme(T))
    yield _case("bfloat16", random, dtype="bfloat16")
    for count in (1, 7, 200):
        start_BT = document_start(packed(500, count))
        yield _case(f"short_term_in_rows_of_{count}", short_term(start_BT, window=256), is_one_array=True)
        yield _case(f"long_term_in_rows_of_{count}", long_term(start_BT, delay=64), is_one_array=True)
    halves_T = np.minimum(np.arange(140) // 2, 330)
    yield _case("more_pairs_than_queries", _constant(140, halves_T, np.minimum(halves_T + 250, 330)), S=330)
    yield _case("a_long_row", short_term(np.zeros((B, 1500), np.int32), window=256))


Interval = tuple[np.ndarray, np.ndarray]  # start_BT, stop_BT


def document_start(document_BT: np.ndarray) -> np.ndarray:
    """Where the document of each position starts; a change of id starts one."""
    changed_BT = np.diff(document_BT, axis=1, prepend=document_BT[:, :1]) != 0
    return np.maximum.accumulate(np.where(changed_BT, np.arange(document_BT.shape[1]), 0), axis=1).astype(np.int32)


def short_term(start_BT: np.ndarray, window: int) -> Interval:
    """The `window` - 1 pairs before position t, inside its document."""
    position_BT = np.broadcast_to(np.arange(start_BT.shape[1]), start_BT.shape)
    return _ends(np.maximum(start_BT, position_BT - window + 1), position_BT)


def long_term(start_BT: np.ndarray, delay: int) -> Interval:
    """The document's pairs up to t - `delay`."""
    return _ends(start_BT, np.maximum(start_BT, np.arange(start_BT.shape[1]) - delay + 1))


def causal(start_BT: np.ndarray, window: int | None = None) -> Interval:
    """The document's pairs up to t, the last `window` of them."""
    position_BT = np.broadcast_to(np.arange(start_BT.shape[1]), start_BT.shape)
    oldest_BT = start_BT if window is None else np.maximum(start_BT, position_BT - window + 1)
    return _ends(oldest_BT, position_BT + 1)


def _ends(start_BT: np.ndarray, stop_BT: np.ndarray) -> Interval:
    return start_BT.astype(np.int32), stop_BT.astype(np.int32)


def packed(T: int, count: int) -> np.ndarray:
    """Rows of up to `count` documents of random lengths."""
    return np.sort(np.random.default_rng(count).integers(0, count, (B, T)), axis=1).astype(np.int32)


def documents(T: int, seed: int = 3) -> np.ndarray:
    """Packed rows: documents of 1 to 100 positions, among them some of 1, and ids that return."""
    rng = np.random.default_rng(seed)
    rows = [np.repeat(np.arange(T) % 3, np.where(rng.random(T) < 0.3, 1, rng.integers(1, 101, T))) for _ in range(B)]
    return np.stack([row[:T] for row in rows]).astype(np.int32)


def _case(
    name: str,
    interval: Interval,
    key: np.ndarray | None = None,
    *,
    S: int | None = None,
    keep: np.ndarray | None = None,
    bandwidth_BTH: np.ndarray | None = None,
    is_one_array: bool = False,
    is_exact: bool = False,
    dtype: str = "float32",
) -> Case:
    start_BT, stop_BT = (np.asarray(array, np.int32) for array in interval)
    T = start_BT.shape[1]
    S = T if S is None else S
    rng = np.random.default_rng(T + S)
    query_BTHK, key_BSHK = (_unit(rng.normal(size=(B, size, H, K))) for size in (T, S))
    value_BSHV, weight_BTHV = rng.normal(size=(B, S, H, V)), rng.normal(size=(B, T, H, V))
    if is_exact:
        query_BTHK, value_BSHV, weight_BTHV = (np.round(4 * array) for array in (query_BTHK, value_BSHV, weight_BTHV))
    key_BSHK = key_BSHK if key is None else key
    if keep is not None:
        query_BTHK, key_BSHK = query_BTHK * keep, key_BSHK * keep[:, ::-1]
    bandwidth_BTH = np.exp(rng.normal(size=(B, T, H)) + 1) if bandwidth_BTH is None else bandwidth_BTH
    # What an argument of this type cannot hold is not an error of the operation.
    query_BTHK, key_BSHK, value_BSHV = (
        np.asarray(jnp.asarray(array, dtype), np.float64) for array in (query_BTHK, key_BSHK, value_BSHV)
    )
    return Case(
        name=name,
        arrays=(query_BTHK, key_BSHK, value_BSHV, np.asarray(np.float32(bandwidth_BTH), np.float64)),
        start_BT=start_BT,
        stop_BT=stop_BT,
        weight_BTHV=weight_BTHV,
        is_one_array=is_one_array,
        is_exact=is_exact,
        dtype=dtype,
    )


def _unit(array_BTHK: np.ndarray) -> np.ndarray:
    return array_BTHK / np.linalg.norm(array_BTHK, axis=-1, keepdims=True)


def _normal(T: int, *rest: int) -> np.ndarray:
    return np.random.default_rng(4).normal(size=(B, T, *rest))


def _coin(T: int, share: float) -> np.ndarray:
    return np.random.default_rng(5).random((B, T)) < share


def _spread(T: int, S: int, empty: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Intervals in no order; a share of them has stop <= start."""
    rng = np.random.default_rng(T + S)
    start_BT, stop_BT = np.sort(rng.integers(0, S + 1, (2, B, T)), axis=0)
    swap_BT = rng.random((B, T)) < empty
    return np.where(swap_BT, stop_BT, start_BT), np.where(swap_BT, start_BT, stop_BT)


_End = int | np.ndarray | Callable[[np.ndarray], np.ndarray]


def _constant(T: int, start: _End, stop: _End) -> tuple[np.ndarray, np.ndarray]:
    """The same interval in every row of the batch."""
    ends = (end(np.arange(T)) if callable(end) else np.broadcast_to(end, T) for end in (start, stop))
    start_BT, stop_BT = (np.broadcast_to(end_T, (B, T)) for end_T in ends)
    return start_BT, stop_BT


def _constant_key(T: int) -> np.ndarray:
    """A key of unit norm whose products are exact."""
    return np.full((B, T, H, K), 0.5) * np.array([1, -1, 1, 1])


def _identical(T: int) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """64 equal keys for every query: a mean that float32 holds."""
    return _constant(T, lambda t: t % (T - 64), lambda t: t % (T - 64) + 64), _constant_key(T)


def _dominated(T: int) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """4 keys for every query, also across the tiles: the query itself, its opposite, and two at right angles to it."""
    place_T = np.arange(T) + 2
    key_TK = np.eye(K)[place_T // 2 % K] * np.where(place_T % 2, -1, 1)[:, None]
    interval = _constant(
        T, lambda t: np.maximum((t + 2) // 4 * 4 - 2, 0), lambda t: np.minimum((t + 2) // 4 * 4 + 2, T)
    )
    return interval, np.broadcast_to(key_TK[:, None], (B, T, H, K))


def _extreme(T: int, sign: int = 1) -> dict[str, Any]:
    return {"bandwidth_BTH": np.full((B, T, H), sign * EXTREME_BANDWIDTH), "is_exact": True}


_reference = functools.partial(retrieve, implementation="reference")


def expected(case: Case) -> dict[str, np.ndarray]:
    """The answer in float64."""
    with jax.enable_x64(True):
        return _measure(case, _reference, "float64", "float64")


def measured(case: Case, operation: Operation) -> dict[str, np.ndarray]:
    """The same numbers from an implementation."""
    return _measure(case, operation, case.dtype, "float32")


def _measure(case: Case, operation: Operation, dtype: str, bandwidth_dtype: str) -> dict[str, np.ndarray]:
    *rest, bandwidth_BTH = case.arrays
    arrays = (*(jnp.asarray(array, dtype) for array in rest), jnp.asarray(bandwidth_BTH, bandwidth_dtype))
    weight_BTHV = jnp.asarray(case.weight_BTHV, bandwidth_dtype)
    results = value_and_gradients(
        arrays, jnp.asarray(case.start_BT), jnp.asarray(case.stop_BT), weight_BTHV, operation, case.is_one_array
    )
    return {name: np.asarray(array).astype(np.float64) for name, array in zip(NAMES, results, strict=True)}


@functools.partial(jax.jit, static_argnames=("operation", "is_one_array"))
def value_and_gradients(
    arrays: tuple[jax.Array, ...],
    start_BT: jax.Array,
    stop_BT: jax.Array,
    weight_BTHV: jax.Array,
    operation: Operation,
    is_one_array: bool,
) -> tuple[jax.Array, ...]:
    def loss(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH = arrays
        if is_one_array:
            query_BTHK = key_BSHK
        output_BTHV = operation(query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH, start_BT, stop_BT)
        return jnp.sum(weight_BTHV * output_BTHV.astype(weight_BTHV.dtype)), output_BTHV

    (_, output_BTHV), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
    return output_BTHV, *gradients


def plain(case: Case) -> np.ndarray:
    """The output of a case as the equation stands, pair by pair, with no array library's derivative in sight."""
    query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH = case.arrays
    if case.is_one_array:
        query_BTHK = key_BSHK
    output_BTHV = np.zeros((*bandwidth_BTH.shape, value_BSHV.shape[-1]))
    for b, t, h in np.ndindex(bandwidth_BTH.shape):
        seen = slice(case.start_BT[b, t], max(case.start_BT[b, t], case.stop_BT[b, t]))
        score_S = bandwidth_BTH[b, t, h] * (key_BSHK[b, seen, h] @ query_BTHK[b, t, h])
        if score_S.size:
            weight_S = np.exp(score_S - score_S.max())
            output_BTHV[b, t, h] = weight_S @ value_BSHV[b, seen, h] / weight_S.sum()
    return output_BTHV
