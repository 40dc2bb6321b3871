"""`retrieve` on Hopper GPUs, forward: Mosaic GPU, warp-specialised.

A thread block owns one head and a tile of 2 x 64 queries. One warpgroup copies the stored pairs, block after block, by
TMA into a ring of buffers; two others, of 64 queries each, multiply (wgmma) and keep an online softmax:

    s = q k^T,   m' = max(m, rowmax(s)),   p = exp2(β' (s - m')),   β' = β log2(e)
    o = exp2(β' (m - m')) o + p v,   l = exp2(β' (m - m')) l + rowsum(p)

The maximum is taken of s and not of β' s, so that at any β the nearest key weighs 1 exactly, in backward as well.

Only blocks that some query of the tile sees are copied; only blocks that some query sees in part are masked. Where the
caller promises keys and queries of norm 1, scores are bounded by β, and while β is small enough a constant takes the
place of the maximum: exp2(β' (s - 1) + SHIFT) stays within range, so there is no row maximum and no rescaling of o.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

QUERIES = 64  # of a warpgroup
WARPGROUPS = 2  # that compute
TILE = QUERIES * WARPGROUPS
WIDTHS = (64, 128)  # of keys and values, which must agree

LOG2E = math.log2(math.e)
# With |q·k| <= 1 every weight exp2(β' (s - 1) + SHIFT) lies in [2^(SHIFT - 2β'), 2^SHIFT]. For β <= BOUND the least is
# 2^-116, a normal number, and a sum of 2^26 of the greatest, times values of 2^40, still stays below 2^128.
SHIFT = 60.0
BOUND = 60.0
ABOVE = 1 + 2**-6  # what rounding to bfloat16 makes of 1, for sure
LEAST = -1e30  # below every score, yet finite


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernels cut their work: what a benchmark may vary without a change of any result but its rounding."""

    block: int = 128  # stored pairs of a block of forward
    stages: int = 2  # buffers of forward's ring
    query_block: int = 64  # stored pairs of a block in the query's role, backward
    query_stages: int = 2
    key_stages: int = 2  # of the ring of queries, in the key's role


TILING = Tiling()

# How a warpgroup takes its weights from scores; of its 64 queries, the first that applies.
SIGNED = 0  # some β is negative: running maximum of sign(β) s
CONSTANT = 1  # lengths of at most 1 are promised and β <= BOUND
RUNNING = 2  # running maximum of s

_ROW = plgpu.Layout.WGMMA.reduce(1)
Interpret = Any  # None on a GPU; plgpu.InterpretGPUParams on a CPU


def wgmma(a: Any, b: Any, interpret: Interpret) -> jax.Array:
    """a @ b in float32: a in shared memory or registers, b in shared memory.

    The interpreter knows no race clocks for wgmma's operands, no operand in registers and no `run_state`; there, plain
    loads and a dot stand in, which it does check for races.
    """
    if interpret is not None:
        product = jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # these reads come before the buffer's next copy
        return product

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def add_wgmma(sum_MN: jax.Array, a: Any, b: Any, interpret: Interpret) -> jax.Array:
    """sum + a @ b."""
    if interpret is not None:
        return sum_MN + wgmma(a, b, interpret)
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))(plgpu.ACC.init(sum_MN))


def transposed(ref: Any, interpret: Interpret) -> Any:
    """The transpose of a buffer, as an operand of `wgmma`."""
    return ref[...].T if interpret is not None else ref.transpose((1, 0))


def across(row: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """One number a row, for all columns."""
    return lax.broadcast_in_dim(row, shape, [0])


def zeros(shape: tuple[int, ...], layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def pad_time(array_BTX: jax.Array, size: int, value: int = 0) -> jax.Array:
    """T padded to a multiple of `size`."""
    padding = [(0, 0)] * array_BTX.ndim
    padding[1] = (0, -array_BTX.shape[1] % size)
    return jnp.pad(array_BTX, padding, constant_values=value)


def swizzled(rows: int, width: int, buffers: int, dtype: Any) -> Any:
    """Buffers in the layout that wgmma and TMA share."""
    transforms: Any = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
    return plgpu.SMEM((buffers, rows, width), dtype, transforms=transforms)


class Ring:
    """`stages` buffers that one warpgroup fills and others read: `full` and `empty` barriers, one each a buffer."""

    def __init__(self, full: Any, empty: Any, first: jax.Array, stages: int):
        self._full, self._empty, self._first, self._stages = full, empty, first, stages

    def slot(self, step: jax.Array) -> jax.Array:
        return lax.rem(step - self._first, self._stages)

    def fill(self, step: jax.Array, *copies: tuple[Any, Any]) -> None:
        """Waits until the buffer is free, then starts its copies."""
        slot = self.slot(step)

        @pl.when(step - self._first >= self._stages)
        def _() -> None:
            plgpu.barrier_wait(self._empty.at[slot])

        for source, buffer in copies:
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], self._full.at[slot])

    def await_full(self, step: jax.Array) -> None:
        plgpu.barrier_wait(self._full.at[self.slot(step)])

    def release(self, step: jax.Array) -> None:
        plgpu.barrier_arrive(self._empty.at[self.slot(step)])

    def drain(self, end: jax.Array) -> None:
        """Observes the last releases, which nobody waits for: no barrier may be left in the middle of a phase."""

        def observe(step: jax.Array, _: None) -> None:
            plgpu.barrier_wait(self._empty.at[self.slot(step)])

        lax.fori_loop(lax.max(self._first, end - self._stages), end, observe, None)


def place(bounds_ref: Any) -> tuple[Any, Any, Any, Any, list[Any]]:
    """Of this warpgroup: row of the batch, head, which 64 of the tiles' rows, its number, and its four bounds."""
    batch, head, tile, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "tile", "warpgroup"))
    half = tile * WARPGROUPS + lax.min(warpgroup, WARPGROUPS - 1)
    return batch, head, half, warpgroup, [bounds_ref[batch, half, i] for i in range(4)]


def feed(bounds: list[Any], *fillings: tuple[Ring, Callable[[jax.Array], Any]]) -> None:
    """What the copying warpgroup does: fills the rings, block after block, with the copies made for a block."""
    plgpu.set_max_registers(40, action="decrease")

    def copy(block: jax.Array, _: None) -> None:
        for ring, copies in fillings:
            ring.fill(block, *copies(block))

    lax.fori_loop(bounds[0], bounds[3], copy, None)
    for ring, _ in fillings:
        ring.drain(bounds[3])


def feed_pairs(bounds: list[Any], keys: Ring, values: Ring, refs: Any, buffers: Any, batch: Any, head: Any) -> None:
    """`feed` of blocks of keys and of values; a block is as long as their buffers."""
    size = buffers[0].shape[1]

    def copies(which: int) -> Callable[[jax.Array], Any]:
        return lambda block: [(refs[which].at[batch, pl.ds(block * size, size), head], buffers[which])]

    feed(bounds, (keys, copies(0)), (values, copies(1)))


def ordered(first_BN: jax.Array, whole_BN: jax.Array, whole_end_BN: jax.Array, end_BN: jax.Array) -> jax.Array:
    """bounds_BNX, each at least the one before it and none past the end."""
    whole_BN = jnp.clip(whole_BN, first_BN, end_BN)
    whole_end_BN = jnp.clip(whole_end_BN, whole_BN, end_BN)
    return jnp.stack([first_BN, whole_BN, whole_end_BN, end_BN], axis=-1).astype(jnp.int32)


def query_bounds(start_BT: jax.Array, stop_BT: jax.Array, block: int) -> jax.Array:
    """For every 64 queries: the blocks that their tile visits, and those of them that all 64 see whole.

    bounds_BNX: first block, first whole block, end of the whole blocks, end.
    """
    batch = start_BT.shape[0]
    start_BNQ, stop_BNQ = start_BT.reshape(batch, -1, TILE), stop_BT.reshape(batch, -1, TILE)
    sees_BNQ = start_BNQ < stop_BNQ
    first_BN = jnp.min(start_BNQ, axis=-1, where=sees_BNQ, initial=jnp.iinfo(jnp.int32).max) // block
    end_BN = -(-jnp.max(stop_BNQ, axis=-1, where=sees_BNQ, initial=0) // block)
    first_BN = jnp.minimum(first_BN, end_BN)
    first_BN, end_BN = (jnp.repeat(bound_BN, WARPGROUPS, axis=1) for bound_BN in (first_BN, end_BN))
    # A query that sees nothing has start = stop, and so no block is whole for it.
    whole_BN = -(-jnp.max(start_BT.reshape(batch, -1, QUERIES), axis=-1) // block)
    whole_end_BN = jnp.min(stop_BT.reshape(batch, -1, QUERIES), axis=-1) // block
    return ordered(first_BN, whole_BN, whole_end_BN, end_BN)


def in_three(bounds: list[jax.Array], step: Callable[[bool, jax.Array, Any], Any], carry: Any) -> Any:
    """step(masked, block, carry) over the blocks seen in part, whole, in part."""
    first, whole, whole_end, end = bounds
    carry = lax.fori_loop(first, whole, functools.partial(step, True), carry)
    carry = lax.fori_loop(whole, whole_end, functools.partial(step, False), carry)
    return lax.fori_loop(whole_end, end, functools.partial(step, True), carry)


def visible(block: jax.Array, start_Q: jax.Array, stop_Q: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Which pairs of a tile (queries down, stored pairs across) the intervals show."""
    stored_QC = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + block * shape[1]
    return (stored_QC >= across(start_Q, shape)) & (stored_QC < across(stop_Q, shape))


def load_row(ref: Any, layout: Any = _ROW) -> jax.Array:
    return plgpu.load(ref, layout=layout, optimized=False)


def _forward_kernel(
    query_ref, key_ref, value_ref, scale_ref, start_ref, stop_ref, bounds_ref, mode_ref,
    output_ref, sums_ref,
    query_s, key_s, value_s, sums_s, query_full, key_full, value_full, key_empty, value_empty,
    *, unit_norm, tiling, interpret,
):  # fmt: skip
    """o and the two sums of a tile of queries."""
    batch, head, half, warpgroup, bounds = place(bounds_ref)
    keys = Ring(key_full, key_empty, bounds[0], tiling.stages)
    values = Ring(value_full, value_empty, bounds[0], tiling.stages)
    score_shape, output_shape = (QUERIES, tiling.block), (QUERIES, value_ref.shape[-1])

    def compute(mode: int) -> None:
        rows = pl.ds(half * QUERIES, QUERIES)
        scale_Q = load_row(scale_ref.at[batch, head, rows])
        sign_Q = jnp.where(scale_Q < 0, -1.0, 1.0)
        scale_Q = jnp.abs(scale_Q)
        start_Q, stop_Q = (load_row(ref.at[batch, rows]) for ref in (start_ref, stop_ref))
        query = query_s.at[warpgroup]

        def step(masked: bool, block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            output_QV, top_Q, total_Q = carry
            keys.await_full(block)
            score_QC = wgmma(query, transposed(key_s.at[keys.slot(block)], interpret), interpret)
            keys.release(block)
            if mode == SIGNED:
                score_QC = score_QC * across(sign_Q, score_shape)
            seen_QC = visible(block, start_Q, stop_Q, score_shape) if masked else None

            def hide(array_QC: jax.Array, fill: float) -> jax.Array:
                return array_QC if seen_QC is None else jnp.where(seen_QC, array_QC, fill)

            if mode == CONSTANT:
                exponent_QC = (score_QC - 1) * across(scale_Q, score_shape) + SHIFT
            else:
                new_top_Q = jnp.maximum(top_Q, hide(score_QC, LEAST).max(axis=1))
                shrink_Q = jnp.exp2((top_Q - new_top_Q) * scale_Q)
                exponent_QC = (score_QC - across(new_top_Q, score_shape)) * across(scale_Q, score_shape)
                output_QV, total_Q, top_Q = output_QV * across(shrink_Q, output_shape), total_Q * shrink_Q, new_top_Q
            weight_QC = jnp.exp2(hide(exponent_QC, -jnp.inf))
            total_Q += weight_QC.sum(axis=1)
            values.await_full(block)
            weight_QC = weight_QC.astype(value_s.dtype)
            output_QV = add_wgmma(output_QV, weight_QC, value_s.at[values.slot(block)], interpret)
            values.release(block)
            return output_QV, top_Q, total_Q

        nothing_Q = zeros((QUERIES,), _ROW)
        carry = (zeros(output_shape, plgpu.Layout.WGMMA), nothing_Q + LEAST, nothing_Q)
        output_QV, top_Q, total_Q = in_three(bounds, step, carry)
        divisor_Q = jnp.where(total_Q > 0, total_Q, 1.0)
        # Backward makes each weight again from these two: exp2(β' (s - top) - log_sum), with s - top of the sign that
        # keeps it at most 1. Where nothing is seen the log-sum is +inf, and every weight 0.
        log_sum_Q = jnp.log(divisor_Q) * LOG2E
        if mode == CONSTANT:
            top_Q, log_sum_Q = nothing_Q + ABOVE, log_sum_Q - SHIFT - (ABOVE - 1) * scale_Q
        sums_s[warpgroup, 0] = jnp.where(total_Q > 0, top_Q * sign_Q, 0.0)
        sums_s[warpgroup, 1] = jnp.where(total_Q > 0, log_sum_Q, jnp.inf)
        # The queries are done with, and their buffer is of the output's shape.
        query[...] = (output_QV * across(1 / divisor_Q, output_shape)).astype(output_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(query, output_ref.at[batch, rows, head])
        plgpu.copy_smem_to_gmem(sums_s.at[warpgroup], sums_ref.at[:, batch, head, rows])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        rows = pl.ds(half * QUERIES, QUERIES)
        plgpu.copy_gmem_to_smem(query_ref.at[batch, rows, head], query_s.at[warpgroup], query_full.at[warpgroup])
        plgpu.barrier_wait(query_full.at[warpgroup])
        chosen = mode_ref[batch, head, half]
        for mode in (SIGNED, CONSTANT, RUNNING) if unit_norm else (SIGNED, RUNNING):
            pl.when(chosen == mode)(functools.partial(compute, mode))

    @pl.when(warpgroup == WARPGROUPS)
    def _() -> None:
        feed_pairs(bounds, keys, values, (key_ref, value_ref), (key_s, value_s), batch, head)


def launch_options(name: str, interpret: Interpret) -> dict[str, Any]:
    """What the three kernels have in common; `name` is what a profiler shows."""
    return {
        "kernel_name": name,
        "grid_names": ("head", "tile", "batch"),
        "num_threads": WARPGROUPS + 1,
        "thread_name": "warpgroup",
        "compiler_params": plgpu.CompilerParams(approx_math=True),
        "interpret": interpret,
    }


def forward(
    query_BTHK: jax.Array,
    key_BSHK: jax.Array,
    value_BSHV: jax.Array,
    scale_BHT: jax.Array,
    start_BT: jax.Array,
    stop_BT: jax.Array,
    unit_norm: bool,
    interpret: Interpret = None,
    tiling: Tiling = TILING,
) -> tuple[jax.Array, jax.Array]:
    """o_BTHV of padded arrays (T whole tiles, S whole blocks), and sums_2BHT that backward remakes weights from.

    The sums: the maximum of s (or what stood in for it), and log2 of the weights' sum relative to it.
    """
    batch, time, heads, width = query_BTHK.shape
    value_width = value_BSHV.shape[-1]
    scale_BHNQ = scale_BHT.reshape(batch, heads, -1, QUERIES)
    bounded_BHN = jnp.logical_and(unit_norm, scale_BHNQ.max(-1) <= BOUND * LOG2E)
    mode_BHN = jnp.where(scale_BHNQ.min(-1) < 0, SIGNED, jnp.where(bounded_BHN, CONSTANT, RUNNING)).astype(jnp.int32)
    dtype = query_BTHK.dtype
    ring = plgpu.Barrier(num_barriers=tiling.stages)
    free = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiling.stages)
    kernel = plgpu.kernel(
        functools.partial(_forward_kernel, unit_norm=unit_norm, tiling=tiling, interpret=interpret),
        out_type=(
            jax.ShapeDtypeStruct((batch, time, heads, value_width), dtype),
            jax.ShapeDtypeStruct((2, batch, heads, time), jnp.float32),
        ),
        grid=(heads, time // TILE, batch),
        scratch_types=[
            swizzled(QUERIES, width, WARPGROUPS, dtype),
            swizzled(tiling.block, width, tiling.stages, dtype),
            swizzled(tiling.block, value_width, tiling.stages, dtype),
            plgpu.SMEM((WARPGROUPS, 2, QUERIES), jnp.float32),
            plgpu.Barrier(num_barriers=WARPGROUPS),
            ring, ring, free, free,
        ],
        **launch_options("retrieve_forward", interpret),
    )  # fmt: skip
    bounds_BNX = query_bounds(start_BT, stop_BT, tiling.block)
    return kernel(query_BTHK, key_BSHK, value_BSHV, scale_BHT, start_BT, stop_BT, bounds_BNX, mode_BHN)
