"""`retrieve` on Hopper GPUs, backward: a kernel for the gradients in the query's role, one for those in the key's role.

With weights p = exp2(β' (s - m) - L), m and L the saved maximum and log-sum, and the row term δ = do·o:

    ds = p (do·v - δ),   dq = β Σ ds k,   dβ = q·Σ ds k,   dk = Σ ds β q,   dv = Σ p do.

Both recompute p from keys and queries. The first runs over the stored blocks that a tile of queries sees, the second
over the query blocks that see a tile of stored pairs; what no interval shows is neither copied nor multiplied, and only
blocks seen in part are masked.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.retrieval.hopper import (
    LOG2E,
    QUERIES,
    TILE,
    TILING,
    WARPGROUPS,
    Interpret,
    Ring,
    Tiling,
    across,
    add_wgmma,
    feed,
    feed_pairs,
    forward,
    in_three,
    launch_options,
    load_row,
    ordered,
    pad_time,
    place,
    query_bounds,
    swizzled,
    transposed,
    visible,
    wgmma,
    zeros,
)

KEYS = 64  # stored pairs of a warpgroup, in the key's role
_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def _down(column: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """One number a column, for all rows."""
    return lax.broadcast_in_dim(column, shape, [1])


def _query_kernel(
    query_ref, key_ref, value_ref, output_grad_ref, rows_ref, ends_ref, bounds_ref,
    query_grad_ref, bandwidth_grad_ref,
    query_s, output_grad_s, key_s, value_s, bandwidth_grad_s, query_full, key_full, value_full, key_empty, value_empty,
    *, tiling, interpret,
):  # fmt: skip
    """dq and dβ of a tile of queries."""
    batch, head, half, warpgroup, bounds = place(bounds_ref)
    keys = Ring(key_full, key_empty, bounds[0], tiling.query_stages)
    values = Ring(value_full, value_empty, bounds[0], tiling.query_stages)
    shape = (QUERIES, tiling.query_block)

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        rows = pl.ds(half * QUERIES, QUERIES)
        query, output_grad = query_s.at[warpgroup], output_grad_s.at[warpgroup]
        plgpu.copy_gmem_to_smem(query_ref.at[batch, rows, head], query, query_full.at[warpgroup])
        plgpu.copy_gmem_to_smem(output_grad_ref.at[batch, rows, head], output_grad, query_full.at[warpgroup])
        top_Q, log_sum_Q, bandwidth_Q, delta_Q = (load_row(rows_ref.at[i, batch, head, rows]) for i in range(4))
        start_Q, stop_Q = (load_row(ends_ref.at[i, batch, rows]) for i in range(2))
        scale_Q = bandwidth_Q * LOG2E
        plgpu.barrier_wait(query_full.at[warpgroup])

        def step(masked: bool, block: jax.Array, sum_QK: jax.Array) -> jax.Array:
            keys.await_full(block)
            key = key_s.at[keys.slot(block)]
            score_QC = wgmma(query, transposed(key, interpret), interpret)
            # A score made again in another order may pass the maximum by a rounding; a weight never passes 1.
            exponent_QC = jnp.minimum((score_QC - across(top_Q, shape)) * across(scale_Q, shape), 0.0)
            weight_QC = jnp.exp2(exponent_QC - across(log_sum_Q, shape))
            if masked:
                weight_QC = jnp.where(visible(block, start_Q, stop_Q, shape), weight_QC, 0.0)
            values.await_full(block)
            value_t = transposed(value_s.at[values.slot(block)], interpret)
            weight_grad_QC = wgmma(output_grad, value_t, interpret)
            values.release(block)
            score_grad_QC = weight_QC * (weight_grad_QC - across(delta_Q, shape))
            sum_QK = add_wgmma(sum_QK, score_grad_QC.astype(key_s.dtype), key, interpret)
            keys.release(block)
            return sum_QK

        width = query_ref.shape[-1]
        sum_QK = in_three(bounds, step, zeros((QUERIES, width), plgpu.Layout.WGMMA))
        query_QK = plgpu.load(query, layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)
        bandwidth_grad_s[warpgroup] = (sum_QK * query_QK).sum(axis=1)
        query[...] = (sum_QK * across(bandwidth_Q, (QUERIES, width))).astype(query_grad_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(query, query_grad_ref.at[batch, rows, head])
        plgpu.copy_smem_to_gmem(bandwidth_grad_s.at[warpgroup], bandwidth_grad_ref.at[batch, head, rows])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == WARPGROUPS)
    def _() -> None:
        feed_pairs(bounds, keys, values, (key_ref, value_ref), (key_s, value_s), batch, head)


def _key_kernel(
    query_ref, key_ref, value_ref, output_grad_ref, rows_ref, ends_ref, bounds_ref,
    key_grad_ref, value_grad_ref,
    key_s, value_s, query_s, output_grad_s, rows_s, ends_s, stored_full, query_full, grad_full, query_empty, grad_empty,
    *, tiling, interpret,
):  # fmt: skip
    """dk and dv of a tile of stored pairs; matrices are transposed: stored pairs down, queries across."""
    batch, head, half, warpgroup, bounds = place(bounds_ref)
    queries = Ring(query_full, query_empty, bounds[0], tiling.key_stages)
    grads = Ring(grad_full, grad_empty, bounds[0], tiling.key_stages)
    shape, width = (KEYS, QUERIES), key_ref.shape[-1]

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        stored = pl.ds(half * KEYS, KEYS)
        key, value = key_s.at[warpgroup], value_s.at[warpgroup]
        plgpu.copy_gmem_to_smem(key_ref.at[batch, stored, head], key, stored_full.at[warpgroup])
        plgpu.copy_gmem_to_smem(value_ref.at[batch, stored, head], value, stored_full.at[warpgroup])
        plgpu.barrier_wait(stored_full.at[warpgroup])

        def step(masked: bool, block: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            key_grad_CK, value_grad_CV = carry
            queries.await_full(block)
            slot = queries.slot(block)
            query = query_s.at[slot]
            score_CQ = wgmma(key, transposed(query, interpret), interpret)
            # A number a column is 16 registers a thread: what is needed late is loaded late, and the bandwidth twice.
            top_Q, log_sum_Q, bandwidth_Q = (load_row(rows_s.at[slot, i], _COLUMN) for i in range(3))
            exponent_CQ = jnp.minimum((score_CQ - _down(top_Q, shape)) * _down(bandwidth_Q * LOG2E, shape), 0.0)
            weight_CQ = jnp.exp2(exponent_CQ - _down(log_sum_Q, shape))
            if masked:
                start_Q, stop_Q = (load_row(ends_s.at[slot, i], _COLUMN) for i in range(2))
                stored_CQ = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + half * KEYS
                seen_CQ = (stored_CQ >= _down(start_Q, shape)) & (stored_CQ < _down(stop_Q, shape))
                weight_CQ = jnp.where(seen_CQ, weight_CQ, 0.0)
            grads.await_full(block)
            output_grad = output_grad_s.at[slot]
            value_grad_CV = add_wgmma(value_grad_CV, weight_CQ.astype(query_s.dtype), output_grad, interpret)
            weight_grad_CQ = wgmma(value, transposed(output_grad, interpret), interpret)
            grads.release(block)
            score_grad_CQ = weight_CQ * (weight_grad_CQ - _down(load_row(rows_s.at[slot, 3], _COLUMN), shape))
            score_grad_CQ *= _down(load_row(rows_s.at[slot, 2], _COLUMN), shape)
            key_grad_CK = add_wgmma(key_grad_CK, score_grad_CQ.astype(query_s.dtype), query, interpret)
            queries.release(block)
            return key_grad_CK, value_grad_CV

        nothing = zeros((KEYS, width), plgpu.Layout.WGMMA)
        key_grad_CK, value_grad_CV = in_three(bounds, step, (nothing, nothing))
        key[...] = key_grad_CK.astype(key_grad_ref.dtype)
        value[...] = value_grad_CV.astype(value_grad_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(key, key_grad_ref.at[batch, stored, head])
        plgpu.copy_smem_to_gmem(value, value_grad_ref.at[batch, stored, head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == WARPGROUPS)
    def _() -> None:
        def query_copies(block: jax.Array) -> list[tuple[Any, Any]]:
            rows = pl.ds(block * QUERIES, QUERIES)
            sources = query_ref.at[batch, rows, head], rows_ref.at[:, batch, head, rows], ends_ref.at[:, batch, rows]
            return list(zip(sources, (query_s, rows_s, ends_s), strict=True))

        def grad_copies(block: jax.Array) -> list[tuple[Any, Any]]:
            return [(output_grad_ref.at[batch, pl.ds(block * QUERIES, QUERIES), head], output_grad_s)]

        feed(bounds, (queries, query_copies), (grads, grad_copies))


def key_bounds(start_BT: jax.Array, stop_BT: jax.Array, stored: int) -> jax.Array:
    """For every 64 stored pairs: the blocks of queries that their tile has to visit, and those that see all 64.

    Exact for intervals that never decrease; for any others it visits more and takes less for whole. bounds_BNX: first
    block, first whole block, end of the whole blocks, end.
    """
    batch = start_BT.shape[0]
    start_BNQ, stop_BNQ = start_BT.reshape(batch, -1, QUERIES), stop_BT.reshape(batch, -1, QUERIES)
    sees_BNQ = start_BNQ < stop_BNQ
    # Running extremes along the row, so that each answer below is a count.
    furthest_BN = lax.cummax(jnp.max(stop_BNQ, axis=-1, where=sees_BNQ, initial=0), axis=1)
    nearest_BN = jnp.min(start_BNQ, axis=-1, where=sees_BNQ, initial=stored)
    nearest_BN = lax.cummin(nearest_BN, axis=1, reverse=True)
    latest_BN = lax.cummax(start_BNQ.max(-1), axis=1)
    earliest_BN = lax.cummin(stop_BNQ.min(-1), axis=1, reverse=True)
    blocks = start_BNQ.shape[1]

    def count(sorted_BN: jax.Array, limit_M: jax.Array, side: str) -> jax.Array:
        """How many of each row are below the limits ("left"), or not above them ("right")."""
        return jax.vmap(lambda sorted_N: jnp.searchsorted(sorted_N, limit_M, side=side))(sorted_BN)

    tile_M = jnp.repeat(jnp.arange(0, stored, WARPGROUPS * KEYS), WARPGROUPS)
    first_BM = count(furthest_BN, tile_M, "right")
    end_BM = count(nearest_BN, tile_M + WARPGROUPS * KEYS, "left")
    keys_M = jnp.arange(0, stored, KEYS)
    whole_BM = count(earliest_BN, keys_M + KEYS, "left")
    whole_end_BM = count(latest_BN, keys_M, "right")
    first_BM = jnp.minimum(first_BM, blocks)
    end_BM = jnp.maximum(end_BM, first_BM)
    return ordered(first_BM, whole_BM, whole_end_BM, end_BM)


def _gradients(
    query_BTHK: jax.Array,
    key_BSHK: jax.Array,
    value_BSHV: jax.Array,
    output_grad_BTHV: jax.Array,
    rows_XBHT: jax.Array,
    start_BT: jax.Array,
    stop_BT: jax.Array,
    interpret: Interpret,
    tiling: Tiling,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """dq, dβ (BHT), dk and dv of padded arrays. `rows`: the two sums, β and δ."""
    batch, time, heads, width = query_BTHK.shape
    stored, dtype = key_BSHK.shape[1], query_BTHK.dtype
    ends_XBT = jnp.stack([start_BT, stop_BT])
    operands = (query_BTHK, key_BSHK, value_BSHV, output_grad_BTHV, rows_XBHT, ends_XBT)
    two = plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS)
    stages = tiling.query_stages
    ring = plgpu.Barrier(num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
    query_kernel = plgpu.kernel(
        functools.partial(_query_kernel, tiling=tiling, interpret=interpret),
        out_type=(
            jax.ShapeDtypeStruct(query_BTHK.shape, dtype),
            jax.ShapeDtypeStruct((batch, heads, time), jnp.float32),
        ),
        grid=(heads, time // TILE, batch),
        scratch_types=[
            *[swizzled(QUERIES, width, WARPGROUPS, dtype)] * 2,
            *[swizzled(tiling.query_block, width, stages, dtype)] * 2,
            plgpu.SMEM((WARPGROUPS, QUERIES), jnp.float32),
            two, ring, ring, free, free,
        ],
        **launch_options("retrieve_query_grad", interpret),
    )  # fmt: skip
    query_grad_BTHK, bandwidth_grad_BHT = query_kernel(*operands, query_bounds(start_BT, stop_BT, tiling.query_block))
    stages = tiling.key_stages
    ring = plgpu.Barrier(num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
    key_kernel = plgpu.kernel(
        functools.partial(_key_kernel, tiling=tiling, interpret=interpret),
        out_type=(
            jax.ShapeDtypeStruct(key_BSHK.shape, dtype),
            jax.ShapeDtypeStruct(value_BSHV.shape, dtype),
        ),
        grid=(heads, stored // (WARPGROUPS * KEYS), batch),
        scratch_types=[
            *[swizzled(KEYS, width, WARPGROUPS, dtype)] * 2,
            *[swizzled(QUERIES, width, stages, dtype)] * 2,
            plgpu.SMEM((stages, 4, QUERIES), jnp.float32),
            plgpu.SMEM((stages, 2, QUERIES), jnp.int32),
            two, plgpu.Barrier(num_arrivals=3, num_barriers=stages), ring, free, free,
        ],
        **launch_options("retrieve_key_grad", interpret),
    )  # fmt: skip
    key_grad_BSHK, value_grad_BSHV = key_kernel(*operands, key_bounds(start_BT, stop_BT, stored))
    return query_grad_BTHK, bandwidth_grad_BHT, key_grad_BSHK, value_grad_BSHV


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def retrieve_hopper(
    query_BTHK: jax.Array,
    key_BSHK: jax.Array,
    value_BSHV: jax.Array,
    bandwidth_BTH: jax.Array,
    start_BT: jax.Array,
    stop_BT: jax.Array,
    unit_norm: bool = False,
    interpret: Interpret = None,
    tiling: Tiling = TILING,
) -> jax.Array:
    """`retrieve` by the Hopper kernels; K = V, 64 or 128, in bfloat16.

    `unit_norm` promises |q·k| <= 1. `interpret`: `plgpu.InterpretGPUParams` where there is no GPU.
    """
    inputs = (query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH, start_BT, stop_BT)
    return _forward(*inputs, unit_norm, interpret, tiling)[0]


def _forward(
    query_BTHK: jax.Array,
    key_BSHK: jax.Array,
    value_BSHV: jax.Array,
    bandwidth_BTH: jax.Array,
    start_BT: jax.Array,
    stop_BT: jax.Array,
    unit_norm: bool,
    interpret: Interpret,
    tiling: Tiling,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    inputs = (query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH, start_BT, stop_BT)
    query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH, start_BT, stop_BT = _padded(tiling, *inputs)
    scale_BHT = bandwidth_BTH.swapaxes(1, 2) * LOG2E
    output_BTHV, sums_2BHT = forward(
        query_BTHK, key_BSHK, value_BSHV, scale_BHT, start_BT, stop_BT, unit_norm, interpret, tiling
    )
    output_BTHV, sums_2BHT = (checkpoint_name(array, "retrieved") for array in (output_BTHV, sums_2BHT))
    return output_BTHV[:, : inputs[0].shape[1]], (*inputs, output_BTHV, sums_2BHT)


def _padded(
    tiling: Tiling,
    query_BTHK: jax.Array,
    key_BSHK: jax.Array,
    value_BSHV: jax.Array,
    bandwidth_BTH: jax.Array,
    start_BT: jax.Array,
    stop_BT: jax.Array,
) -> tuple[jax.Array, ...]:
    """Whole tiles and blocks. Empty intervals get stop = start; the queries added see nothing, after all pairs."""
    whole = math.lcm(tiling.block, tiling.query_block, WARPGROUPS * KEYS)
    key_BSHK, value_BSHV = pad_time(key_BSHK, whole), pad_time(value_BSHV, whole)
    stop_BT = jnp.maximum(start_BT, stop_BT)
    after = key_BSHK.shape[1]
    return (
        pad_time(query_BTHK, TILE),
        key_BSHK,
        value_BSHV,
        pad_time(bandwidth_BTH.astype(jnp.float32), TILE),
        pad_time(start_BT, TILE, after),
        pad_time(stop_BT, TILE, after),
    )


def _backward(
    unit_norm: bool,
    interpret: Interpret,
    tiling: Tiling,
    residuals: tuple[jax.Array, ...],
    output_grad_BTHV: jax.Array,
) -> tuple[jax.Array | None, ...]:
    *inputs, output_BTHV, sums_2BHT = residuals
    query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH, start_BT, stop_BT = _padded(tiling, *inputs)
    output_grad_BTHV = pad_time(output_grad_BTHV, TILE)
    delta_BTH = jnp.sum(output_grad_BTHV.astype(jnp.float32) * output_BTHV.astype(jnp.float32), axis=-1)
    rows_XBHT = jnp.concatenate([sums_2BHT, jnp.stack([bandwidth_BTH.swapaxes(1, 2), delta_BTH.swapaxes(1, 2)])])
    query_grad_BTHK, bandwidth_grad_BHT, key_grad_BSHK, value_grad_BSHV = _gradients(
        query_BTHK, key_BSHK, value_BSHV, output_grad_BTHV, rows_XBHT, start_BT, stop_BT, interpret, tiling
    )
    time, stored = inputs[0].shape[1], inputs[1].shape[1]
    return (
        query_grad_BTHK[:, :time],
        key_grad_BSHK[:, :stored],
        value_grad_BSHV[:, :stored],
        bandwidth_grad_BHT.swapaxes(1, 2)[:, :time].astype(inputs[3].dtype),
        None,
        None,
    )


retrieve_hopper.defvjp(_forward, _backward)
