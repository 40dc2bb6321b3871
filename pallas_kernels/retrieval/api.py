"""`retrieve`: the one read operation of every memory, with its checks and the choice of its implementation."""

import logging
from collections.abc import Callable
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.retrieval.blockwise import retrieve_blockwise
from pallas_kernels.retrieval.reference import retrieve_reference

_IMPLEMENTATIONS: Final[dict[str, Callable[..., jax.Array]]] = {
    "xla": retrieve_blockwise,
    "reference": retrieve_reference,
}

_logger = logging.getLogger(__name__)
_logged = False


def retrieve(
    query_BTHK: jax.Array,
    key_BSHK: jax.Array,
    value_BSHV: jax.Array,
    bandwidth_BTH: jax.Array,
    start_BT: jax.Array,
    stop_BT: jax.Array,
    *,
    implementation: str | None = None,
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
      start_BT: first visible stored position of each query, integer in [0, S].
      stop_BT: the position after the last visible one, integer in [0, S]; stop <= start is an empty interval. The same
        interval serves all heads. Cost is proportional to what the intervals of neighbouring queries span, so
        intervals that never decrease along T (all of this project's) skip the most.
      implementation: "xla" (blockwise, memory linear in T, own derivative) or "reference" (dense); None picks, and
        logs once what it picked.

    Returns:
      output_BTHV in the values' type. Differentiable in query, key, value and bandwidth.

    Raises:
      ValueError: an argument of the wrong shape or type, an unknown implementation, or (where the intervals are
        concrete, that is outside jit) an interval that leaves [0, S].
    """
    _check(query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH, start_BT, stop_BT)
    start_BT, stop_BT = start_BT.astype(jnp.int32), stop_BT.astype(jnp.int32)
    return _choose(implementation)(query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH, start_BT, stop_BT)


def _choose(implementation: str | None) -> Callable[..., jax.Array]:
    global _logged
    if implementation is None:
        implementation = "xla"
        if not _logged:
            _logger.info("retrieve runs the blockwise XLA path on %s", jax.default_backend())
            _logged = True
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; legal: None, {', '.join(map(repr, _IMPLEMENTATIONS))}")
    return _IMPLEMENTATIONS[implementation]


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
        if not isinstance(array, jax.core.Tracer) and array.size:
            values = np.asarray(array)  # NumPy: jax would trace the comparison inside jit
            least, greatest = values.min(), values.max()
            if not 0 <= least <= greatest <= stored:
                raise ValueError(f"{name} holds values from {least} to {greatest}; legal: 0 to S = {stored}")
