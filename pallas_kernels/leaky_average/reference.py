"""The readable form of `leaky_average`: one position after another, gradients by plain autodiff.

The equation is in `api.py`. k̄ itself overflows float32 (gates reach exp(100)), so what is carried is u = k̄ / exp(M)
with a running log-scale M, the *gauge*:

    M_t = max(log g_t, M_{t-1} + log λ_t)        u_t = exp(log g_t - M_t) k̃_t + exp(M_{t-1} - M_t + log λ_t) u_{t-1}

Any M gives the same k̄ = exp(M) u; this one keeps both factors at most 1. It is therefore a constant to differentiation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class LeakyState(NamedTuple):
    """k̄ at one position, as exp(log_scale) * average. Only this product has a meaning, not its two factors."""

    average_BHK: jax.Array
    log_scale_BH: jax.Array


def zero_state(input_BTHK: jax.Array, dtype: jnp.dtype) -> LeakyState:
    """The state before a document: k̄ = 0."""
    # *_like rather than zeros(shape): inside shard_map the state must vary over the same mesh axes as the input.
    first_BHK = input_BTHK[:, 0]
    return LeakyState(jnp.zeros_like(first_BHK, dtype), jnp.full_like(first_BHK[..., 0], -jnp.inf, dtype))


def finite_gauge(log_scale: jax.Array) -> jax.Array:
    """The gauge to divide by: where nothing but zeros was seen it is -inf, and 0 serves as well without inf - inf."""
    return jnp.where(log_scale == -jnp.inf, 0, log_scale)


def leaky_average(
    input_BTHK: jax.Array,
    log_gate_BTH: jax.Array,
    log_decay_BTH: jax.Array,
    restart_BT: jax.Array,
    initial: LeakyState | None,
) -> tuple[jax.Array, LeakyState]:
    """`api.leaky_average` by `lax.scan` over time, in float64 if the input is, else in float32."""
    dtype = jnp.promote_types(input_BTHK.dtype, jnp.float32)
    state = zero_state(input_BTHK, dtype) if initial is None else LeakyState(*(part.astype(dtype) for part in initial))

    def step(before: LeakyState, now: tuple[jax.Array, ...]) -> tuple[LeakyState, jax.Array]:
        input_BHK, log_gate_BH, log_decay_BH, restart_B = now
        # A restart is a decay of 0 that has no gradient.
        log_decay_BH = jnp.where(restart_B[:, None], -jnp.inf, log_decay_BH)
        log_scale_BH = lax.stop_gradient(jnp.maximum(log_gate_BH, before.log_scale_BH + log_decay_BH))
        gauge_BH = finite_gauge(log_scale_BH)
        gate_BH = jnp.exp(log_gate_BH - gauge_BH)
        decay_BH = jnp.exp(before.log_scale_BH - gauge_BH + log_decay_BH)
        average_BHK = gate_BH[..., None] * input_BHK + decay_BH[..., None] * before.average_BHK
        return LeakyState(average_BHK, log_scale_BH), _normalise(average_BHK)

    sequences = (
        input_BTHK.astype(dtype),
        log_gate_BTH.astype(dtype),
        log_decay_BTH.astype(dtype),
        restart_BT,
    )
    final, normalised_TBHK = lax.scan(step, state, tuple(jnp.moveaxis(array, 1, 0) for array in sequences))
    return jnp.moveaxis(normalised_TBHK, 0, 1).astype(input_BTHK.dtype), final


def _normalise(average_BHK: jax.Array) -> jax.Array:
    """u / ||u||, and 0 with zero gradient at u = 0."""
    square_BH1 = jnp.sum(average_BHK * average_BHK, axis=-1, keepdims=True)
    # The inner where keeps the infinite slope of the square root at 0 out of the backward pass.
    norm_BH1 = jnp.sqrt(jnp.where(square_BH1 > 0, square_BH1, 1))
    return jnp.where(square_BH1 > 0, average_BHK / norm_BH1, 0)
