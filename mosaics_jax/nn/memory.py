"""The associative memory: keys and values of the past, read by the present key (PAPER section 2)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mosaics_jax import collectives, dims, visibility
from mosaics_jax.config import ModelConfig
from mosaics_jax.nn import layers
from mosaics_jax.nn.cache import fill, followed, write
from mosaics_jax.nn.features import KeyExtractor, Keys, ValueExtractor
from pallas_kernels.leaky_average import LeakyState
from pallas_kernels.retrieval import retrieve


class Context(NamedTuple):
    """What the memories of a row need to know beside activations: where documents start, and the delay m."""

    document_start_BT: jax.Array
    delay: jax.Array | int
    first: jax.Array | int = 0  # where in the row the positions here begin

    @property
    def position_BT(self) -> jax.Array:
        """Index inside the document, from 0."""
        time = self.document_start_BT.shape[1]
        return self.first + jnp.arange(time, dtype=jnp.int32) - self.document_start_BT

    def seen(
        self, key_BTHK: jax.Array, value_BTHK: jax.Array, interval: visibility.Interval, window: int | None
    ) -> tuple[jax.Array, jax.Array, visibility.Interval]:
        """The stored pairs that the positions here may see, also those of other devices, and the interval among them.

        Without a window these are the whole row's; with one, `window` - 1 before the first position here are enough.
        """
        if window is None:
            return collectives.whole_time(key_BTHK), collectives.whole_time(value_BTHK), interval
        key_BSHK, value_BSHK = (collectives.with_preceding(array, window - 1) for array in (key_BTHK, value_BTHK))
        before = key_BSHK.shape[1] - key_BTHK.shape[1]
        return key_BSHK, value_BSHK, interval.among(self.first - before)


class Trace(NamedTuple):
    """What the reads of some positions are made of. Gates and decays are None where keys are not averages."""

    query_BTHK: jax.Array
    key_BTHK: jax.Array
    value_BTHK: jax.Array
    bandwidth_BTH: jax.Array
    interval: visibility.Interval
    log_gate_BTH: jax.Array | None = None
    log_decay_BTH: jax.Array | None = None


class MemoryCache(NamedTuple):
    """A memory while decoding: its complete pairs, and the last pair, whose value waits for the next token."""

    key_BSHK: jax.Array
    value_BSHK: jax.Array
    pending_key_BHK: jax.Array
    pending_raw_value_BHK: jax.Array
    state: LeakyState


class Bandwidth(nnx.Module):
    """β = β1 n^α + β0 with n the number of visible pairs; β0, β1 = exp(min(θ, 10)), α = min(|θ|, 1), one per head.

    With `model.bandwidth` = fixed, β = β0, which starts where the adaptive one does for a full window.
    """

    def __init__(self, config: ModelConfig, seed: layers.Seed):
        def per_head(name: str, value: float) -> nnx.Param:
            return layers.parameter(seed, name, (config.heads,), (dims.HEADS,), layers.constant(value))

        self.config = config
        if config.bandwidth == "fixed":
            self.theta_beta0 = per_head("theta_beta0", 1.5 + math.log(1 + (config.window - 1) ** (1 / 3)))
            return
        self.theta_beta0 = per_head("theta_beta0", 1.5)
        self.theta_beta1 = per_head("theta_beta1", 1.5)
        self.theta_alpha = per_head("theta_alpha", 1 / 3)

    def __call__(self, count_BT: jax.Array) -> jax.Array:
        beta0_H = jnp.exp(jnp.minimum(self.theta_beta0[...], 10.0))
        if self.config.bandwidth == "fixed":
            return jnp.broadcast_to(beta0_H, (*count_BT.shape, *beta0_H.shape))
        beta1_H = jnp.exp(jnp.minimum(self.theta_beta1[...], 10.0))
        alpha_H = jnp.minimum(layers.absolute(self.theta_alpha[...]), 1.0)
        # A read of nothing returns 0 whatever its bandwidth; n = 1 there keeps log 0 out of the derivative.
        count_BT1 = jnp.maximum(count_BT, 1).astype(jnp.float32)[..., None]
        return beta1_H * count_BT1**alpha_H + beta0_H


class AssociativeMemory(nnx.Module):
    """o_t = Σ_i w_i v_i over the visible pairs i, w_i ∝ exp(β k_t·k_i). The query is the key of the present position.

    The kind is "short" (pairs t-h+1 .. t-1) or "long" (pairs 1 .. t-m).
    """

    def __init__(self, config: ModelConfig, kind: str, layer: jax.Array, seed: layers.Seed):
        self.config = config
        self.kind = kind
        self.key = KeyExtractor(config, layer, seed)
        self.value = ValueExtractor(config, layer, seed)
        self.bandwidth = Bandwidth(config, seed)

    def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Reads o_BTHK, and the memory's health: visible pairs, and least, mean, greatest gate, decay, bandwidth."""
        output_BTHK, trace, keys, _ = self._read_rows(x_BTD, context)
        health = {
            "pairs": trace.interval.count_BT.sum(dtype=jnp.float32),
            "log_gate": _range(keys.log_gate_BTH),
            "decay": _range(jnp.exp(keys.log_decay_BTH)),
            "bandwidth": _range(trace.bandwidth_BTH),
        }
        return output_BTHK, health

    def trace(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Trace]:
        """Reads o_BTHK, and what they are made of."""
        output_BTHK, trace, _, _ = self._read_rows(x_BTD, context)
        return output_BTHK, trace

    def prefill(
        self, x_BTD: jax.Array, context: Context, length_B: jax.Array, max_length: int
    ) -> tuple[jax.Array, MemoryCache]:
        """Reads, and the cache after the rows' last position. Row b's prompt is its last `length_B[b]` positions."""
        output_BTHK, trace, keys, raw_BTHK = self._read_rows(x_BTD, context)
        capacity = self._capacity(max_length)
        cache = MemoryCache(
            fill(keys.key_BTHK, length_B, length_B - 1, capacity),
            fill(trace.value_BTHK, length_B, length_B - 1, capacity),
            keys.key_BTHK[:, -1], raw_BTHK[:, -1], keys.state,
        )  # fmt: skip
        return output_BTHK, cache

    def decode(self, x_B1D: jax.Array, cache: MemoryCache, count_B: jax.Array) -> tuple[jax.Array, MemoryCache]:
        """The read of one more position, of which each row has `count_B` >= 1 before it."""
        keys = self.key(x_B1D, jnp.zeros(x_B1D.shape[:2], bool), cache.state)
        raw_B1HK = self.value.raw(x_B1D)
        value_B1HK = self.value.mix(cache.pending_raw_value_BHK[:, None], raw_B1HK)
        key_BSHK = write(cache.key_BSHK, cache.pending_key_BHK, count_B - 1)
        value_BSHK = write(cache.value_BSHK, value_B1HK[:, 0], count_B - 1)
        if self.kind == "short":  # a ring of the h-1 visible pairs: their order does not matter
            stop_B = jnp.minimum(count_B, self.config.window - 1)
        else:
            stop_B = jnp.maximum(count_B - self.config.delay_min + 1, 0)
        interval = visibility.Interval(jnp.zeros_like(stop_B)[:, None], stop_B[:, None])
        output_B1HK, _ = self._read(keys.key_BTHK, key_BSHK, value_BSHK, interval)
        return output_B1HK, MemoryCache(key_BSHK, value_BSHK, keys.key_BTHK[:, 0], raw_B1HK[:, 0], keys.state)

    def follow(self, x_BCD: jax.Array, cache: MemoryCache, count_B: jax.Array) -> jax.Array:
        """The reads of C more positions at once, of which each row has `count_B` >= 1 before them; nothing is kept."""
        keys = self.key(x_BCD, jnp.zeros(x_BCD.shape[:2], bool), cache.state)
        raw_BCHK = self.value.raw(x_BCD)
        # Each position completes the pair before it.
        before_BCHK = jnp.concatenate([cache.pending_raw_value_BHK[:, None], raw_BCHK[:, :-1]], axis=1)
        new_key_BCHK = jnp.concatenate([cache.pending_key_BHK[:, None], keys.key_BTHK[:, :-1]], axis=1)
        key_BSHK = followed(cache.key_BSHK, count_B - 1, new_key_BCHK)
        value_BSHK = followed(cache.value_BSHK, count_B - 1, self.value.mix(before_BCHK, raw_BCHK))
        position_BC = count_B[:, None] + jnp.arange(x_BCD.shape[1])
        if self.kind == "short":
            start_BC, stop_BC = jnp.maximum(position_BC - self.config.window + 1, 0), position_BC
        else:
            start_BC = jnp.zeros_like(position_BC)
            stop_BC = jnp.maximum(position_BC - self.config.delay_min + 1, 0)
        first_B1 = (count_B - 1 - cache.key_BSHK.shape[1])[:, None]
        interval = visibility.Interval(start_BC, stop_BC).among(first_B1)
        return self._read(keys.key_BTHK, key_BSHK, value_BSHK, interval)[0]

    def _capacity(self, max_length: int) -> int:
        return min(self.config.window - 1, max_length) if self.kind == "short" else max_length

    def _interval(self, context: Context) -> visibility.Interval:
        if self.kind == "short":
            return visibility.short_term(context.document_start_BT, self.config.window, context.first)
        return visibility.long_term(context.document_start_BT, context.delay, context.first)

    def _read_rows(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Trace, Keys, jax.Array]:
        """The reads o_BTHK, what they are made of, and what decoding goes on from: the keys, and ṽ_BTHK."""
        keys = self.key(x_BTD, context.position_BT == 0)
        raw_BTHK = self.value.raw(x_BTD)
        value_BTHK = self.value.values(raw_BTHK, context.document_start_BT)
        interval = self._interval(context)
        window = self.config.window if self.kind == "short" else None
        output_BTHK, bandwidth_BTH = self._read(
            keys.key_BTHK, *context.seen(keys.key_BTHK, value_BTHK, interval, window)
        )
        trace = Trace(
            keys.key_BTHK, keys.key_BTHK, value_BTHK, bandwidth_BTH, interval, keys.log_gate_BTH, keys.log_decay_BTH
        )
        return output_BTHK, trace, keys, raw_BTHK

    def _read(
        self, query_BTHK: jax.Array, key_BSHK: jax.Array, value_BSHK: jax.Array, interval: visibility.Interval
    ) -> tuple[jax.Array, jax.Array]:
        bandwidth_BTH = self.bandwidth(interval.count_BT)
        output_BTHK = retrieve(
            query_BTHK, key_BSHK, value_BSHK, bandwidth_BTH, interval.start_BT, interval.stop_BT,
            implementation=self.config.operation_path, unit_norm=True,
        )  # fmt: skip
        return output_BTHK, bandwidth_BTH


def _range(values_BTH: jax.Array) -> jax.Array:
    """[least, mean, greatest]; numbers to look at, so no gradient flows through them."""
    values_BTH = jax.lax.stop_gradient(values_BTH)
    return jnp.stack([values_BTH.min(), values_BTH.mean(), values_BTH.max()])
