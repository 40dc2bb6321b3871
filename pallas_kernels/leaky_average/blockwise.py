"""The XLA path of `leaky_average`: chunks of time side by side, a hand-written backward pass, memory linear in T.

The gauge M (see `reference.py`) is a max-plus scan over [B, T, H] alone, K times smaller than the input. What remains
is linear, u_t = a_t k̃_t + b_t u_{t-1}, and is done in three steps, for the backward pass in reverse:

1. what each chunk of C positions adds to the state at its end: one weighted sum;
2. the state that enters each chunk: an associative scan over the N = T / C chunk ends;
3. replay: C steps, each advancing all N chunks at once from the state that entered them, and finishing the output.

Weights are products of decays, never differences of summed logs: those lose precision for small λ and are NaN at λ = 0.

Backward, with y = u / n and n = ||u||, so that y is all that is kept of u:

    g_t = (dy_t - (dy_t·y_t) y_t) / n_t, and 0 where n_t = 0        e_t = g_t + b_{t+1} e_{t+1}
    dk̃_t = a_t e_t        da_t = e_t·k̃_t        db_t = e_t·u_{t-1} = n_{t-1} e_t·y_{t-1}
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.leaky_average.reference import LeakyState, finite_gauge, zero_state

# Positions of a chunk. The replay takes this many steps whatever T is, so a GPU wants it small; a CPU is indifferent
# from 32 to 128 and slower below, where the chunk ends become a large part of the work.
_CHUNK = 32


def leaky_average(
    input_BTHK: jax.Array,
    log_gate_BTH: jax.Array,
    log_decay_BTH: jax.Array,
    restart_BT: jax.Array,
    initial: LeakyState | None,
) -> tuple[jax.Array, LeakyState]:
    """`api.leaky_average` for any XLA device; float32 inside."""
    state = zero_state(input_BTHK, jnp.dtype(jnp.float32)) if initial is None else initial
    average_BHK, log_scale_BH = (part.astype(jnp.float32) for part in state)
    gate_BTH, decay_BTH, log_scale_BTH = change_gauge(
        log_gate_BTH.astype(jnp.float32), log_decay_BTH.astype(jnp.float32), restart_BT, log_scale_BH
    )
    normalised_BTHK, last_BHK = _normalised_recurrence(input_BTHK, gate_BTH, decay_BTH, average_BHK)
    return normalised_BTHK, LeakyState(last_BHK, log_scale_BTH[:, -1])


def change_gauge(
    log_gate_BTH: jax.Array, log_decay_BTH: jax.Array, restart_BT: jax.Array, log_scale_BH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The factors a and b of the recurrence on u, and M. Differentiable in the logarithms, with M a constant."""
    # A restart is a decay of 0 that has no gradient.
    log_decay_BTH = jnp.where(restart_BT[..., None], -jnp.inf, log_decay_BTH)
    first_BH = jnp.maximum(log_gate_BTH[:, 0], log_scale_BH + log_decay_BTH[:, 0])
    seen_BTH = jnp.concatenate([first_BH[:, None], log_gate_BTH[:, 1:]], axis=1)

    def compose(early: tuple[jax.Array, jax.Array], late: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return early[0] + late[0], jnp.maximum(early[1] + late[0], late[1])

    # Rounding in M is harmless, as a and b are taken from the same M.
    _, log_scale_BTH = lax.associative_scan(compose, lax.stop_gradient((log_decay_BTH, seen_BTH)), axis=1)
    before_BTH = jnp.concatenate([log_scale_BH[:, None], log_scale_BTH[:, :-1]], axis=1)
    gauge_BTH = finite_gauge(log_scale_BTH)
    gate_BTH = jnp.exp(log_gate_BTH - gauge_BTH)
    decay_BTH = jnp.exp(before_BTH - gauge_BTH + log_decay_BTH)
    return gate_BTH, decay_BTH, log_scale_BTH


@jax.custom_vjp
def _normalised_recurrence(
    input_BTHK: jax.Array, gate_BTH: jax.Array, decay_BTH: jax.Array, initial_BHK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """u_t / ||u_t|| at every position, in the input's dtype, and the last u in float32."""
    return _forward(input_BTHK, gate_BTH, decay_BTH, initial_BHK)[0]


def _forward(
    input_BTHK: jax.Array, gate_BTH: jax.Array, decay_BTH: jax.Array, initial_BHK: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    def normalise(state_BNHK: jax.Array) -> tuple[jax.Array, ...]:
        norm_BNH = jnp.sqrt(jnp.sum(state_BNHK * state_BNHK, axis=-1))
        return (state_BNHK * _inverse(norm_BNH)[..., None]).astype(input_BTHK.dtype), norm_BNH

    (output_BTHK, norm_BTH), last_BHK = _recurrence(gate_BTH, input_BTHK, decay_BTH, initial_BHK, normalise)
    return (output_BTHK, last_BHK), (input_BTHK, gate_BTH, decay_BTH, initial_BHK, output_BTHK, norm_BTH)


def _backward(
    residuals: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    input_BTHK, gate_BTH, decay_BTH, initial_BHK, output_BTHK, norm_BTH = residuals
    d_output_BTHK, d_last_BHK = cotangents
    output_BTHK, d_output_BTHK = output_BTHK.astype(jnp.float32), d_output_BTHK.astype(jnp.float32)
    tangential_BTHK = d_output_BTHK - _dot(d_output_BTHK, output_BTHK)[..., None] * output_BTHK
    # Nothing lies between the last position and the final state's cotangent: its factor is 1.
    next_decay_BTH = jnp.concatenate([decay_BTH[:, 1:], jnp.ones_like(decay_BTH[:, :1])], axis=1)
    (adjoint_BTHK,), _ = _recurrence(
        _inverse(norm_BTH),
        tangential_BTHK,
        next_decay_BTH,
        d_last_BHK,
        lambda adjoint_BNHK: (adjoint_BNHK,),
        reverse=True,
    )
    d_input_BTHK = (gate_BTH[..., None] * adjoint_BTHK).astype(input_BTHK.dtype)
    d_gate_BTH = _dot(adjoint_BTHK, input_BTHK.astype(jnp.float32))
    d_decay_BTH = jnp.concatenate(
        [
            _dot(adjoint_BTHK[:, :1], initial_BHK[:, None]),
            norm_BTH[:, :-1] * _dot(adjoint_BTHK[:, 1:], output_BTHK[:, :-1]),
        ],
        axis=1,
    )
    d_initial_BHK = decay_BTH[:, 0, :, None] * adjoint_BTHK[:, 0]
    return d_input_BTHK, d_gate_BTH, d_decay_BTH, d_initial_BHK


_normalised_recurrence.defvjp(_forward, _backward)


def _recurrence(
    weight_BTH: jax.Array,
    input_BTHK: jax.Array,
    decay_BTH: jax.Array,
    initial_BHK: jax.Array,
    emit: Callable[[jax.Array], tuple[jax.Array, ...]],
    *,
    reverse: bool = False,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """s_t = weight_t input_t + decay_t s_{t-1} (in reverse: s_{t+1}): emit(s_t) for all t, and the last s."""
    T = input_BTHK.shape[1]
    C = min(_CHUNK, T)
    # Padding has weight 0 and decay 1: it hands the state on.
    weight_BNCH, decay_BNCH = _chunked(weight_BTH, C, 0), _chunked(decay_BTH, C, 1)
    input_BNCHK = _chunked(input_BTHK, C, 0)
    entering_BNHK = _entering(weight_BNCH, input_BNCHK, decay_BNCH, initial_BHK, reverse)

    def replay(step: jax.Array, carry: tuple) -> tuple:
        state_BNHK, outputs = carry
        position = C - 1 - step if reverse else step
        weight_BNH, decay_BNH, input_BNHK = (
            lax.dynamic_index_in_dim(array, position, axis=2, keepdims=False)
            for array in (weight_BNCH, decay_BNCH, input_BNCHK)
        )
        state_BNHK = weight_BNH[..., None] * input_BNHK.astype(jnp.float32) + decay_BNH[..., None] * state_BNHK
        outputs = tuple(
            lax.dynamic_update_index_in_dim(output, emitted, position, axis=2)
            for output, emitted in zip(outputs, emit(state_BNHK), strict=True)
        )
        return state_BNHK, outputs

    # Every position is overwritten; starting from a broadcast of emit() gives each buffer its dtype and mesh axes.
    buffers = tuple(jnp.repeat(emitted[:, :, None], C, axis=2) for emitted in emit(entering_BNHK))
    state_BNHK, outputs = lax.fori_loop(0, C, replay, (entering_BNHK, buffers))
    unchunked = tuple(output.reshape(output.shape[0], -1, *output.shape[3:])[:, :T] for output in outputs)
    return unchunked, state_BNHK[:, 0 if reverse else -1]


def _entering(
    weight_BNCH: jax.Array, input_BNCHK: jax.Array, decay_BNCH: jax.Array, initial_BHK: jax.Array, reverse: bool
) -> jax.Array:
    """The state that enters each chunk: at its first position, in reverse at its last one."""
    # product_c: all decays from c to the chunk's end, in the direction of travel; an input is not decayed at its own c.
    product_BNCH = lax.associative_scan(jnp.multiply, decay_BNCH, axis=2, reverse=not reverse)
    own_BN1H = jnp.ones_like(decay_BNCH[:, :, :1])
    later = [own_BN1H, product_BNCH[:, :, :-1]] if reverse else [product_BNCH[:, :, 1:], own_BN1H]
    weight_BNCH = weight_BNCH * jnp.concatenate(later, axis=2)
    added_BNHK = jnp.sum(weight_BNCH[..., None] * input_BNCHK.astype(jnp.float32), axis=2)
    through_BNH = product_BNCH[:, :, -1 if reverse else 0]

    def compose(early: tuple[jax.Array, jax.Array], late: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return early[0] * late[0], late[0][..., None] * early[1] + late[1]

    # The initial state takes the place of a chunk before the first; the last chunk's end enters nothing.
    if reverse:
        through_BNH = jnp.concatenate([through_BNH[:, 1:], jnp.ones_like(through_BNH[:, :1])], axis=1)
        added_BNHK = jnp.concatenate([added_BNHK[:, 1:], initial_BHK[:, None]], axis=1)
    else:
        through_BNH = jnp.concatenate([jnp.ones_like(through_BNH[:, :1]), through_BNH[:, :-1]], axis=1)
        added_BNHK = jnp.concatenate([initial_BHK[:, None], added_BNHK[:, :-1]], axis=1)
    return lax.associative_scan(compose, (through_BNH, added_BNHK), axis=1, reverse=reverse)[1]


def _chunked(array: jax.Array, C: int, padding: float) -> jax.Array:
    """[B, T, ...] -> [B, N, C, ...], padded at the end to whole chunks."""
    B, T, *rest = array.shape
    missing = -T % C
    if missing:
        array = jnp.pad(array, [(0, 0), (0, missing)] + [(0, 0)] * len(rest), constant_values=padding)
    return array.reshape(B, -1, C, *rest)


def _inverse(norm: jax.Array) -> jax.Array:
    return jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.sum(left * right, axis=-1)
