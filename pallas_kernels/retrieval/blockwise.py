"""`retrieve` in blocks, in plain XLA: memory linear in T, work proportional to the visible pairs, its own derivative.

Queries are cut into tiles of rows. The intervals of a tile's rows bound the stored blocks it has to visit;
an online softmax runs over those and no others. Backward visits the same blocks once: with scores
s = β q·k, weights p = exp(s - top) / total, and the row term δ = do·o,

    ds = p (do·v - δ),   dq = β Σ ds k,   dβ = q·Σ ds k,   dk = Σ ds β q,   dv = Σ p do.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

# Measured on CPU. A tile of the short window of 256 reaches three blocks, which a span reads in one visit; tiles and
# blocks of 256 visit twice the visible pairs of that window, and single blocks of 128 make matmuls that are too small.
TILE = 128  # query rows of a tile, of rows that have so many
BLOCK = 128  # stored pairs of a block
SPAN = 3  # blocks read in one visit, where so many are left

# Below every score, yet finite: exp(-inf - LEAST) is 0 where exp(-inf + inf) would be NaN.
LEAST = -1e30


_Arrays = tuple[jax.Array, ...]
_Visit = Callable[[int, jax.Array, _Arrays], _Arrays]


class _Tiles(NamedTuple):
    """The query side of one row of the batch, cut into tiles; a leading N on every field."""

    query_NQHK: jax.Array
    bandwidth_NQH: jax.Array
    start_NQ: jax.Array
    stop_NQ: jax.Array
    first_block_N: jax.Array
    end_block_N: jax.Array


class _RowTerms(NamedTuple):
    """What backward knows of a tile's rows beside the query side. `output_grad` and `delta` carry 1 / total, so that
    the bare exp(s - top) serves as the weight of a pair."""

    output_grad_NQHV: jax.Array
    delta_NQH: jax.Array
    top_NQH: jax.Array


def _cut(array_BTX: jax.Array) -> jax.Array:
    """[B, T, ...] -> [B, N, Q, ...]; T is padded with zeros, which as an interval are empty."""
    batch, time, *rest = array_BTX.shape
    rows = max(1, min(TILE, time))
    array_BTX = jnp.pad(array_BTX, [(0, 0), (0, -time % rows)] + [(0, 0)] * len(rest))
    return array_BTX.reshape(batch, -1, rows, *rest)


def _join(array_BNQX: jax.Array, time: int) -> jax.Array:
    """[B, N, Q, ...] -> [B, T, ...], the padding dropped."""
    batch, tiles, rows, *rest = array_BNQX.shape
    return array_BNQX.reshape(batch, tiles * rows, *rest)[:, :time]


def _tiles(query_BTHK: jax.Array, bandwidth_BTH: jax.Array, start_BT: jax.Array, stop_BT: jax.Array) -> _Tiles:
    start_BNQ, stop_BNQ = _cut(start_BT), _cut(stop_BT)
    seeing_BNQ = start_BNQ < stop_BNQ
    first_BN = jnp.min(start_BNQ, axis=-1, where=seeing_BNQ, initial=jnp.iinfo(jnp.int32).max) // BLOCK
    end_BN = -(-jnp.max(stop_BNQ, axis=-1, where=seeing_BNQ, initial=0) // BLOCK)
    bandwidth_BNQH = _cut(bandwidth_BTH.astype(jnp.float32))
    return _Tiles(_cut(query_BTHK), bandwidth_BNQH, start_BNQ, stop_BNQ, first_BN, end_BN)


def _stored(array_BSHK: jax.Array) -> jax.Array:
    """S padded to whole blocks, at least one (no interval reaches the padding)."""
    padding = max(-array_BSHK.shape[1] % BLOCK, BLOCK - array_BSHK.shape[1])
    return jnp.pad(array_BSHK, [(0, 0), (0, padding), (0, 0), (0, 0)])


def _blocks(array_SHK: jax.Array, first: jax.Array, blocks: int) -> jax.Array:
    """[S, H, K] -> [H, C, K], the C pairs of some blocks. To turn them here is quicker than to turn the whole array."""
    return lax.dynamic_slice_in_dim(array_SHK, first * BLOCK, blocks * BLOCK).swapaxes(0, 1)


def _add_blocks(array_SHK: jax.Array, first: jax.Array, update_HKC: jax.Array) -> jax.Array:
    update_CHK = update_HKC.transpose(2, 0, 1)
    old_CHK = lax.dynamic_slice_in_dim(array_SHK, first * BLOCK, update_CHK.shape[0])
    return lax.dynamic_update_slice_in_dim(array_SHK, old_CHK + update_CHK, first * BLOCK, axis=0)


def _visit_blocks(tile: _Tiles, stored: int, visit: _Visit, carry: _Arrays) -> _Arrays:
    """visit(blocks, first, carry) over all blocks that the tile's intervals span: SPAN at once, the rest one by one."""
    span = min(SPAN, stored // BLOCK)
    spans = jnp.maximum(tile.end_block_N - tile.first_block_N, 0) // span
    carry = lax.fori_loop(0, spans, lambda i, carry: visit(span, tile.first_block_N + i * span, carry), carry)
    return lax.fori_loop(tile.first_block_N + spans * span, tile.end_block_N, functools.partial(visit, 1), carry)


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _scores(tile: _Tiles, key_HCK: jax.Array, first: jax.Array) -> jax.Array:
    """β q·k of one tile and some blocks in float32, -inf where the interval hides the pair."""
    stored_C = first * BLOCK + jnp.arange(key_HCK.shape[1])
    visible_QC = (tile.start_NQ[:, None] <= stored_C) & (stored_C < tile.stop_NQ[:, None])
    score_HQC = _dot("HQK,HCK->HQC", tile.query_NQHK.swapaxes(0, 1), key_HCK) * tile.bandwidth_NQH.T[..., None]
    return jnp.where(visible_QC, score_HQC, -jnp.inf)


def _forward_tile(key_SHK: jax.Array, value_SHV: jax.Array, tile: _Tiles) -> _Arrays:
    """Output, greatest score and sum of weights of one tile's rows (0, LEAST and 0 where nothing is seen)."""

    def visit(blocks: int, first: jax.Array, carry: _Arrays) -> _Arrays:
        output_HQV, top_HQ, total_HQ = carry
        score_HQC = _scores(tile, _blocks(key_SHK, first, blocks), first)
        new_top_HQ = jnp.maximum(top_HQ, score_HQC.max(-1))
        weight_HQC = jnp.exp(score_HQC - new_top_HQ[..., None])
        shrink_HQ = jnp.exp(top_HQ - new_top_HQ)
        read_HQV = _dot("HQC,HCV->HQV", weight_HQC.astype(value_SHV.dtype), _blocks(value_SHV, first, blocks))
        return (
            output_HQV * shrink_HQ[..., None] + read_HQV,
            new_top_HQ,
            total_HQ * shrink_HQ + weight_HQC.sum(-1),
        )

    rows, heads, _ = tile.query_NQHK.shape
    nothing = (
        jnp.zeros((heads, rows, value_SHV.shape[-1]), jnp.float32),
        jnp.full((heads, rows), LEAST, jnp.float32),
        jnp.zeros((heads, rows), jnp.float32),
    )
    output_HQV, top_HQ, total_HQ = _visit_blocks(tile, key_SHK.shape[0], visit, nothing)
    output_HQV = (output_HQV * _inverse(total_HQ)[..., None]).astype(value_SHV.dtype)
    return output_HQV.swapaxes(0, 1), top_HQ.T, total_HQ.T


def _inverse(total: jax.Array) -> jax.Array:
    return jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)


def _forward(
    query_BTHK: jax.Array,
    key_BSHK: jax.Array,
    value_BSHV: jax.Array,
    bandwidth_BTH: jax.Array,
    start_BT: jax.Array,
    stop_BT: jax.Array,
) -> tuple[jax.Array, _Arrays]:
    def row(args: tuple[jax.Array, jax.Array, _Tiles]) -> _Arrays:
        key_SHK, value_SHV, tiles = args
        return lax.map(functools.partial(_forward_tile, key_SHK, value_SHV), tiles)

    tiles = _tiles(query_BTHK, bandwidth_BTH, start_BT, stop_BT)
    read = lax.map(row, (_stored(key_BSHK), _stored(value_BSHV), tiles))
    # Named, so that a rematerialisation policy can keep what a read costs most to make.
    output_BTHV, top_BTH, total_BTH = (checkpoint_name(_join(part, query_BTHK.shape[1]), "retrieved") for part in read)
    inputs = (query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH, start_BT, stop_BT)
    return output_BTHV, (*inputs, output_BTHV, top_BTH, total_BTH)


def _backward_row(key_SHK: jax.Array, value_SHV: jax.Array, tiles: _Tiles, terms: _RowTerms) -> _Arrays:
    """Σ ds k of every query, and the gradients of keys and values, of one row of the batch."""
    dtype = key_SHK.dtype

    def visit_tile(stored_grads: _Arrays, xs: tuple[_Tiles, _RowTerms]) -> tuple[_Arrays, jax.Array]:
        tile, term = xs
        delta_HQ1, top_HQ1 = term.delta_NQH.T[..., None], term.top_NQH.T[..., None]
        output_grad_HQV = term.output_grad_NQHV.swapaxes(0, 1)
        # Turned once a tile: matmuls that sum over the rows of both operands run at half the speed on CPU.
        scaled_query_HKQ = (tile.query_NQHK * tile.bandwidth_NQH[..., None]).astype(dtype).transpose(1, 2, 0)
        output_grad_HVQ = term.output_grad_NQHV.transpose(1, 2, 0)

        def visit(blocks: int, first: jax.Array, carry: _Arrays) -> _Arrays:
            query_grad_HQK, key_grad_SHK, value_grad_SHV = carry
            key_HCK, value_HCV = _blocks(key_SHK, first, blocks), _blocks(value_SHV, first, blocks)
            # A score recomputed in another order may pass the maximum by a rounding; a weight never passes 1.
            weight_HQC = jnp.exp(jnp.minimum(_scores(tile, key_HCK, first) - top_HQ1, 0))
            weight_grad_HQC = _dot("HQV,HCV->HQC", output_grad_HQV, value_HCV)
            score_grad_HQC = (weight_HQC * (weight_grad_HQC - delta_HQ1)).astype(dtype)
            value_grad_HVC = _dot("HVQ,HQC->HVC", output_grad_HVQ, weight_HQC.astype(dtype))
            key_grad_HKC = _dot("HKQ,HQC->HKC", scaled_query_HKQ, score_grad_HQC)
            query_grad_HQK += _dot("HQC,HCK->HQK", score_grad_HQC, key_HCK)
            return (
                query_grad_HQK,
                _add_blocks(key_grad_SHK, first, key_grad_HKC),
                _add_blocks(value_grad_SHV, first, value_grad_HVC),
            )

        rows, heads, width = tile.query_NQHK.shape
        nothing = jnp.zeros((heads, rows, width), jnp.float32)
        carry = _visit_blocks(tile, key_SHK.shape[0], visit, (nothing, *stored_grads))
        return carry[1:], carry[0].swapaxes(0, 1)

    zeros: _Arrays = (jnp.zeros(key_SHK.shape, jnp.float32), jnp.zeros(value_SHV.shape, jnp.float32))
    (key_grad_SHK, value_grad_SHV), query_grad_NQHK = lax.scan(visit_tile, zeros, (tiles, terms))
    return query_grad_NQHK, key_grad_SHK, value_grad_SHV


def _backward(residuals: _Arrays, output_grad_BTHV: jax.Array) -> tuple[jax.Array | None, ...]:
    query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH, start_BT, stop_BT, output_BTHV, top_BTH, total_BTH = residuals
    time, stored = query_BTHK.shape[1], key_BSHK.shape[1]
    output_grad_BTHV = (output_grad_BTHV.astype(jnp.float32) * _inverse(total_BTH)[..., None]).astype(value_BSHV.dtype)
    # From the rounded gradient, which also meets the values below: the two differences of ds round alike.
    delta_BTH = (output_grad_BTHV.astype(jnp.float32) * output_BTHV).sum(-1)
    terms = _RowTerms(_cut(output_grad_BTHV), _cut(delta_BTH), _cut(top_BTH))
    tiles = _tiles(query_BTHK, bandwidth_BTH, start_BT, stop_BT)
    rows = (_stored(key_BSHK), _stored(value_BSHV), tiles, terms)
    query_grad_BNQHK, key_grad_BSHK, value_grad_BSHV = lax.map(lambda row: _backward_row(*row), rows)
    unscaled_BTHK = _join(query_grad_BNQHK, time)
    bandwidth_grad_BTH = (query_BTHK * unscaled_BTHK).sum(-1)
    return (
        (unscaled_BTHK * bandwidth_BTH[..., None]).astype(query_BTHK.dtype),
        key_grad_BSHK[:, :stored].astype(key_BSHK.dtype),
        value_grad_BSHV[:, :stored].astype(value_BSHV.dtype),
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
