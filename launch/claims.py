"""Trains small variants of the model alike and asks them what the paper asks: tables and figures under WORKDIR.

python -m launch.claims --workdir=runs/claims --suite=recall,classification --seeds=3
"""

import json
import pathlib
import shlex
import sys

from absl import flags

from configs.claims import RATES, STUDIES, VARIANTS
from launch import command

_WORKDIR = command.define_path("workdir", None, "directory of corpora, runs and reports; the same command goes on")
_SUITE = flags.DEFINE_list("suite", list(STUDIES), "studies, each a training of its own")
_VARIANTS = flags.DEFINE_list("variants", list(VARIANTS), "which models")
_SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each variant at its best learning rate")
_BUDGET = flags.DEFINE_enum("budget", "cpu", list(RATES), "size of the models")
_TIMES = flags.DEFINE_integer("times", 1, "how many times the recipe's steps each run has; 1 is what is compared")
_PREEMPTED = 75  # as of launch.train
_TEXT = flags.DEFINE_list("text", ["python"], "what the corpus of text is made of, as launch.prepare --input takes it")


def main() -> None:
    if not _WORKDIR.value:
        raise ValueError("--workdir is not set; legal: a directory, new or of the same command before")
    for name, given, known in (("suite", _SUITE.value, STUDIES), ("variants", _VARIANTS.value, VARIANTS)):
        if unknown := [one for one in given if one not in known]:
            raise ValueError(f"--{name} has {unknown[0]!r}; legal: {', '.join(known)}")
        if not given:
            raise ValueError(f"--{name} is empty; legal: one or more of {', '.join(known)}")
    if _SEEDS.value < 1:
        raise ValueError(f"--seeds is {_SEEDS.value}; legal: 1 or more")
    if not 1 <= _TIMES.value < 1000:
        raise ValueError(f"--times is {_TIMES.value}; legal: 1 to 999")
    # After the flags: a typo is answered before JAX loads.
    from mosaics_jax.claims import study
    from mosaics_jax.train import SaveFailed, TrainingStopped

    workdir = pathlib.Path(_WORKDIR.value)
    try:
        with study.writing(workdir):
            for name in _SUITE.value:
                _make(name, workdir)
    except study.Preempted as error:
        print(error, file=sys.stderr)
        sys.exit(_PREEMPTED)
    except (SaveFailed, TrainingStopped) as error:
        raise OSError(str(error)) from error


def _make(name: str, workdir: pathlib.Path) -> None:
    """Trains and asks what is left of one study, and writes what came of it."""
    from mosaics_jax import whole
    from mosaics_jax.claims import tables
    from mosaics_jax.claims.extension import Extension
    from mosaics_jax.claims.study import Study
    from mosaics_jax.evaluate import report

    about = {
        "command": f"`python -m launch.claims {shlex.join(sys.argv[1:])}`",
        "numbers": f"means over {_SEEDS.value} seeds ± their standard error",
    }
    kind = Extension if name == "extension" else Study
    study = kind(
        name, workdir, _BUDGET.value, _SEEDS.value, tuple(_VARIANTS.value), (), tuple(_TEXT.value), _TIMES.value
    )
    found = study.run()
    made = tables.make(study, found)
    report.save(made, workdir, name, about)
    whole.write(workdir / f"{name}_runs.json", (json.dumps(tables.raw(found), indent=1) + "\n").encode())
    print(report.markdown(made, name, about), flush=True)


if __name__ == "__main__":
    command.run(main, goes_on="the same command goes on from what is done")
