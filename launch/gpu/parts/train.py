"""The train step of configs/small.py on one GPU: rows of 4,096 tokens, of its batch what every Hopper card holds."""

import functools
import math
import statistics
import time
from typing import Any

import numpy as np

from launch.gpu.parts.context import Context
from launch.gpu.problem import Setting
from launch.gpu.programs import Made, Program, average_kernels, read_kernels

ROWS = 4  # of 4,096 tokens: 54 GiB by the compiler's account (docs/kernels.md)
_WARM_UP, _TIMED = 2, 10


@functools.cache
def config(setting: Setting) -> Any:
    """The recipe's config, its batch cut; in a dry run the tiny one, with kernels that run anywhere."""
    from mosaics_jax.config import Config, default_config

    if setting.interpret:
        from configs import tiny as recipe
    else:
        from configs import small as recipe  # type: ignore[no-redef]
    values = recipe.get_config().to_dict()
    values["data"]["batch"] = 1 if setting.interpret else ROWS
    values["run"]["accumulation"] = 1
    values["mesh"] = default_config().mesh.to_dict()
    if setting.interpret:
        values["data"]["context"] = 64
    return Config.from_dict(values)


def _init(setting: Setting) -> tuple[Any, ...]:
    import jax

    from mosaics_jax.step import init_state

    return tuple(jax.tree.leaves(init_state(config(setting))))


def _made_step(setting: Setting) -> Made:
    """(*state, *batch) -> (*state, loss, visible pairs), all of them leaves; the state is given up."""
    import jax
    import jax.numpy as jnp

    from mosaics_jax.step import init_state, make_train_step

    shapes = jax.eval_shape(functools.partial(init_state, config(setting)))
    leaves, tree = jax.tree.flatten(shapes)
    rows = batch(setting)
    step = make_train_step(config(setting))

    def function(*arrays: Any) -> tuple[Any, ...]:
        state = jax.tree.unflatten(tree, arrays[: len(leaves)])
        state, metrics = step(state, type(rows)(*arrays[len(leaves) :]))
        pairs = sum(jnp.sum(health["pairs"].astype(jnp.float32)) for health in metrics["health"].values())
        return *jax.tree.leaves(state), metrics["loss"], jnp.asarray(pairs)

    arguments = (*leaves, *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in rows))
    return Made(function, arguments, donate=tuple(range(len(leaves))))


def batch(setting: Setting) -> Any:
    """Random tokens, one document a row."""
    from mosaics_jax.data.source import pack

    chosen = config(setting)
    shape = (chosen.data.batch, chosen.data.context + 1)
    return pack(np.random.default_rng(0).integers(1, chosen.model.vocabulary, shape, dtype=np.int32), begin=0)


def all_programs(setting: Setting) -> list[Program]:
    """The state before the first step, and a step."""
    kernels = () if setting.interpret else (*read_kernels().values(), *average_kernels().values())
    return [
        Program("train state", lambda: Made(functools.partial(_init, setting), ())),
        Program("train step", functools.partial(_made_step, setting), kernels),
    ]


def run(context: Context, *, compiled_here: bool = False) -> None:
    """`compiled_here`: the step is compiled on the card, where XLA can try which matrix product is fastest."""
    import jax

    from launch.gpu.bundle.read import compile_here
    from mosaics_jax import metrics

    chosen = config(context.setting)
    init, step = all_programs(context.setting)
    call = context.load(step)
    if compiled_here:
        loaded = compile_here(step, "to compare")
        call = loaded.call
        context.record("program", name=step.name, how=loaded.how, why=loaded.why, seconds=loaded.seconds)
    state = list(context.load(init)())
    rows = tuple(map(jax.device_put, batch(context.setting)))
    seconds, losses, pairs = [], [], 0.0
    for number in range(_WARM_UP + _TIMED):
        begin = time.perf_counter()
        if number == 0:
            with context.record.running(step.name, step.kernels):
                *state, loss, seen = jax.block_until_ready(call(*state, *rows))
        else:
            *state, loss, seen = call(*state, *rows)
        losses.append(float(loss))  # waits
        seconds.append(time.perf_counter() - begin)
        pairs = float(seen)
        if context.setting.interpret and number >= _WARM_UP:
            break
    median = statistics.median(seconds[_WARM_UP:])
    flops, peak = metrics.step_flops(chosen, pairs), metrics.peak_flops(chosen)
    stats: Any = jax.local_devices()[0].memory_stats() or {}
    peak_bytes = stats.get("peak_bytes_in_use")
    context.record(
        "train", compiled="here" if compiled_here else "as loaded", rows=chosen.data.batch, context=chosen.data.context,
        remat=chosen.model.remat, steps_timed=len(seconds) - _WARM_UP, seconds_per_step=median,
        tokens_per_second=chosen.data.batch * chosen.data.context / median,
        mfu="unknown" if peak is None else flops / median / peak,
        peak_gibibytes="unknown" if peak_bytes is None else peak_bytes / 2**30, losses=losses,
        formula=metrics.MFU_FORMULA,
    )  # fmt: skip
    if not all(map(math.isfinite, losses)):
        context.record("error", message=f"the loss is not finite: {losses}")
