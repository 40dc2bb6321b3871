"""The persistent memory: what training writes into weights, read by a feed-forward layer (PAPER section 4)."""

import jax
import jax.numpy as jnp
from flax import nnx

from mosaics_jax import dims
from mosaics_jax.config import ModelConfig
from mosaics_jax.nn import layers

_INNER = (dims.WIDTH, dims.FFN)


class PersistentMemory(nnx.Module):
    """y = W_2 (SiLU(W_1 x) * W_3 x), the SwiGLU feed-forward."""

    def __init__(self, config: ModelConfig, layer: jax.Array, seed: layers.Seed):
        inner = layers.truncated_normal(1 / jnp.sqrt(2.0 * config.width * (layer + 1)))
        outer = layers.truncated_normal(1 / jnp.sqrt(2.0 * config.ffn_width * (layer + 1)))
        shape = (config.width, config.ffn_width)
        self.W_1 = layers.parameter(seed, "W_1", shape, _INNER, inner)
        self.W_3 = layers.parameter(seed, "W_3", shape, _INNER, inner)
        self.W_2 = layers.parameter(seed, "W_2", shape[::-1], _INNER[::-1], outer)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dtype = x_BTD.dtype
        gate_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, layers.weight(self.W_1[...], _INNER, dtype))
        linear_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, layers.weight(self.W_3[...], _INNER, dtype))
        outer_FD = layers.weight(self.W_2[...], _INNER[::-1], dtype)
        return jnp.einsum("BTF,FD->BTD", jax.nn.silu(gate_BTF) * linear_BTF, outer_FD)
