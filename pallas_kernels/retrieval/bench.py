"""Time and memory of `retrieve`, forward and backward, against the length of the row.

python -m pallas_kernels.retrieval.bench

Two heads of width 64, float32, one unpacked row. Memory is what the compiled program holds at its peak beside its
arguments and results, by the compiler's own account. The lengths take turns; growth is that of
the medians.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.retrieval.api import retrieve
from pallas_kernels.timing import interleaved

WINDOW, DELAY = 256, 64
HEADS, WIDTH = 2, 64


def _intervals(time: int) -> dict[str, tuple[jax.Array, jax.Array]]:
    position_BT = jnp.arange(time)[None]
    zero_BT = jnp.zeros_like(position_BT)
    return {
        "short-term": (jnp.maximum(0, position_BT - WINDOW + 1), position_BT),
        "long-term": (zero_BT, jnp.maximum(0, position_BT - DELAY + 1)),
    }


def _compile(time: int, start_BT: jax.Array, stop_BT: jax.Array) -> tuple[Callable[[], Any], float]:
    """A call of forward and backward, and the MiB that it needs."""
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (1, time, HEADS, WIDTH)
    key_BTHK, value_BTHV, weight_BTHV = (jax.random.normal(key, shape) for key in keys)
    key_BTHK /= jnp.linalg.norm(key_BTHK, axis=-1, keepdims=True)
    bandwidth_BTH = jnp.full(shape[:3], 20.0)

    def loss(key_BTHK: jax.Array, value_BTHV: jax.Array, bandwidth_BTH: jax.Array) -> jax.Array:
        output_BTHV = retrieve(key_BTHK, key_BTHK, value_BTHV, bandwidth_BTH, start_BT, stop_BT)
        return (output_BTHV * weight_BTHV).sum()

    arguments = (key_BTHK, value_BTHV, bandwidth_BTH)
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    return lambda: compiled(*arguments), memory.temp_size_in_bytes / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each, all lengths in turn")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**k for k in range(10, 16)])
    parser.add_argument("--memories", nargs="+", default=["short-term", "long-term"])
    options = parser.parse_args()
    print(f"retrieve, forward + backward, {HEADS} heads of width {WIDTH}, float32, {jax.devices()[0].device_kind}")
    print(f"{'memory':<11}{'T':>7}{'ms':>10}{'x before':>10}{'ns/pair':>10}{'MiB':>9}{'x before':>10}")
    for name in options.memories:
        intervals = [_intervals(time)[name] for time in options.lengths]
        calls, mebibytes = zip(*map(_compile, options.lengths, *zip(*intervals, strict=True)), strict=True)
        medians = [statistics.median(seconds) for seconds in interleaved(calls, options.rounds)]
        for number, (time, (start_BT, stop_BT)) in enumerate(zip(options.lengths, intervals, strict=True)):
            before = max(0, number - 1)
            pairs = HEADS * float((stop_BT - start_BT).sum(dtype=jnp.float32))
            now, memory = medians[number], mebibytes[number]
            row = f"{name:<11}{time:>7}{now * 1e3:>10.1f}{now / medians[before]:>10.2f}{now * 1e9 / pairs:>10.2f}"
            row += f"{memory:>9.1f}{memory / mebibytes[before]:>10.2f}"
            print(row, flush=True)


if __name__ == "__main__":
    main()
