"""The Hopper path of `leaky_average`: Mosaic GPU kernels for what `blockwise.py` calls the normalised recurrence.

The equations, the gauge and the three steps are those of `blockwise.py`. Here steps 1 and 3 are the kernels of
`hopper_sweep.py`, which read every array once, and step 2 is left to XLA, as its arrays are C times smaller:

1. the ends of all chunks, from the zero state:   s_t = b_t s_{t-1} + a_t k̃_t            reads k̃
2. the state that enters each chunk:              a scan over the chunk ends
3. the same recurrence from the entering state:   y_t = s_t / ||s_t||                    reads k̃, writes y and ||s_t||

Backward, in reverse time, with the adjoint e_t = g_t + b_{t+1} e_{t+1} in the place of s and

    g_t = (dy_t - (dy_t·y_t) y_t) / n_t, and 0 where n_t = 0

1. the ends of all chunks                                                                reads dy, y
3. dk̃_t = a_t e_t        da_t = e_t·k̃_t        db_{t+1} = n_t e_{t+1}·y_t                reads k̃, dy, y, writes dk̃

db is taken one position late: e_{t+1} is the state that the step to t starts from, so that y_t is at hand also at the
edge of a chunk. What is left for XLA is db_0 = e_0·u_{-1}.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.leaky_average import blockwise
from pallas_kernels.leaky_average.hopper_sweep import UNROLL, WARPS, Arrays, chunk_ends, replay
from pallas_kernels.leaky_average.reference import LeakyState, zero_state

WIDTHS = (64, 128)
_LONGEST_COPY = 256  # positions, of one TMA copy
# Shared memory for the rows of a block: at this size two blocks fit a multiprocessor, and one loads as the other works.
_TILE_BYTES = 96 * 1024
_LARGEST_CHUNK = 64  # no fewer blocks than this makes, where rows are narrow


def leaky_average_hopper(
    input_BTHK: jax.Array,
    log_gate_BTH: jax.Array,
    log_decay_BTH: jax.Array,
    restart_BT: jax.Array,
    initial: LeakyState | None,
    *,
    chunk: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, LeakyState]:
    """`api.leaky_average` for a Hopper GPU; float32 inside. A T that is not whole blocks (four chunks) costs copies.

    Args:
      chunk: positions of a chunk; None takes what fits.
      interpret: `plgpu.InterpretGPUParams` runs the kernels on a CPU; None compiles them.

    Raises:
      ValueError: K is none of the widths that the kernels are written for, or the chunk is not legal.
    """
    K = input_BTHK.shape[-1]
    if K not in WIDTHS:
        raise ValueError(
            f"input_BTHK has width K = {K}; legal for the Hopper kernels are {', '.join(map(str, WIDTHS))}; "
            "implementation='xla' takes any"
        )
    if chunk is not None and (not 0 < chunk <= _LONGEST_COPY or chunk % UNROLL):
        raise ValueError(f"chunk is {chunk}; legal are None and the multiples of {UNROLL} up to {_LONGEST_COPY}")
    state = zero_state(input_BTHK, jnp.dtype(jnp.float32)) if initial is None else initial
    average_BHK, log_scale_BH = (part.astype(jnp.float32) for part in state)
    gate_BTH, decay_BTH, log_scale_BTH = blockwise.change_gauge(
        log_gate_BTH.astype(jnp.float32), log_decay_BTH.astype(jnp.float32), restart_BT, log_scale_BH
    )
    normalised_BTHK, last_BHK = _normalised_recurrence(chunk, interpret, input_BTHK, gate_BTH, decay_BTH, average_BHK)
    return normalised_BTHK, LeakyState(last_BHK, log_scale_BTH[:, -1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalised_recurrence(
    chunk: int | None,
    interpret: Any,
    input_BTHK: jax.Array,
    gate_BTH: jax.Array,
    decay_BTH: jax.Array,
    initial_BHK: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """u_t / ||u_t|| at every position, in the input's dtype, and the last u in float32."""
    return _forward(chunk, interpret, input_BTHK, gate_BTH, decay_BTH, initial_BHK)[0]


def _forward(
    chunk: int | None,
    interpret: Any,
    input_BTHK: jax.Array,
    gate_BTH: jax.Array,
    decay_BTH: jax.Array,
    initial_BHK: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], Arrays]:
    T = input_BTHK.shape[1]
    C = _chunk_size(input_BTHK, 1) if chunk is None else chunk
    # Padding has weight 0 and decay 1: it hands the state on.
    rows = (_chunked_rows(input_BTHK, C),)
    factors = (_chunked_factors(gate_BTH, C, 0), _chunked_factors(decay_BTH, C, 1))
    ends_BHNK = chunk_ends(_advance, rows, factors, interpret=interpret)
    entering_BHNK, last_BHK = _entering(ends_BHNK, factors[1], initial_BHK)
    output_BNCHK, norm_BHGCW = replay(_advance_and_normalise, rows, factors, entering_BHNK, 1, interpret=interpret)
    output_BTHK = _unchunked_rows(output_BNCHK, T)
    norm_BTH = _unchunked_factors(norm_BHGCW, T)
    return (output_BTHK, last_BHK), (input_BTHK, gate_BTH, decay_BTH, initial_BHK, output_BTHK, norm_BTH)


def _backward(
    chunk: int | None,
    interpret: Any,
    residuals: Arrays,
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    input_BTHK, gate_BTH, decay_BTH, initial_BHK, output_BTHK, norm_BTH = residuals
    d_output_BTHK, d_last_BHK = cotangents
    T = input_BTHK.shape[1]
    C = _chunk_size(input_BTHK, 3) if chunk is None else chunk
    inverse_BTH = jnp.where(norm_BTH > 0, 1 / jnp.where(norm_BTH > 0, norm_BTH, 1), 0)
    # Nothing lies between the last position and the final state's cotangent: its factor is 1.
    next_decay_BTH = jnp.concatenate([decay_BTH[:, 1:], jnp.ones_like(decay_BTH[:, :1])], axis=1)
    next_decay_BHGCW = _chunked_factors(next_decay_BTH, C, 1)
    factors = (_chunked_factors(inverse_BTH, C, 0), next_decay_BHGCW)
    rows = (_chunked_rows(d_output_BTHK, C), _chunked_rows(output_BTHK, C))
    ends_BHNK = chunk_ends(_advance_adjoint, rows, factors, reverse=True, interpret=interpret)
    entering_BHNK, first_BHK = _entering(ends_BHNK, next_decay_BHGCW, d_last_BHK, reverse=True)
    d_input_BNCHK, d_gate_BHGCW, next_dot_BHGCW = replay(
        _advance_adjoint_and_differentiate,
        (*rows, _chunked_rows(input_BTHK, C)),
        (*factors, _chunked_factors(gate_BTH, C, 0)),
        entering_BHNK,
        2,
        reverse=True,
        interpret=interpret,
    )
    d_next_decay_BTH = norm_BTH * _unchunked_factors(next_dot_BHGCW, T)
    d_first_decay_BH = jnp.sum(first_BHK * initial_BHK, axis=-1)
    d_decay_BTH = jnp.concatenate([d_first_decay_BH[:, None], d_next_decay_BTH[:, :-1]], axis=1)
    return (
        _unchunked_rows(d_input_BNCHK, T),
        _unchunked_factors(d_gate_BHGCW, T),
        d_decay_BTH,
        decay_BTH[:, 0, :, None] * first_BHK,
    )


_normalised_recurrence.defvjp(_forward, _backward)


# --- The four steps. W is the warp, each at a position of its own chunk. ---


def _advance(state_WK: jax.Array, rows: Arrays, factors: Arrays) -> tuple[jax.Array, Arrays]:
    (input_WK,), (gate_W, decay_W) = rows, factors
    return _scaled(decay_W, state_WK) + _scaled(gate_W, input_WK), ()


def _advance_and_normalise(state_WK: jax.Array, rows: Arrays, factors: Arrays) -> tuple[jax.Array, Arrays]:
    state_WK, _ = _advance(state_WK, rows, factors)
    square_W = jnp.sum(state_WK * state_WK, axis=1)
    # The smallest normal number, not 0: a GPU may flush what is smaller before it takes the root.
    inverse_W = jnp.where(square_W >= jnp.finfo(jnp.float32).tiny, lax.rsqrt(square_W), 0.0)
    return state_WK, (_scaled(inverse_W, state_WK), square_W * inverse_W)


def _advance_adjoint(next_adjoint_WK: jax.Array, rows: Arrays, factors: Arrays) -> tuple[jax.Array, Arrays]:
    (d_output_WK, output_WK), (inverse_norm_W, next_decay_W) = rows, factors
    radial_W = jnp.sum(d_output_WK * output_WK, axis=1)
    tangential_WK = d_output_WK - _scaled(radial_W, output_WK)
    return _scaled(next_decay_W, next_adjoint_WK) + _scaled(inverse_norm_W, tangential_WK), ()


def _advance_adjoint_and_differentiate(
    next_adjoint_WK: jax.Array, rows: Arrays, factors: Arrays
) -> tuple[jax.Array, Arrays]:
    (d_output_WK, output_WK, input_WK), (inverse_norm_W, next_decay_W, gate_W) = rows, factors
    adjoint_WK, _ = _advance_adjoint(next_adjoint_WK, (d_output_WK, output_WK), (inverse_norm_W, next_decay_W))
    d_gate_W = jnp.sum(adjoint_WK * input_WK, axis=1)
    next_dot_W = jnp.sum(next_adjoint_WK * output_WK, axis=1)
    return adjoint_WK, (_scaled(gate_W, adjoint_WK), d_gate_W, next_dot_W)


def _scaled(factor_W: jax.Array, row_WK: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(factor_W, row_WK.shape, (0,)) * row_WK


# --- Around the kernels. ---


def _entering(
    ends_BHNK: jax.Array, decay_BHGCW: jax.Array, initial_BHK: jax.Array, *, reverse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The state that enters each chunk, and the one that leaves the last; in reverse, the first."""
    through_BHN = jnp.prod(decay_BHGCW, axis=-2).reshape(ends_BHNK.shape[:3])
    first = -1 if reverse else 0
    ends_BHNK = ends_BHNK.at[:, :, first].add(through_BHN[:, :, first, None] * initial_BHK)

    def compose(early: tuple[jax.Array, jax.Array], late: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return early[0] * late[0], late[0][..., None] * early[1] + late[1]

    _, leaving_BHNK = lax.associative_scan(compose, (through_BHN, ends_BHNK), axis=2, reverse=reverse)
    initial_BH1K = initial_BHK[:, :, None]
    if reverse:
        return jnp.concatenate([leaving_BHNK[:, :, 1:], initial_BH1K], axis=2), leaving_BHNK[:, :, 0]
    return jnp.concatenate([initial_BH1K, leaving_BHNK[:, :, :-1]], axis=2), leaving_BHNK[:, :, -1]


def _chunk_size(input_BTHK: jax.Array, num_rows: int) -> int:
    """A power of two: what fits of a block's rows, but no more than a quarter of a short sequence needs."""
    _, T, _, K = input_BTHK.shape
    bytes_of_a_position = WARPS * K * input_BTHK.dtype.itemsize * num_rows
    fitting = 1 << (_TILE_BYTES // bytes_of_a_position).bit_length() - 1
    needed = 1 << (-(-T // WARPS) - 1).bit_length()
    return min(fitting, max(needed, UNROLL), _LARGEST_CHUNK)


def _chunked_rows(array_BTHK: jax.Array, C: int) -> jax.Array:
    """[B, T, H, K] -> [B, N, C, H, K]: no data moves if T is a whole number of blocks, else zeros are added."""
    B, _, H, K = array_BTHK.shape
    return _padded(array_BTHK, C, 0).reshape(B, -1, C, H, K)


def _unchunked_rows(array_BNCHK: jax.Array, T: int) -> jax.Array:
    B, _, _, H, K = array_BNCHK.shape
    return array_BNCHK.reshape(B, -1, H, K)[:, :T]


def _chunked_factors(array_BTH: jax.Array, C: int, padding: float) -> jax.Array:
    """[B, T, H] -> [B, H, G, C, W], the factors that a block's warps need in one step side by side."""
    B, _, H = array_BTH.shape
    array_BGWCH = _padded(array_BTH, C, padding).reshape(B, -1, WARPS, C, H)
    return array_BGWCH.transpose(0, 4, 1, 3, 2)


def _unchunked_factors(array_BHGCW: jax.Array, T: int) -> jax.Array:
    B, H, _, _, _ = array_BHGCW.shape
    return array_BHGCW.transpose(0, 2, 4, 3, 1).reshape(B, -1, H)[:, :T]


def _padded(array: jax.Array, C: int, padding: float) -> jax.Array:
    missing = -array.shape[1] % (C * WARPS)
    if not missing:
        return array
    return jnp.pad(array, [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2), constant_values=padding)
