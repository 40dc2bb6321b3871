"""What every module is made of: parameters with names for their axes, norms, and stacking over depth."""

import dataclasses
import hashlib
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from mosaics_jax import collectives, dims

Initializer = Callable[["Seed", tuple[int, ...]], jax.Array]


@dataclasses.dataclass(frozen=True)
class Seed:
    """Where the randomness of one place in the model comes from: a run's seed and the path of names that led here.

    Keyed by name, so that adding a parameter does not disturb the others; hashed on the host, so that a program that
    makes weights compiles no hashing. Inside `stack` the place also has a layer, which is traced.
    """

    seed: int
    path: str = ""
    layer: jax.Array | None = None
    layers: int = 0

    def fold(self, name: str) -> "Seed":
        return dataclasses.replace(self, path=f"{self.path}/{name}")

    def key(self) -> jax.Array:
        """The random key of this place, in this layer if it has one."""
        if self.layer is None:
            return jax.random.wrap_key_data(jnp.asarray(self._words("")))
        table_L2 = np.stack([self._words(f"/{layer}") for layer in range(self.layers)])
        return jax.random.wrap_key_data(jnp.asarray(table_L2)[self.layer])

    def _words(self, suffix: str) -> np.ndarray:
        digest = hashlib.sha256(f"{operator.index(self.seed)}{self.path}{suffix}".encode()).digest()
        return np.frombuffer(digest[:8], np.uint32)


def parameter(
    seed: Seed, name: str, shape: tuple[int, ...], axes: tuple[str, ...], initializer: Initializer
) -> nnx.Param:
    """A float32 parameter whose dimensions mean `axes` (logical axes of dims.py)."""
    assert len(shape) == len(axes), (name, shape, axes)
    return nnx.Param(initializer(seed.fold(name), shape), axes=axes)


def weight(parameters: jax.Array, axes: tuple[str, ...], dtype: DTypeLike) -> jax.Array:
    """A weight as it is used: in the type of compute, whole along its model width. `axes` are its logical axes."""
    return collectives.gathered(parameters, axes.index(dims.WIDTH), dtype)


def truncated_normal(scale: jax.Array | float) -> Initializer:
    """scale · z, with z standard normal cut at ±3 (the scale is that of the uncut normal; PAPER section 5)."""
    return lambda seed, shape: scale * jax.random.truncated_normal(seed.key(), -3.0, 3.0, shape, jnp.float32)


def constant(value: float) -> Initializer:
    return lambda seed, shape: jnp.full(shape, value, jnp.float32)


def uniform(seed: Seed, shape: tuple[int, ...]) -> jax.Array:
    """U(0, 1)."""
    return jax.random.uniform(seed.key(), shape, jnp.float32)


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    """x / sqrt(mean(x²) + ε) · scale over the model width, computed in float32, returned in the type of x."""
    wide_BTD = x_BTD.astype(jnp.float32)
    inverse_BT1 = jax.lax.rsqrt(jnp.mean(jnp.square(wide_BTD), axis=-1, keepdims=True) + epsilon)
    return (wide_BTD * inverse_BT1 * scale_D).astype(x_BTD.dtype)


def unit_norm(x_BTHK: jax.Array) -> jax.Array:
    """Norm(x) = x / ||x||₂ per head in float32; a zero vector stays 0, with zero gradient."""
    wide_BTHK = x_BTHK.astype(jnp.float32)
    square_BTH1 = jnp.sum(jnp.square(wide_BTHK), axis=-1, keepdims=True)
    nonzero_BTH1 = square_BTH1 > 0
    return wide_BTHK * jnp.where(nonzero_BTH1, jax.lax.rsqrt(jnp.where(nonzero_BTH1, square_BTH1, 1)), 0)


def absolute(x: jax.Array) -> jax.Array:
    """|x| with derivative +1 at 0, where a parameter that starts at 0 would otherwise never move (PAPER section 5)."""
    return jnp.where(x >= 0, x, -x)


def stack[Module: nnx.Module](make: Callable[[jax.Array, Seed], Module], seed: Seed, layers: int) -> Module:
    """`make(l, seed of layer l)` for l = 0 .. layers-1, as one module whose parameters have a leading layer dimension.

    `make` must build the same tree for every l, which is traced. The result is read by scanning over that dimension.
    """
    graphs = []

    def make_state(layer: jax.Array) -> nnx.State:
        graph, state = nnx.split(make(layer, dataclasses.replace(seed, layer=layer, layers=layers)))
        graphs.append(graph)
        return state

    state = jax.vmap(make_state)(jnp.arange(layers))
    module = nnx.merge(graphs[0], state)
    for _, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Variable):
            variable.set_metadata(axes=(dims.LAYER, *variable.get_metadata("axes")))
    return module
