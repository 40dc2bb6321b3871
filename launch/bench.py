"""The train step of the mosaic beside our own transformer at the same widths.

python -m launch.bench

Width 256, 4 layers, 4 heads, feed-forward 768, vocabulary 8,192, 4,096 tokens a step, float32, unpacked rows. The two
take turns; the ratio is the median over the rounds of one step after the other.
"""

import dataclasses
import functools
import statistics
from typing import Any

from absl import flags

from launch import command

_ROUNDS = flags.DEFINE_integer("rounds", 15, "timed steps of each model")
_LENGTHS = flags.DEFINE_list("lengths", ["512", "1024", "2048", "4096"], "row lengths T; 4096 / T rows a step")

TOKENS = 4096


def _config(architecture: str, memories: tuple[str, ...], context: int) -> Any:
    from mosaics_jax import config as c

    model = c.ModelConfig(
        architecture=architecture, memories=memories, vocabulary=8192, layers=4, width=256, heads=4, ffn_width=768,
        compute_dtype="float32", remat="none",
    )  # fmt: skip
    config = c.Config(model=model)
    data = dataclasses.replace(config.data, context=context, batch=TOKENS // context)
    return dataclasses.replace(config, data=data)


def main() -> None:
    import jax
    import numpy as np

    from mosaics_jax.data.source import pack
    from mosaics_jax.step import init_state, make_train_step
    from pallas_kernels.timing import interleaved, median_ratio

    print(f"train step, {TOKENS} tokens, float32, {jax.devices()[0].device_kind}; medians of {_ROUNDS.value}")
    print(f"{'T':>6}{'mosaic ms':>12}{'transformer ms':>16}{'ratio':>8}")
    for context in map(int, _LENGTHS.value):
        calls = []
        for architecture, memories in (("mosaic", ("short", "long")), ("transformer", ("full",))):
            config = _config(architecture, memories, context)
            state = jax.jit(functools.partial(init_state, config))()
            window = np.random.default_rng(0).integers(1, 8192, (TOKENS // context, context + 1), dtype=np.int32)
            batch = jax.device_put(pack(window, begin=0))
            step = jax.jit(make_train_step(config)).lower(state, batch).compile()
            calls.append(functools.partial(step, state, batch))
        mosaic, transformer = interleaved(calls, _ROUNDS.value)
        print(
            f"{context:>6}{statistics.median(mosaic) * 1e3:>12.0f}{statistics.median(transformer) * 1e3:>16.0f}"
            f"{median_ratio(mosaic, transformer):>8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    command.run(main)
