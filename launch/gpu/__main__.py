"""What one Hopper GPU can tell in six minutes: right, how fast beside others, and what holds a kernel up.

make gpu                                          # or, where there is no make:
python3 -m launch.gpu [--bundle=build/gpu] [--output=DIR] [--minutes=6]
make gpu-variants                                 # --job=variants, 3 minutes: the kernels' variants by turns

Programs, answers and wheels come from a bundle (`make gpu-bundle`, on a machine without a GPU); without one, everything
is compiled on the card. Results are rewritten as the run goes on, in DIR, $OUT or docs/results/gpu. The exit code is 1
if anything failed or was not reached.
"""

import pathlib
import sys

from absl import flags

from launch import command
from launch.gpu import report, suite
from launch.gpu.bundle import read as bundles
from launch.gpu.jobs import sources

_JOB = flags.DEFINE_enum("job", "suite", list(suite.JOBS), "what to run")
_OUTPUT = command.define_path("output", None, "directory of the results; $OUT where it is set, or docs/results/gpu")
_BUNDLE = command.define_path("bundle", "build/gpu", "directory of the bundle, if there is one")
_MINUTES = flags.DEFINE_float("minutes", None, "what the call may take; the job's own, if not given")
_DRY = flags.DEFINE_bool("dry", False, "tiny, interpreted, on a CPU: a trial of the suite itself")


def main() -> None:
    if _MINUTES.value is not None and not 0 < _MINUTES.value <= 60:
        raise ValueError(f"--minutes is {_MINUTES.value}; legal: more than 0, at most 60")
    carried = bundles.Bundle(pathlib.Path(_BUNDLE.value), "dry" if _DRY.value else "card")
    parts, seconds = suite.JOBS[_JOB.value]
    results = report.begun(_JOB.value, sources(_JOB.value), carried, _DRY.value)
    page = report.Report(report.folder(_OUTPUT.value), results)
    print(f"{results['device']}, driver {results['driver']}; bundle: {results['bundle']}", flush=True)
    with suite.Runner(results, page.save, carried.directory, _DRY.value, page.log) as runner:
        runner.run(parts, 60 * _MINUTES.value if _MINUTES.value else seconds)
    sys.exit(report.conclude(page))


if __name__ == "__main__":
    command.run(main)
