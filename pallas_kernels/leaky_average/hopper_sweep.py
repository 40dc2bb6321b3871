"""The two Mosaic GPU kernels of `hopper.py`: a recurrence over time in chunks. What a step does is an argument.

A block of threads is one warpgroup. Each of its four warps runs a chunk of its own, one position a step, and holds the
state in registers: a lane has K / 32 neighbouring features. A sum over K is then five shuffles inside a warp, which the
next step does not wait for, and warps never wait for each other.

Arrays are of two kinds. *Rows* have features: [B, N, C, H, K], in the order in which they lie in memory anyway.
*Factors* have one number for each position and head: [B, H, G, C, W], so that a step's factors are neighbours. N counts
chunks, C positions of a chunk, G groups of W = 4 chunks (a block works on one), and suffix _W is one per warp.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPS = 4  # of a warpgroup, and so the chunks of a block
_LANES = 32
# Steps of one turn of the loop: all their rows are read first, and the sums over K of one step overlap with the next.
UNROLL = 4

Arrays = tuple[jax.Array, ...]
# Of one position, one per warp, all float32: the state, rows and factors -> the next state, and what to write there.
Step = Callable[[jax.Array, Arrays, Arrays], tuple[jax.Array, Arrays]]


def chunk_ends(
    step: Step,
    rows: Arrays,
    factors: Arrays,
    *,
    reverse: bool = False,
    interpret: Any,
) -> jax.Array:
    """The state after each chunk that starts from zero, [B, H, N, K]; in reverse, after its first position."""
    B, N, C, H, K = rows[0].shape

    def body(row_refs: Any, factor_refs: Any, ends_ref: Any, *, tiles: Any, barrier: Any) -> None:
        b, h, g, chunks = _position()
        sources = [ref.at[b, chunks, :, h] for ref in row_refs] + [ref.at[b, h, g] for ref in factor_refs]
        _load(sources, [*tiles["rows"], *tiles["factors"]], barrier)
        zero_WK = plgpu.layout_cast(jnp.zeros((WARPS, K), jnp.float32), _layout(K))

        def advance(index: jax.Array, state_WK: jax.Array) -> jax.Array:
            for _, arguments in _turn(index, reverse, tiles):
                state_WK, _ = step(state_WK, *arguments)
            return state_WK

        ends_ref[b, h, chunks] = lax.fori_loop(0, C // UNROLL, advance, zero_WK)

    ends = jax.ShapeDtypeStruct((B, H, N, K), jnp.float32)
    return _run(f"leaky_average{step.__name__}", body, (ends,), {}, (rows, factors), interpret)[0]


def replay(
    step: Step,
    rows: Arrays,
    factors: Arrays,
    entering_BHNK: jax.Array,
    num_written: int,
    *,
    reverse: bool = False,
    interpret: Any,
) -> Arrays:
    """What `step` writes at every position: one array like the rows and `num_written` like the factors."""
    _, _, C, _, K = rows[0].shape

    def body(
        row_refs: Any, factor_refs: Any, entering_ref: Any, row_ref: Any, *written_refs: Any, tiles: Any, barrier: Any
    ) -> None:
        b, h, g, chunks = _position()
        sources = [ref.at[b, chunks, :, h] for ref in row_refs] + [ref.at[b, h, g] for ref in factor_refs]
        sources.append(entering_ref.at[b, h, chunks])
        _load(sources, [*tiles["rows"], *tiles["factors"], tiles["entering"]], barrier)
        row_tile = tiles["rows"][0]

        def advance(index: jax.Array, state_WK: jax.Array) -> jax.Array:
            for t, arguments in _turn(index, reverse, tiles):
                state_WK, (row_WK, *written) = step(state_WK, *arguments)
                # Over the row that was read: by the very lanes that read it, and it is not needed again.
                row_tile[:, t] = row_WK.astype(row_tile.dtype)
                for tile, factor_W in zip(tiles["written"], written, strict=True):
                    tile[t] = factor_W
            return state_WK

        entering_WK = plgpu.load(tiles["entering"], layout=_layout(K), optimized=False)
        lax.fori_loop(0, C // UNROLL, advance, entering_WK)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(row_tile, row_ref.at[b, chunks, :, h])
        for tile, ref in zip(tiles["written"], written_refs, strict=True):
            plgpu.copy_smem_to_gmem(tile, ref.at[b, h, g])
        plgpu.wait_smem_to_gmem(0)

    row, factor = (jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (rows[0], factors[0]))
    tiles = {
        "entering": plgpu.SMEM((WARPS, K), jnp.float32),
        "written": tuple(plgpu.SMEM((C, WARPS), jnp.float32) for _ in range(num_written)),
    }
    results = (row, *[factor] * num_written)
    return _run(f"leaky_average{step.__name__}", body, results, tiles, (rows, factors, entering_BHNK), interpret)


def _run(
    name: str,
    body: Callable[..., None],
    results: tuple[jax.ShapeDtypeStruct, ...],
    more_tiles: dict[str, Any],
    operands: tuple[Any, ...],
    interpret: Any,
) -> Arrays:
    """One block for each head of each group of four chunks. Its tiles are [W, C, K] of rows, [C, W] of factors."""
    rows, factors, *_ = operands
    B, N, C, H, K = rows[0].shape
    tiles = {
        "rows": tuple(plgpu.SMEM((WARPS, C, K), row.dtype) for row in rows),
        "factors": tuple(plgpu.SMEM((C, WARPS), jnp.float32) for _ in factors),
        **more_tiles,
    }
    kernel = plgpu.kernel(
        body,
        out_type=results,
        grid=(B, N // WARPS, H),  # the heads of one position, which are neighbours in memory, run side by side
        grid_names=("b", "g", "h"),
        scratch_types={"tiles": tiles, "barrier": plgpu.Barrier(num_arrivals=len(jax.tree.leaves(operands)))},
        # No lane reads what another lane wrote, so nothing in the loop needs a barrier.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
        kernel_name=name,
    )
    # Inside shard_map a result varies over the mesh axes of the input, which plgpu.kernel does not say.
    axes = tuple(sorted(jax.typeof(rows[0]).manual_axis_type.varying))
    return tuple(lax.pcast(result, axes, to="varying") if axes else result for result in kernel(*operands))


def _position() -> tuple[Any, Any, Any, Any]:
    """The row of the batch, the head, the group of chunks and the chunks of this block."""
    b, h, g = (lax.axis_index(name) for name in "bhg")
    return b, h, g, pl.ds(g * WARPS, WARPS)


def _load(sources: list[Any], tiles: list[Any], barrier: Any) -> None:
    """Copies this block's part of every operand to shared memory, and waits for all."""
    for source, tile in zip(sources, tiles, strict=True):
        plgpu.copy_gmem_to_smem(source, tile, barrier)
    plgpu.barrier_wait(barrier)


def _turn(index: jax.Array, reverse: bool, tiles: Any) -> list[tuple[jax.Array, tuple[Any, Any]]]:
    """The positions of one turn of the loop in the order of travel, with each warp's rows and factors in float32."""
    _, C, K = tiles["rows"][0].shape
    layout = _layout(K)

    def read(t: jax.Array) -> tuple[Arrays, Arrays]:
        rows = (plgpu.load(tile.at[:, t], layout=layout, optimized=False) for tile in tiles["rows"])
        factors = (plgpu.load(tile.at[t], layout=layout.reduce(1), optimized=False) for tile in tiles["factors"])
        return tuple(row_WK.astype(jnp.float32) for row_WK in rows), tuple(factors)

    steps = [index * UNROLL + offset for offset in range(UNROLL)]
    positions = [C - 1 - step for step in steps] if reverse else steps
    return [(t, read(t)) for t in positions]


def _layout(K: int) -> Any:
    """Of a [W, K] array in registers: a warp has a row, and a lane has neighbouring features of it."""
    tiling = plgpu.Tiling(((WARPS, K), (K // _LANES,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
