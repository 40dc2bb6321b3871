"""Other makers' attention set to the work of `retrieve`, for tests and benchmarks; no model uses it.

Each peer comes in two forms. The one with `retrieve`'s arguments does the whole of its work. The other is the
attention alone, of arrays made ready for it: this is what a benchmark times, so that a peer is shown at its best. What
stays outside the clock: β folded into the queries, the shift, the block mask, and the zeros of rows that see nothing.

torch and tokamax are imported inside the functions: nothing else here needs them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def scaled(query_BTHK: jax.Array, bandwidth_BTH: jax.Array) -> jax.Array:
    """β q in the queries' type: the scores of attention with a scale of 1 are then those of `retrieve`."""
    return (query_BTHK * bandwidth_BTH[..., None]).astype(query_BTHK.dtype)


def shifted(
    query_BTHK: jax.Array, key_BTHK: jax.Array, value_BTHV: jax.Array, bandwidth_BTH: jax.Array, shift: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scaled queries from position `shift` on, and all but the last `shift` pairs: query i may then see pair i."""
    return scaled(query_BTHK, bandwidth_BTH)[:, shift:], key_BTHK[:, :-shift], value_BTHV[:, :-shift]


def shifted_attention(
    query_BTHK: jax.Array,
    key_BTHK: jax.Array,
    value_BTHV: jax.Array,
    pairs: int | None = None,
    *,
    implementation: str = "cudnn",
) -> jax.Array:
    """Causal attention of scale 1, of the last `pairs` pairs or of all; "cudnn", or "xla" on any device."""
    window = None if pairs is None else (pairs - 1, 0)  # those to the left of pair i, without it
    attention: Callable[..., Any] = jax.nn.dot_product_attention
    return attention(
        query_BTHK, key_BTHK, value_BTHV, scale=1.0, is_causal=True, local_window_size=window,
        implementation=implementation,
    )  # fmt: skip


def cudnn_long_term(
    query_BTHK: jax.Array,
    key_BTHK: jax.Array,
    value_BTHV: jax.Array,
    bandwidth_BTH: jax.Array,
    delay: int,
    *,
    implementation: str = "cudnn",
) -> jax.Array:
    """The long-term read of unpacked rows, pairs 0 .. t-m with m = `delay` < T: causal once the queries are m ahead."""
    arrays = shifted(query_BTHK, key_BTHK, value_BTHV, bandwidth_BTH, delay)
    return _zeros_first(shifted_attention(*arrays, implementation=implementation), delay)


def cudnn_short_term(
    query_BTHK: jax.Array,
    key_BTHK: jax.Array,
    value_BTHV: jax.Array,
    bandwidth_BTH: jax.Array,
    window: int,
    *,
    implementation: str = "cudnn",
) -> jax.Array:
    """The short-term read of unpacked rows, pairs t-h+1 .. t-1 with h = `window`: the last h-1, after a shift of 1."""
    arrays = shifted(query_BTHK, key_BTHK, value_BTHV, bandwidth_BTH, 1)
    return _zeros_first(shifted_attention(*arrays, window - 1, implementation=implementation), 1)


def _zeros_first(output_BTHV: jax.Array, rows: int) -> jax.Array:
    """The first queries, which see nothing."""
    return jnp.pad(output_BTHV, [(0, 0), (rows, 0), (0, 0), (0, 0)])


def tokamax_attention(
    query_BTHK: jax.Array,
    key_BSHK: jax.Array,
    value_BSHV: jax.Array,
    start_BT: jax.Array,
    stop_BT: jax.Array,
    *,
    implementation: str = "mosaic_gpu",
) -> jax.Array:
    """tokamax's attention of scale 1 over intervals; a row that sees nothing holds anything.

    Its public function takes no intervals, hence the private names, which are those of tokamax 0.0.17.
    `implementation`: "mosaic_gpu", or "xla" anywhere.
    """
    from tokamax._src.ops.attention import api, base

    mask = base.Mask(k_start=start_BT[:, None], k_end=stop_BT[:, None])  # one interval for all heads
    return api.IMPLEMENTATIONS[implementation](query_BTHK, key_BSHK, value_BSHV, mask=mask, logits_scale=1.0)


def tokamax(
    query_BTHK: jax.Array,
    key_BSHK: jax.Array,
    value_BSHV: jax.Array,
    bandwidth_BTH: jax.Array,
    start_BT: jax.Array,
    stop_BT: jax.Array,
    *,
    implementation: str = "mosaic_gpu",
) -> jax.Array:
    """`retrieve` by tokamax, packed rows too."""
    query_BTHK = scaled(query_BTHK, bandwidth_BTH)
    output_BTHV = tokamax_attention(query_BTHK, key_BSHK, value_BSHV, start_BT, stop_BT, implementation=implementation)
    return jnp.where((start_BT < stop_BT)[..., None, None], output_BTHV, 0)


def flex_attention(
    bandwidth_BHT: Any, start_BT: Any, stop_BT: Any, stored: int, *, compiled: bool = True
) -> Callable[[Any, Any, Any], Any]:
    """`retrieve` by PyTorch's FlexAttention, packed rows too, as a function of query_BHTK, key_BHSK and value_BHSV.

    All are torch tensors, and the time stands behind the heads, as FlexAttention wants it. The block mask is made here,
    once. Rows that see nothing give 0. No gradient reaches the bandwidth: to send it there costs the peer time.
    """
    import torch
    from torch.nn.attention import flex_attention as flex

    def visible(batch: Any, head: Any, query: Any, pair: Any) -> Any:
        return (start_BT[batch, query] <= pair) & (pair < stop_BT[batch, query])

    def score(product: Any, batch: Any, head: Any, query: Any, pair: Any) -> Any:
        return product * bandwidth_BHT[batch, head, query]

    batch, time = start_BT.shape
    block_mask = flex.create_block_mask(visible, batch, None, time, stored, device=start_BT.device)
    # Each shape is compiled for itself: a kernel of dynamic shapes is slower.
    attention: Any = torch.compile(flex.flex_attention, dynamic=False) if compiled else flex.flex_attention

    def read(query_BHTK: Any, key_BHSK: Any, value_BHSV: Any) -> Any:
        return attention(query_BHTK, key_BHSK, value_BHSV, score_mod=score, block_mask=block_mask, scale=1.0)

    return read
