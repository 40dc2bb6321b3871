"""Other makers' attention set to the work of `retrieve`, for tests and benchmarks; no model uses it.

Each peer comes in two forms. The one with `retrieve`'s arguments does the whole of its work. The other is the
attention alone, of arrays made ready for it: this is what a benchmark times, so that a peer is shown at its best. What
stays outside the clock: β folded into the queries, the shift, the block mask, and the zeros of rows that see nothing.

torch, tokamax and jla are imported inside the functions: nothing else here needs them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def scaled(query_BTHK: jax.Array, bandwidth_BTH: jax.Array) -> jax.Array:
    """β q in the queries' type: the scores of attention with a scale of 1 are then those of `retrieve`."""
    return (query_BTHK * bandwidth_BTH[..., None]).astype(query_BTHK.dtype)


def earlier(array_BTX: jax.Array, shift: int) -> jax.Array:
    """Position t + shift at t, and zeros at the end: T stays, since cuDNN's backward and block sizes want it even."""
    padding = [(0, 0), (0, shift)] + [(0, 0)] * (array_BTX.ndim - 2)
    return jnp.pad(array_BTX[:, shift:], padding)


def shifted(
    query_BTHK: jax.Array, key_BTHK: jax.Array, value_BTHV: jax.Array, bandwidth_BTH: jax.Array, shift: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scaled queries, `shift` ahead of their pairs: causal attention then shows query t + shift the pairs up to t.

    The last `shift` queries are zeros, of which nothing is used; only they see the last pairs.
    """
    return earlier(scaled(query_BTHK, bandwidth_BTH), shift), key_BTHK, value_BTHV


def unpacked_read(
    attention: Callable[..., jax.Array],
    query_BTHK: jax.Array,
    key_BTHK: jax.Array,
    value_BTHV: jax.Array,
    bandwidth_BTH: jax.Array,
    shift: int,
) -> jax.Array:
    """`retrieve` of unpacked rows by causal `attention` of scale 1: long-term with shift m, short-term with shift 1.

    The first `shift` queries see nothing and get 0.
    """
    output_BTHV = attention(*shifted(query_BTHK, key_BTHK, value_BTHV, bandwidth_BTH, shift))
    return jnp.pad(output_BTHV[:, : output_BTHV.shape[1] - shift], [(0, 0), (shift, 0), (0, 0), (0, 0)])


def attention(by: str, window: int | None = None, *, stand_in: bool = False) -> Callable[..., jax.Array]:
    """Causal attention of scale 1 over the last `window` pairs or all: (query, key, value[, document_BT]) -> output.

    Args:
      by: "cudnn" (through jax.nn), "jla" (jax-linear-attention's Mosaic kernels; rows of several documents too), "jax"
        (jax's own Mosaic kernel: forward only, no window) or "xla" (any device).
      window: pairs that a query sees, the present one among them.
      stand_in: "xla" in the place of any other, to try what stands around it without a GPU.

    Raises:
      ValueError: there is no such peer.
    """
    if by not in PEERS:
        raise ValueError(f"by is {by!r}; legal: {', '.join(PEERS)}")
    return functools.partial(PEERS["xla" if stand_in else by], window)


def _by_jax_nn(
    implementation: str,
    window: int | None,
    query_BTHK: jax.Array,
    key_BTHK: jax.Array,
    value_BTHV: jax.Array,
    document_BT: jax.Array | None = None,
) -> jax.Array:
    local = None if window is None else (window - 1, 0)  # those to the left of the present pair, without it
    mask_BHTS = None if document_BT is None else (document_BT[:, None, :, None] == document_BT[:, None, None, :])
    attention: Callable[..., Any] = jax.nn.dot_product_attention
    return attention(
        query_BTHK, key_BTHK, value_BTHV, mask=mask_BHTS, scale=1.0, is_causal=True, local_window_size=local,
        implementation=implementation,
    )  # fmt: skip


def _by_jla(
    window: int | None,
    query_BTHK: jax.Array,
    key_BTHK: jax.Array,
    value_BTHV: jax.Array,
    document_BT: jax.Array | None = None,
) -> jax.Array:
    from jla.ops.mosaic_gpu.attention import flash_attention

    return flash_attention(
        query_BTHK, key_BTHK, value_BTHV, segment_ids=document_BT, sliding_window=window, scale=1.0
    )  # fmt: skip


def _by_jax(window: int | None, query_BTHK: jax.Array, key_BTHK: jax.Array, value_BTHV: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    assert window is None
    config = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
    return attention_mgpu.attention(query_BTHK, key_BTHK, value_BTHV, config)


def dtype(by: str, *, stand_in: bool = False) -> Any:
    """What a peer takes: jax's own kernel writes float16 whatever it is given."""
    return jnp.float16 if by == "jax" and not stand_in else jnp.bfloat16


PEERS: dict[str, Callable[..., jax.Array]] = {
    "cudnn": functools.partial(_by_jax_nn, "cudnn"),
    "jla": _by_jla,
    "jax": _by_jax,
    "xla": functools.partial(_by_jax_nn, "xla"),
}


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
