"""`retrieve` in blocks, in plain XLA: memory linear in T, work proportional to the visible pairs, its own derivative.

Queries are cut into tiles of rows. The intervals of a tile's rows bound the stored blocks it has to visit;
an online softmax runs over those and no others. Backward visits the same blocks once: with scores
s = β q·k, weights p = exp(s - top) / total, and the row term δ = do·o,

    ds = p (do·v - δ),   dq = β Σ ds k,   dβ = q·Σ ds k,   dk = Σ ds β q,   dv = Σ p do.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

# 128 and 256 were measured on CPU: 256 is as fast or faster at every row length, though it visits more hidden pairs.
TILE = 256  # query rows of a tile, of rows that have so many
BLOCK = 256  # stored pairs of a block

# Below every score, yet finite: exp(-inf - LEAST) is 0 where exp(-inf + inf) would be NaN.
LEAST = -1e30


class _Tiles(NamedTuple):
    """The query side of one row of the batch, cut into tiles; a leading N on every field."""

    query_NHQK: jax.Array
    bandwidth_NHQ: jax.Array
    start_NQ: jax.Array
    stop_NQ: jax.Array
    first_block_N: jax.Array
    end_block_N: jax.Array


def _cut(array_BTX: jax.Array, size: int, heads: bool) -> jax.Array:
    """[B, T, ...] -> [B, N, Q, ...], or [B, N, H, Q, ...] if the third dimension is heads; T is padded with zeros."""
    padding = -array_BTX.shape[1] % size
    array_BTX = jnp.pad(array_BTX, [(0, 0), (0, padding)] + [(0, 0)] * (array_BTX.ndim - 2))
    batch, time, *rest = array_BTX.shape
    array_BNQX = array_BTX.reshape(batch, time // size, size, *rest)
    return array_BNQX.swapaxes(2, 3) if heads else array_BNQX


def _join(array_BNHQX: jax.Array, time: int) -> jax.Array:
    """[B, N, H, Q, ...] -> [B, T, H, ...], the padding dropped."""
    array_BNQHX = array_BNHQX.swapaxes(2, 3)
    batch, tiles, size, *rest = array_BNQHX.shape
    return array_BNQHX.reshape(batch, tiles * size, *rest)[:, :time]


def _tile_rows(time: int) -> int:
    """Rows of a tile: TILE, or all there are (one, in decoding)."""
    return max(1, min(TILE, time))


def _tiles(query_BTHK: jax.Array, bandwidth_BTH: jax.Array, start_BT: jax.Array, stop_BT: jax.Array) -> _Tiles:
    rows = _tile_rows(query_BTHK.shape[1])
    start_BNQ = _cut(start_BT, rows, heads=False)
    stop_BNQ = _cut(stop_BT, rows, heads=False)
    seeing_BNQ = start_BNQ < stop_BNQ
    first_BN = jnp.min(start_BNQ, axis=-1, where=seeing_BNQ, initial=jnp.iinfo(jnp.int32).max) // BLOCK
    end_BN = -(-jnp.max(stop_BNQ, axis=-1, where=seeing_BNQ, initial=0) // BLOCK)
    bandwidth_BNHQ = _cut(bandwidth_BTH.astype(jnp.float32), rows, heads=True)
    return _Tiles(_cut(query_BTHK, rows, heads=True), bandwidth_BNHQ, start_BNQ, stop_BNQ, first_BN, end_BN)


def _stored(array_BSHK: jax.Array) -> jax.Array:
    """[B, S, H, K] -> [B, H, S, K], S padded to whole blocks, at least one (no interval reaches the padding)."""
    padding = max(-array_BSHK.shape[1] % BLOCK, BLOCK - array_BSHK.shape[1])
    return jnp.pad(array_BSHK, [(0, 0), (0, padding), (0, 0), (0, 0)]).swapaxes(1, 2)


def _block(array_HSK: jax.Array, block: jax.Array) -> jax.Array:
    return lax.dynamic_slice_in_dim(array_HSK, block * BLOCK, BLOCK, axis=1)


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _scores(tile: _Tiles, key_HCK: jax.Array, block: jax.Array) -> jax.Array:
    """β q·k of one tile and one block in float32, -inf where the interval hides the pair."""
    stored_C = block * BLOCK + jnp.arange(BLOCK)
    visible_QC = (tile.start_NQ[:, None] <= stored_C) & (stored_C < tile.stop_NQ[:, None])
    score_HQC = _dot("HQK,HCK->HQC", tile.query_NHQK, key_HCK) * tile.bandwidth_NHQ[..., None]
    return jnp.where(visible_QC, score_HQC, -jnp.inf)


def _forward_tile(key_HSK: jax.Array, value_HSV: jax.Array, tile: _Tiles) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output, greatest score and sum of weights of one tile's rows (0, LEAST and 0 where nothing is seen)."""

    def visit(block: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        output_HQV, top_HQ, total_HQ = carry
        score_HQC = _scores(tile, _block(key_HSK, block), block)
        new_top_HQ = jnp.maximum(top_HQ, score_HQC.max(-1))
        weight_HQC = jnp.exp(score_HQC - new_top_HQ[..., None])
        shrink_HQ = jnp.exp(top_HQ - new_top_HQ)
        read_HQV = _dot("HQC,HCV->HQV", weight_HQC.astype(value_HSV.dtype), _block(value_HSV, block))
        return (
            output_HQV * shrink_HQ[..., None] + read_HQV,
            new_top_HQ,
            total_HQ * shrink_HQ + weight_HQC.sum(-1),
        )

    heads, rows, _ = tile.query_NHQK.shape
    nothing = (
        jnp.zeros((heads, rows, value_HSV.shape[-1]), jnp.float32),
        jnp.full((heads, rows), LEAST, jnp.float32),
        jnp.zeros((heads, rows), jnp.float32),
    )
    output_HQV, top_HQ, total_HQ = lax.fori_loop(tile.first_block_N, tile.end_block_N, visit, nothing)
    output_HQV = output_HQV * _inverse(total_HQ)[..., None]
    return output_HQV.astype(value_HSV.dtype), top_HQ, total_HQ


def _inverse(total: jax.Array) -> jax.Array:
    return jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)


def _forward(
    query_BTHK: jax.Array,
    key_BSHK: jax.Array,
    value_BSHV: jax.Array,
    bandwidth_BTH: jax.Array,
    start_BT: jax.Array,
    stop_BT: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def row(args: tuple[jax.Array, jax.Array, _Tiles]) -> tuple[jax.Array, jax.Array, jax.Array]:
        key_HSK, value_HSV, tiles = args
        return lax.map(functools.partial(_forward_tile, key_HSK, value_HSV), tiles)

    tiles = _tiles(query_BTHK, bandwidth_BTH, start_BT, stop_BT)
    output_BNHQV, top_BNHQ, total_BNHQ = lax.map(row, (_stored(key_BSHK), _stored(value_BSHV), tiles))
    output_BTHV = _join(output_BNHQV, query_BTHK.shape[1])
    # Named, so that a rematerialisation policy can keep what a read costs most to make.
    output_BTHV, top_BNHQ, total_BNHQ = (
        checkpoint_name(array, "retrieved") for array in (output_BTHV, top_BNHQ, total_BNHQ)
    )
    inputs = (query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH, start_BT, stop_BT)
    return output_BTHV, (*inputs, output_BTHV, top_BNHQ, total_BNHQ)


class _RowTerms(NamedTuple):
    """What backward knows of a tile's rows beside the query side. `output_grad` and `delta` carry 1 / total, so that
    the bare exp(s - top) serves as the weight of a pair."""

    output_grad_NHQV: jax.Array
    delta_NHQ: jax.Array
    top_NHQ: jax.Array


def _backward_row(
    key_HSK: jax.Array, value_HSV: jax.Array, tiles: _Tiles, terms: _RowTerms
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Σ ds k of every query, and the gradients of keys and values, of one row of the batch."""
    dtype = key_HSK.dtype

    def visit_tile(
        stored_grads: tuple[jax.Array, jax.Array], xs: tuple[_Tiles, _RowTerms]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        tile, term = xs
        scaled_query_HQK = (tile.query_NHQK * tile.bandwidth_NHQ[..., None]).astype(dtype)

        def visit(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            query_grad_HQK, key_grad_HSK, value_grad_HSV = carry
            key_HCK, value_HCV = _block(key_HSK, block), _block(value_HSV, block)
            # A score recomputed in another order may pass the maximum by a rounding; a weight never passes 1.
            log_weight_HQC = jnp.minimum(_scores(tile, key_HCK, block) - term.top_NHQ[..., None], 0)
            weight_HQC = jnp.exp(log_weight_HQC)
            weight_grad_HQC = _dot("HQV,HCV->HQC", term.output_grad_NHQV, value_HCV)
            score_grad_HQC = (weight_HQC * (weight_grad_HQC - term.delta_NHQ[..., None])).astype(dtype)
            value_grad_HCV = _dot("HQC,HQV->HCV", weight_HQC.astype(dtype), term.output_grad_NHQV)
            key_grad_HCK = _dot("HQC,HQK->HCK", score_grad_HQC, scaled_query_HQK)
            query_grad_HQK += _dot("HQC,HCK->HQK", score_grad_HQC, key_HCK)
            return (
                query_grad_HQK,
                _add_block(key_grad_HSK, key_grad_HCK, block),
                _add_block(value_grad_HSV, value_grad_HCV, block),
            )

        nothing = jnp.zeros(tile.query_NHQK.shape, jnp.float32)
        carry = lax.fori_loop(tile.first_block_N, tile.end_block_N, visit, (nothing, *stored_grads))
        return carry[1:], carry[0]

    zeros = (jnp.zeros(key_HSK.shape, jnp.float32), jnp.zeros(value_HSV.shape, jnp.float32))
    (key_grad_HSK, value_grad_HSV), query_grad_NHQK = lax.scan(visit_tile, zeros, (tiles, terms))
    return query_grad_NHQK, key_grad_HSK, value_grad_HSV


def _add_block(array_HSK: jax.Array, update_HCK: jax.Array, block: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(array_HSK, _block(array_HSK, block) + update_HCK, block * BLOCK, axis=1)


def _backward(residuals: tuple[jax.Array, ...], output_grad_BTHV: jax.Array) -> tuple[jax.Array | None, ...]:
    query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH, start_BT, stop_BT, output_BTHV, top_BNHQ, total_BNHQ = residuals
    time, stored = query_BTHK.shape[1], key_BSHK.shape[1]
    inverse_BNHQ, tile_rows = _inverse(total_BNHQ), _tile_rows(time)
    output_grad_BNHQV = _cut(output_grad_BTHV, tile_rows, heads=True).astype(jnp.float32) * inverse_BNHQ[..., None]
    output_grad_BNHQV = output_grad_BNHQV.astype(value_BSHV.dtype)
    # From the rounded gradient, which also meets the values below: the two differences of ds round alike.
    delta_BNHQ = (output_grad_BNHQV.astype(jnp.float32) * _cut(output_BTHV, tile_rows, heads=True)).sum(-1)
    terms = _RowTerms(output_grad_BNHQV, delta_BNHQ, top_BNHQ)
    tiles = _tiles(query_BTHK, bandwidth_BTH, start_BT, stop_BT)
    rows = (_stored(key_BSHK), _stored(value_BSHV), tiles, terms)
    query_grad_BNHQK, key_grad_BHSK, value_grad_BHSV = lax.map(lambda row: _backward_row(*row), rows)
    unscaled_BTHK = _join(query_grad_BNHQK, time)
    bandwidth_grad_BTH = (query_BTHK * unscaled_BTHK).sum(-1)
    return (
        (unscaled_BTHK * bandwidth_BTH[..., None]).astype(query_BTHK.dtype),
        key_grad_BHSK.swapaxes(1, 2)[:, :stored].astype(key_BSHK.dtype),
        value_grad_BHSV.swapaxes(1, 2)[:, :stored].astype(value_BSHV.dtype),
        bandwidth_grad_BTH.astype(bandwidth_BTH.dtype),
        None,
        None,
    )


@jax.custom_vjp
def retrieve_blockwise(
    query_BTHK: jax.Array,
    key_BSHK: jax.Array,
    value_BSHV: jax.Array,
    bandwidth_BTH: jax.Array,
    start_BT: jax.Array,
    stop_BT: jax.Array,
) -> jax.Array:
    """`retrieve` in blocks; the same arguments and result."""
    return _forward(query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH, start_BT, stop_BT)[0]


retrieve_blockwise.defvjp(_forward, _backward)
