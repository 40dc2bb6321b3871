"""The baselines' read: the llama transformer's attention, on the same retrieval (PAPER section 6)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mosaics_jax import dims, visibility
from mosaics_jax.config import ModelConfig
from mosaics_jax.nn import layers
from mosaics_jax.nn.cache import fill, followed, write
from mosaics_jax.nn.memory import Context, Trace
from pallas_kernels.retrieval import retrieve

_PROJECTION = (dims.WIDTH, dims.HEADS, dims.HEAD_WIDTH)


class AttentionCache(NamedTuple):
    """The pairs that decoding reads; keys are already turned."""

    key_BSHK: jax.Array
    value_BSHK: jax.Array


class Attention(nnx.Module):
    """o_t = Σ_i softmax_i(q_t·k_i / √K) v_i,  q = R_t W_q x,  k = R_t W_k x,  v = W_v x,  R the rotary encoding.

    The kind is "full" (pairs 1 .. t), "short" (t-h+1 .. t) or "long" (1 .. t-m). The long/short baseline has one
    Attention of each of the last two, with H heads and weights of its own, where a mosaic has its two memories.
    """

    def __init__(self, config: ModelConfig, kind: str, layer: jax.Array, seed: layers.Seed):
        self.config = config
        self.kind = kind
        normal = layers.truncated_normal(1 / jnp.sqrt(2.0 * config.width * (layer + 1)))
        shape = (config.width, config.heads, config.head_width)
        self.W_q = layers.parameter(seed, "W_q", shape, _PROJECTION, normal)
        self.W_k = layers.parameter(seed, "W_k", shape, _PROJECTION, normal)
        self.W_v = layers.parameter(seed, "W_v", shape, _PROJECTION, normal)

    def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Reads o_BTHK, and the number of visible pairs."""
        output_BTHK, trace = self.trace(x_BTD, context)
        return output_BTHK, {"pairs": trace.interval.count_BT.sum(dtype=jnp.float32)}

    def trace(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Trace]:
        """Reads o_BTHK, and what they are made of."""
        query_BTHK, key_BTHK, value_BTHK = self._project(x_BTD, context.position_BT)
        interval = self._interval(context)
        window = self.config.window if self.kind == "short" else None
        output_BTHK, bandwidth_BTH = self._read(query_BTHK, *context.seen(key_BTHK, value_BTHK, interval, window))
        return output_BTHK, Trace(query_BTHK, key_BTHK, value_BTHK, bandwidth_BTH, interval)

    def prefill(
        self, x_BTD: jax.Array, context: Context, length_B: jax.Array, max_length: int
    ) -> tuple[jax.Array, AttentionCache]:
        """Reads, and the cache after the rows' last position. Row b's prompt is its last `length_B[b]` positions."""
        output_BTHK, trace = self.trace(x_BTD, context)
        capacity = min(self.config.window, max_length) if self.kind == "short" else max_length
        cache = AttentionCache(
            fill(trace.key_BTHK, length_B, length_B, capacity), fill(trace.value_BTHK, length_B, length_B, capacity)
        )
        return output_BTHK, cache

    def decode(self, x_B1D: jax.Array, cache: AttentionCache, count_B: jax.Array) -> tuple[jax.Array, AttentionCache]:
        """The read of one more position, of which each row has `count_B` before it."""
        query_B1HK, key_B1HK, value_B1HK = self._project(x_B1D, count_B[:, None])
        cache = AttentionCache(
            write(cache.key_BSHK, key_B1HK[:, 0], count_B), write(cache.value_BSHK, value_B1HK[:, 0], count_B)
        )
        if self.kind == "long":
            stop_B = jnp.maximum(count_B - self.config.delay_min + 1, 0)
        else:
            stop_B = jnp.minimum(count_B + 1, cache.key_BSHK.shape[1])
        interval = visibility.Interval(jnp.zeros_like(stop_B)[:, None], stop_B[:, None])
        output_B1HK, _ = self._read(query_B1HK, cache.key_BSHK, cache.value_BSHK, interval)
        return output_B1HK, cache

    def follow(self, x_BCD: jax.Array, cache: AttentionCache, count_B: jax.Array) -> jax.Array:
        """The reads of C more positions at once, of which each row has `count_B` before them; nothing is kept."""
        position_BC = count_B[:, None] + jnp.arange(x_BCD.shape[1])
        query_BCHK, key_BCHK, value_BCHK = self._project(x_BCD, position_BC)
        key_BSHK, value_BSHK = (
            followed(stored, count_B, new)
            for stored, new in ((cache.key_BSHK, key_BCHK), (cache.value_BSHK, value_BCHK))
        )
        start_BC = jnp.zeros_like(position_BC)
        if self.kind == "short":
            start_BC = jnp.maximum(position_BC - self.config.window + 1, 0)
        last = self.config.delay_min if self.kind == "long" else 0
        stop_BC = jnp.maximum(position_BC - last + 1, 0)
        interval = visibility.Interval(start_BC, stop_BC).among((count_B - cache.key_BSHK.shape[1])[:, None])
        return self._read(query_BCHK, key_BSHK, value_BSHK, interval)[0]

    def _project(self, x_BTD: jax.Array, position_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        query_BTHK, key_BTHK, value_BTHK = (
            jnp.einsum("BTD,DHK->BTHK", x_BTD, layers.weight(stored[...], _PROJECTION, x_BTD.dtype))
            for stored in (self.W_q, self.W_k, self.W_v)
        )
        theta = self.config.rope_theta
        return rotate(query_BTHK, position_BT, theta), rotate(key_BTHK, position_BT, theta), value_BTHK

    def _interval(self, context: Context) -> visibility.Interval:
        if self.kind == "long":
            return visibility.long_term(context.document_start_BT, context.delay, context.first)
        window = self.config.window if self.kind == "short" else None
        return visibility.causal(context.document_start_BT, window, context.first)

    def _read(
        self, query_BTHK: jax.Array, key_BSHK: jax.Array, value_BSHK: jax.Array, interval: visibility.Interval
    ) -> tuple[jax.Array, jax.Array]:
        bandwidth_BTH = jnp.full(query_BTHK.shape[:3], self.config.head_width**-0.5, jnp.float32)
        output_BTHK = retrieve(
            query_BTHK, key_BSHK, value_BSHK, bandwidth_BTH, interval.start_BT, interval.stop_BT,
            implementation=self.config.operation_path,
        )  # fmt: skip
        return output_BTHK, bandwidth_BTH


def rotate(x_BTHK: jax.Array, position_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position encoding: the pair (x_i, x_{i+K/2}) is turned by position · theta^(-2i/K), in float32."""
    half = x_BTHK.shape[-1] // 2
    frequency_K = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1K = (position_BT.astype(jnp.float32)[..., None] * frequency_K)[:, :, None]
    cos_BT1K, sin_BT1K = jnp.cos(angle_BT1K), jnp.sin(angle_BT1K)
    first_BTHK, second_BTHK = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    turned_BTHK = jnp.concatenate(
        [first_BTHK * cos_BT1K - second_BTHK * sin_BT1K, second_BTHK * cos_BT1K + first_BTHK * sin_BT1K], axis=-1
    )
    return turned_BTHK.astype(x_BTHK.dtype)
