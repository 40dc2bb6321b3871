"""What a memory stores: the extractors of keys and values (PAPER section 3, eq. 8-9).

Our symbols are the paper's; a bar is written `average`, a tilde `raw`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mosaics_jax import dims
from mosaics_jax.config import ModelConfig
from mosaics_jax.nn import layers
from pallas_kernels.leaky_average import LeakyState, leaky_average


class Keys(NamedTuple):
    """Unit keys, the state the recurrence ends in, and the log gates and log decays that made them."""

    key_BTHK: jax.Array
    state: LeakyState
    log_gate_BTH: jax.Array
    log_decay_BTH: jax.Array


class KeyExtractor(nnx.Module):
    """k_t = Norm(k̄_t),  k̄_t = g_t k̃_t + λ_t k̄_{t-1},  k̃ = W_φ x,  g = exp(W_g x),  λ = exp(-|W_λ x|).

    g and λ are one scalar per head and position; k̄ restarts at 0 before a document's first token.
    """

    def __init__(self, config: ModelConfig, layer: jax.Array, seed: layers.Seed):
        normal = layers.truncated_normal(1 / jnp.sqrt(2.0 * config.width * (layer + 1)))
        shape = (config.width, config.heads, config.head_width)
        self.config = config
        self.W_phi = layers.parameter(seed, "W_phi", shape, (dims.WIDTH, dims.HEADS, dims.HEAD_WIDTH), normal)
        self.W_g = layers.parameter(seed, "W_g", shape[:2], (dims.WIDTH, dims.HEADS), normal)
        self.W_lambda = layers.parameter(seed, "W_lambda", shape[:2], (dims.WIDTH, dims.HEADS), normal)

    def __call__(self, x_BTD: jax.Array, restart_BT: jax.Array, initial: LeakyState | None = None) -> Keys:
        dtype = x_BTD.dtype
        raw_BTHK = jnp.einsum("BTD,DHK->BTHK", x_BTD, self.W_phi[...].astype(dtype))
        # One matmul for both; they are exponentiated, so they leave it in float32.
        slopes_DXH = jnp.stack([self.W_g[...], self.W_lambda[...]], axis=1).astype(dtype)
        slope_BTXH = jnp.einsum("BTD,DXH->BTXH", x_BTD, slopes_DXH, preferred_element_type=jnp.float32)
        log_gate_BTH, log_decay_BTH = slope_BTXH[:, :, 0], -jnp.abs(slope_BTXH[:, :, 1])
        key_BTHK, state = leaky_average(
            raw_BTHK, log_gate_BTH, log_decay_BTH, restart_BT, initial,
            implementation=self.config.operation_path,
        )  # fmt: skip
        return Keys(key_BTHK, state, log_gate_BTH, log_decay_BTH)


class ValueExtractor(nnx.Module):
    """v_t = α_ψ Norm(v̄_t),  v̄_t = γ ṽ_t + (1-γ) ṽ_{t+1},  ṽ = W_ψ x,  α_ψ = exp(min(|θ|, 15)).

    γ and α_ψ are one scalar per head. A value looks one token ahead: the pair of t is complete at t+1, and no read
    reaches it earlier. ṽ_{t+1} is 0 at a document's last token.
    """

    def __init__(self, config: ModelConfig, layer: jax.Array, seed: layers.Seed):
        normal = layers.truncated_normal(1 / jnp.sqrt(2.0 * config.width * (layer + 1)))
        shape = (config.width, config.heads, config.head_width)
        self.W_psi = layers.parameter(seed, "W_psi", shape, (dims.WIDTH, dims.HEADS, dims.HEAD_WIDTH), normal)
        self.gamma = layers.parameter(seed, "gamma", (config.heads,), (dims.HEADS,), layers.uniform)
        self.theta_psi = layers.parameter(seed, "theta_psi", (config.heads,), (dims.HEADS,), layers.constant(0.0))

    def raw(self, x_BTD: jax.Array) -> jax.Array:
        """ṽ_BTHK."""
        return jnp.einsum("BTD,DHK->BTHK", x_BTD, self.W_psi[...].astype(x_BTD.dtype))

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
    follows_BT = document_start_BT[:, 1:] == document_start_BT[:, :-1]
    follows_BT11 = jnp.pad(follows_BT, [(0, 0), (0, 1)])[..., None, None]
    shifted_BTHK = jnp.pad(raw_BTHK[:, 1:], [(0, 0), (0, 1), (0, 0), (0, 0)])
    return jnp.where(follows_BT11, shifted_BTHK, jnp.zeros_like(raw_BTHK))
