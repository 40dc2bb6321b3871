"""`retrieve`: the one read operation of every memory, with its checks and the choice of its implementation."""

import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import checks, choice
from pallas_kernels.retrieval.blockwise import retrieve_blockwise
from pallas_kernels.retrieval.hopper import QUERIES, WIDTHS
from pallas_kernels.retrieval.hopper_vjp import retrieve_hopper
from pallas_kernels.retrieval.reference import retrieve_reference

_IMPLEMENTATIONS: Final[dict[str, Callable[..., jax.Array]]] = {
    "hopper": retrieve_hopper,
    "xla": retrieve_blockwise,
    "reference": retrieve_reference,
}


def retrieve(
    query_BTHK: jax.Array,
    key_BSHK: jax.Array,
    value_BSHV: jax.Array,
    bandwidth_BTH: jax.Array,
    start_BT: jax.Array,
    stop_BT: jax.Array,
    *,
    implementation: str | None = None,
    unit_norm: bool = False,
) -> jax.Array:
    """Kernel regression over an interval of stored pairs (PAPER section 2, eq. 1-6).

        o_t = Σ_s w_ts v_s,    w_ts = exp(β_t q_t·k_s) / Σ_s' exp(β_t q_t·k_s'),    s and s' in [start_t, stop_t)

    An empty interval gives 0, with zero gradient. The bandwidth β belongs to the query; with keys of unit norm this is
    the Gaussian kernel exp(-β/2 ||q_t - k_s||²), and with β = 1/√K and no unit norm it is dot-product attention.

    Args:
      query_BTHK: queries, float.
      key_BSHK: stored keys, the queries' type. In a memory mosaic queries and keys are one array.
      value_BSHV: stored values, the queries' type; V need not be K.
      bandwidth_BTH: β, float, one per query and head.
      start_BT: first visible stored position of each query, integer in [0, S], never decreasing along T.
      stop_BT: the position after the last visible one, integer in [start, S], never decreasing along T; stop = start is
        an empty interval. The same interval serves all heads, and cost is proportional to what the intervals of
        neighbouring queries span.
      implementation: "hopper" (Mosaic GPU kernels: bfloat16, K = V of 64 or 128, compute capability 9.0), "xla"
        (blockwise, for any device and shape) or "reference" (dense). None takes "hopper" where it can run, "xla"
        anywhere else, and logs once which and why; see `describe`.
      unit_norm: a promise that no query and no key is longer than 1 (up to bfloat16 rounding), as a memory's keys are.
        The Hopper kernels then do without a running maximum where β allows it; the result is the same.

    Returns:
      output_BTHV in the values' type. Differentiable in query, key, value and bandwidth.

    Raises:
      ValueError: an argument of the wrong shape or type, an unknown implementation or one that cannot run here, or an
        illegal interval. The values of intervals are checked where they are concrete (outside jit), and inside jit
        under PALLAS_KERNELS_CHECK_VALUES=1 (`pallas_kernels.checks`); unchecked, intervals in any order are read as
        they stand, with less skipped, and stop < start is empty.
    """
    _check(query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH, start_BT, stop_BT)
    start_BT, stop_BT = start_BT.astype(jnp.int32), stop_BT.astype(jnp.int32)
    obstacle = _obstacle(query_BTHK, value_BSHV)
    chosen = choice.choose("retrieve", implementation, obstacle, tuple(_IMPLEMENTATIONS))
    operation = _IMPLEMENTATIONS[chosen]
    if chosen == "hopper":
        return operation(query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH, start_BT, stop_BT, unit_norm)
    return operation(query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH, start_BT, stop_BT)


def describe(query_BTHK: Any, value_BSHV: Any) -> None:
    """Prints what `retrieve` would run for such arguments (arrays or ShapeDtypeStructs), and why."""
    name, _ = choice.device()
    obstacle = _obstacle(query_BTHK, value_BSHV)
    if obstacle is None:
        print(f"retrieve: the Hopper kernels, on {name}")
    else:
        print(f"retrieve: the blockwise XLA path, on {name}; no Hopper kernel: {obstacle}")


def _obstacle(query_BTHK: Any, value_BSHV: Any) -> str | None:
    """Why these arguments cannot take the Hopper kernels here, or None."""
    _, time, _, width = query_BTHK.shape
    if (reason := choice.no_hopper()) is not None:
        return reason
    if query_BTHK.dtype != jnp.bfloat16:
        return f"it takes bfloat16, these are {query_BTHK.dtype}"
    if width not in WIDTHS or value_BSHV.shape[-1] != width:
        legal = " or ".join(map(str, WIDTHS))
        return f"it takes keys and values of one head width, {legal}, these have {width} and {value_BSHV.shape[-1]}"
    if time < QUERIES:  # decoding: a tile would be nearly empty
        return f"it takes {QUERIES} queries or more, these are {time}"
    return None


def _check(
    query_BTHK: jax.Array,
    key_BSHK: jax.Array,
    value_BSHV: jax.Array,
    bandwidth_BTH: jax.Array,
    start_BT: jax.Array,
    stop_BT: jax.Array,
) -> None:
    if query_BTHK.ndim != 4:
        raise ValueError(f"query_BTHK has shape {query_BTHK.shape}; legal: four dimensions [B, T, H, K]")
    batch, time, heads, width = query_BTHK.shape
    if key_BSHK.ndim != 4 or key_BSHK.shape != (batch, key_BSHK.shape[1], heads, width):
        raise ValueError(f"key_BSHK has shape {key_BSHK.shape}; legal: [{batch}, S, {heads}, {width}]")
    stored = key_BSHK.shape[1]
    if value_BSHV.ndim != 4 or value_BSHV.shape[:3] != (batch, stored, heads):
        raise ValueError(f"value_BSHV has shape {value_BSHV.shape}; legal: [{batch}, {stored}, {heads}, V]")
    if bandwidth_BTH.shape != (batch, time, heads):
        raise ValueError(f"bandwidth_BTH has shape {bandwidth_BTH.shape}; legal: [{batch}, {time}, {heads}]")
    for name, array in {"query_BTHK": query_BTHK, "bandwidth_BTH": bandwidth_BTH}.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} has type {array.dtype}; legal: a floating type")
    for name, array in {"key_BSHK": key_BSHK, "value_BSHV": value_BSHV}.items():
        if array.dtype != query_BTHK.dtype:
            raise ValueError(f"{name} has type {array.dtype}; legal: the queries' type, {query_BTHK.dtype}")
    for name, array in {"start_BT": start_BT, "stop_BT": stop_BT}.items():
        if array.shape != (batch, time):
            raise ValueError(f"{name} has shape {array.shape}; legal: [{batch}, {time}]")
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} has type {array.dtype}; legal: an integer type")
    checks.check_values(functools.partial(_check_intervals, stored), start_BT, stop_BT)


def _check_intervals(stored: int, start_BT: np.ndarray, stop_BT: np.ndarray) -> None:
    """Raises ValueError where an interval leaves the stored pairs, ends before it starts, or goes back."""
    for name, array in {"start_BT": start_BT, "stop_BT": stop_BT}.items():
        least, greatest = array.min(initial=stored), array.max(initial=0)
        if least < 0 or greatest > stored:
            raise ValueError(f"{name} holds values from {least} to {greatest}; legal: 0 to S = {stored}")
        for row, place in np.argwhere(np.diff(array.astype(np.int64), axis=1) < 0)[:1]:
            before, after = array[row, place : place + 2]
            raise ValueError(
                f"{name} goes back from {before} to {after} at row {row}, position {place + 1}; "
                "legal: values that never decrease along T"
            )
    for row, place in np.argwhere(stop_BT < start_BT)[:1]:
        raise ValueError(
            f"stop_BT is {stop_BT[row, place]} at row {row}, position {place}, where start_BT is "
            f"{start_BT[row, place]}; legal: start_BT or more (equal: an empty interval)"
        )
