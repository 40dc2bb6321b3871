"""The queue of jobs for a GPU: what was never measured, or is out of date, in the order in which it should be.

make gpu-next MINUTES=8                       # prints the queue, and runs the first jobs that are due and fit
python3 -m launch.gpu.queue --minutes=8 [--norun] [--write] [--dry]

`--write` puts the queue and the newest figures into docs/results/gpu/README.md. A result says of which sources it is: a
job is out of date when the files that it measures have changed.
"""

import os
import signal
import subprocess
import sys

from absl import flags

from launch import command
from launch.gpu import jobs, report
from launch.gpu.bundle.read import ROOT

_MINUTES = flags.DEFINE_float("minutes", 8.0, "what all jobs together may take")
_RUN = flags.DEFINE_bool("run", True, "run the jobs, and not only print them")
_WRITE = flags.DEFINE_bool("write", False, "write the queue and the newest figures into the README of the results")
_DRY = flags.DEFINE_bool("dry", False, "run them tiny, on a CPU, whether due or not")
_OUTPUT = command.define_path("output", None, "directory of the results; $OUT where it is set, or docs/results/gpu")


def main() -> None:
    if not 0 < _MINUTES.value <= 60:
        raise ValueError(f"--minutes is {_MINUTES.value}; legal: more than 0, at most 60")
    print(jobs.queue_table(), flush=True)
    if _WRITE.value:
        jobs.write_readme()
        return
    chosen = [job for job in jobs.JOBS if job.command] if _DRY.value else jobs.due(_MINUTES.value)
    print(f"\nnext: {', '.join(job.name for job in chosen) or 'nothing is due and fits'}", flush=True)
    if not _RUN.value:
        return
    output = str(report.folder(_OUTPUT.value))
    failed = [job.name for job in chosen if run(job, output, _DRY.value)]
    if failed:
        print(f"failed: {', '.join(failed)}")
        sys.exit(1)


def run(job: jobs.Job, output: str, dry: bool) -> int:
    """The job's exit code; it is killed, with all that it started, a little after its minutes are over."""
    words = [sys.executable, "-m", *job.command, f"--output={output}"]
    if dry:
        words.append("--dry")
    print(f"\n{job.name}: {' '.join(words)}", flush=True)
    child = subprocess.Popen(words, cwd=ROOT, start_new_session=True)
    try:
        return child.wait(1800 if dry else 60 * job.minutes + 20)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        print(f"{job.name}: killed after {job.minutes} minutes; what it had found is in {output}", flush=True)
        return child.wait()


if __name__ == "__main__":
    command.run(main)
