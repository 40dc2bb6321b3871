"""Evaluates a checkpoint of a run: tables, figures and their data under WORKDIR/evaluations/<step>/.

python -m launch.evaluate --workdir=runs/tiny --suite=perplexity,needle --lengths=512,1024
"""

import dataclasses
import pathlib
import shlex
import sys
from typing import Any

from absl import flags

from launch import command
from mosaics_jax.evaluate.settings import Settings

_WORKDIR = command.define_path("workdir", None, "directory of the run")
_STEP = flags.DEFINE_integer("step", None, "the checkpoint; default: the newest")
_COMPARE = command.define_path("compare", "", "another workdir, whose newest evaluation is drawn into the same figures")
_WITHOUT = flags.DEFINE_bool("without_long_term", False, "remove the long-term memory first")
_DELAY = flags.DEFINE_integer("delay", None, "m of the long-term memory; default: model.delay_min of the run")
_FSDP = flags.DEFINE_integer("fsdp", 1, "shards of the weights' model width; the devices left over are replicas")
_TENSOR = flags.DEFINE_integer("tensor", 1, "shards of heads, feed-forward width and vocabulary")
_MAX_LENGTH = flags.DEFINE_integer("max_length", 131072, "tokens of a prompt and its answer; a longer one is an error")
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 65536, "positions of a batch, which is as many rows as that holds")


def _define(field: dataclasses.Field) -> Any:
    """The flag of a field of Settings, by the same name."""
    default: Any = field.default
    if field.metadata["path"]:
        return command.define_path(field.name, default, field.metadata["doc"])
    kinds: dict[Any, Any] = {int: flags.DEFINE_integer, bool: flags.DEFINE_bool, str: flags.DEFINE_string}
    if field.type in kinds:
        return kinds[field.type](field.name, default, field.metadata["doc"])
    if field.name == "texts":  # paths, which may hold commas
        return flags.DEFINE_multi_string(field.name, list(default), field.metadata["doc"])
    return flags.DEFINE_list(field.name, list(map(str, default)), field.metadata["doc"])


_SETTINGS = {field.name: (field, _define(field)) for field in dataclasses.fields(Settings)}


def _value(field: dataclasses.Field, value: Any) -> Any:
    if field.type != tuple[int, ...]:
        return tuple(value) if isinstance(value, list) else value
    if bad := [part for part in value if not part.strip().isdecimal()]:
        raise ValueError(f"--{field.name} has {bad[0]!r}; legal: integers, separated by commas")
    return tuple(map(int, value))


def main() -> None:
    if not _WORKDIR.value:
        raise ValueError("--workdir is not set; legal: the directory of a run of launch.train")
    settings = Settings(**{name: _value(field, flag.value) for name, (field, flag) in _SETTINGS.items()})
    from mosaics_jax import environment, processes  # after the flags: a typo is answered before JAX loads
    from mosaics_jax.evaluate import run

    processes.connect(None, wait=300, heartbeat=100)
    try:
        processes.same(_typed() | environment.versions(), "what they were started with")
        with run.writing(pathlib.Path(_WORKDIR.value)):
            _evaluate(settings)
    except processes.Missing as error:
        raise OSError(str(error)) from error


def _evaluate(settings: Settings) -> None:
    from mosaics_jax.evaluate import run
    from mosaics_jax.evaluate.model import RunModel

    model = RunModel(
        _WORKDIR.value, run.mesh(_FSDP.value, _TENSOR.value), step=_STEP.value, delay=_DELAY.value,
        long_term=not _WITHOUT.value, max_length=_MAX_LENGTH.value, batch_tokens=_BATCH_TOKENS.value,
    )  # fmt: skip
    typed = f"python -m launch.evaluate {shlex.join(sys.argv[1:])}"
    variant = run.variant_name(_DELAY.value, not _WITHOUT.value)
    for text in run.evaluate(model, pathlib.Path(_WORKDIR.value), settings, variant, typed, _COMPARE.value):
        print(text, flush=True)


def _typed() -> dict[str, str]:
    """Every flag of this command, by name."""
    own = (_WORKDIR, _STEP, _COMPARE, _WITHOUT, _DELAY, _FSDP, _TENSOR, _MAX_LENGTH, _BATCH_TOKENS)
    holders: list[Any] = [*own, *(holder for _, holder in _SETTINGS.values())]
    return {f"--{holder.name}": str(holder.value) for holder in holders}


if __name__ == "__main__":
    command.run(main, goes_on="the same command goes on after the last answer")
