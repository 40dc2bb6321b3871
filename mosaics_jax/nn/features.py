"""What a memory stores: the extractors of keys and values (PAPER section 3, eq. 8-9).

Our symbols are the paper's; a bar is written `average`, a tilde `raw`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mosaics_jax import collectives, dims
from mosaics_jax.config import ModelConfig
from mosaics_jax.nn import layers
from pallas_kernels.leaky_average import LeakyState, leaky_average
from pallas_kernels.leaky_average.reference import finite_gauge

_PROJECTION = (dims.WIDTH, dims.HEADS, dims.HEAD_WIDTH)


class Keys(NamedTuple):
    """Unit keys, the state the recurrence ends in, and the log gates and log decays that made them."""

    key_BTHK: jax.Array
    state: LeakyState
    log_gate_BTH: jax.Array
    log_decay_BTH: jax.Array


class KeyExtractor(nnx.Module):
    """k_t = Norm(k̄_t),  k̄_t = g_t k̃_t + λ_t k̄_{t-1},  k̃ = W_φ x,  g = exp(W_g x),  λ = exp(-|W_λ x|).

    g and λ are one scalar per head and position; k̄ restarts at 0 before a document's first token.

    With `model.key_extractor` = leaky, Memory Mosaics v1's: λ = exp(-|θ|), one scalar per head, and g = 1, since Norm
    takes out any other constant. θ is drawn as W_λ x is distributed at the start.
    """

    def __init__(self, config: ModelConfig, layer: jax.Array, seed: layers.Seed):
        normal = layers.truncated_normal(1 / jnp.sqrt(2.0 * config.width * (layer + 1)))
        shape = (config.width, config.heads, config.head_width)
        self.config = config
        self.W_phi = layers.parameter(seed, "W_phi", shape, _PROJECTION, normal)
        if config.key_extractor == "leaky":
            spread = layers.truncated_normal(1 / jnp.sqrt(2.0 * (layer + 1)))
            self.theta_lambda = layers.parameter(seed, "theta_lambda", (config.heads,), (dims.HEADS,), spread)
        else:
            self.W_g = layers.parameter(seed, "W_g", shape[:2], (dims.WIDTH, dims.HEADS), normal)
            self.W_lambda = layers.parameter(seed, "W_lambda", shape[:2], (dims.WIDTH, dims.HEADS), normal)

    def __call__(self, x_BTD: jax.Array, restart_BT: jax.Array, initial: LeakyState | None = None) -> Keys:
        dtype = x_BTD.dtype
        raw_BTHK = jnp.einsum("BTD,DHK->BTHK", x_BTD, layers.weight(self.W_phi[...], _PROJECTION, dtype))
        log_gate_BTH, log_decay_BTH = self._gates(x_BTD)
        if initial is None:
            initial = _state_before(raw_BTHK, log_gate_BTH, log_decay_BTH, restart_BT)
        key_BTHK, state = leaky_average(
            raw_BTHK, log_gate_BTH, log_decay_BTH, restart_BT, initial,
            implementation=self.config.operation_path,
        )  # fmt: skip
        return Keys(key_BTHK, state, log_gate_BTH, log_decay_BTH)

    def _gates(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """log g_BTH and log λ_BTH in float32."""
        if self.config.key_extractor == "leaky":
            log_decay_H = -jnp.abs(self.theta_lambda[...])
            log_decay_BTH = jnp.broadcast_to(log_decay_H, (*x_BTD.shape[:2], *log_decay_H.shape))
            return jnp.zeros_like(log_decay_BTH), log_decay_BTH
        # One matmul for both; they are exponentiated, so they leave it in float32.
        stored_DXH = jnp.stack([self.W_g[...], self.W_lambda[...]], axis=1)
        slopes_DXH = layers.weight(stored_DXH, (dims.WIDTH, dims.MEMORY, dims.HEADS), x_BTD.dtype)
        slope_BTXH = jnp.einsum("BTD,DXH->BTXH", x_BTD, slopes_DXH, preferred_element_type=jnp.float32)
        return slope_BTXH[:, :, 0], -jnp.abs(slope_BTXH[:, :, 1])


class ValueExtractor(nnx.Module):
    """v_t = α_ψ Norm(v̄_t),  v̄_t = γ ṽ_t + (1-γ) ṽ_{t+1},  ṽ = W_ψ x,  α_ψ = exp(min(|θ|, 15)).

    γ and α_ψ are one scalar per head. A value looks one token ahead: the pair of t is complete at t+1, and no read
    reaches it earlier. ṽ_{t+1} is 0 at a document's last token.
    """

    def __init__(self, config: ModelConfig, layer: jax.Array, seed: layers.Seed):
        normal = layers.truncated_normal(1 / jnp.sqrt(2.0 * config.width * (layer + 1)))
        shape = (config.width, config.heads, config.head_width)
        self.W_psi = layers.parameter(seed, "W_psi", shape, _PROJECTION, normal)
        self.gamma = layers.parameter(seed, "gamma", (config.heads,), (dims.HEADS,), layers.uniform)
        self.theta_psi = layers.parameter(seed, "theta_psi", (config.heads,), (dims.HEADS,), layers.constant(0.0))

    def raw(self, x_BTD: jax.Array) -> jax.Array:
        """ṽ_BTHK."""
        return jnp.einsum("BTD,DHK->BTHK", x_BTD, layers.weight(self.W_psi[...], _PROJECTION, x_BTD.dtype))

    def values(self, raw_BTHK: jax.Array, document_start_BT: jax.Array) -> jax.Array:
        """v_BTHK of whole rows. Backward keeps ṽ alone and makes the rest again: it is a few operations a number."""
        return jax.checkpoint(lambda raw_BTHK: self.mix(raw_BTHK, next_in_document(raw_BTHK, document_start_BT)))(
            raw_BTHK
        )

    def mix(self, raw_BTHK: jax.Array, next_raw_BTHK: jax.Array) -> jax.Array:
        """v_BTHK from ṽ_t and ṽ_{t+1}."""
        gamma_H1 = self.gamma[...][:, None]
        scale_H1 = jnp.exp(jnp.minimum(layers.absolute(self.theta_psi[...]), 15.0))[:, None]
        average_BTHK = gamma_H1 * raw_BTHK + (1 - gamma_H1) * next_raw_BTHK
        return (scale_H1 * layers.unit_norm(average_BTHK)).astype(raw_BTHK.dtype)


def next_in_document(raw_BTHK: jax.Array, document_start_BT: jax.Array) -> jax.Array:
    """The successor of every position inside its document; 0 after the last."""
    number_BT = document_start_BT + 1  # never 0, which stands after the row's end
    follows_BT11 = (collectives.successor(number_BT) == number_BT)[..., None, None]
    return jnp.where(follows_BT11, collectives.successor(raw_BTHK), jnp.zeros_like(raw_BTHK))


def _state_before(
    raw_BTHK: jax.Array, log_gate_BTH: jax.Array, log_decay_BTH: jax.Array, restart_BT: jax.Array
) -> LeakyState | None:
    """The recurrence's state at the start of this device's stretch of time; None where that is the row's start.

    What a stretch adds to the state at its end is one sum, and what it leaves of the state before it one product. Each
    device gets those of all stretches, one K-vector a head, and runs through the ones before its own.
    """
    if collectives.size(dims.SEQUENCE) == 1:
        return None
    decay_BTH = jnp.where(restart_BT[..., None], -jnp.inf, log_decay_BTH)
    # The decays after each position up to the end, as sums: differences of sums would lose a small λ, and λ = 0.
    later_BTH = jax.lax.cumsum(decay_BTH[:, 1:], axis=1, reverse=True)
    weight_BTH = log_gate_BTH + jnp.pad(later_BTH, [(0, 0), (0, 1), (0, 0)])
    scale_BH = jax.lax.stop_gradient(weight_BTH.max(1))  # of no effect on the state, average · exp(scale)
    share_BTH = jnp.exp(weight_BTH - finite_gauge(scale_BH)[:, None])
    average_BHK = (share_BTH[..., None] * raw_BTHK.astype(jnp.float32)).sum(1)
    averages, scales, throughs = map(collectives.every_stretch, (average_BHK, scale_BH, decay_BTH.sum(1)))
    state = LeakyState(jnp.zeros_like(average_BHK), jnp.full_like(scale_BH, -jnp.inf))
    for stretch in range(averages.shape[0] - 1):
        left_BH = state.log_scale_BH + throughs[stretch]
        top_BH = jax.lax.stop_gradient(jnp.maximum(left_BH, scales[stretch]))
        kept_BH, added_BH = (jnp.exp(part_BH - finite_gauge(top_BH)) for part_BH in (left_BH, scales[stretch]))
        average_BHK = kept_BH[..., None] * state.average_BHK + added_BH[..., None] * averages[stretch]
        before = stretch < collectives.index(dims.SEQUENCE)
        state = LeakyState(*(jnp.where(before, *pair) for pair in zip((average_BHK, top_BH), state, strict=True)))
    return state
