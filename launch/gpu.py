"""Everything there is to learn from one Hopper GPU, in one command of less than nine minutes (`make gpu`).

python -m launch.gpu --output=docs/results/gpu

Kernel cases against float64, speed beside other makers' kernels, and the train step of configs/small.py. Each section
is a process of its own: a kernel that hangs or ruins the device's context ends its section, not the run. The results
are written as they come, so that a run that is cut off keeps what it has. The exit code is 1 if anything failed.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

from launch import command, gpu_report

_OUTPUT = flags.DEFINE_string("output", "docs/results/gpu", "directory of <device>-<date>.json and .md")
_QUICK = flags.DEFINE_bool("quick", False, "T = 4,096 and few rounds: a trial of the suite itself")

BUDGET = 480.0  # seconds: no section begins after these, or is meant to go on
GRACE = 20.0  # seconds that a section may take to notice that its time is over
SHOWN = 30  # failures printed; the table has them all
LEAST = 20.0  # seconds under which a section is not begun: it would but start


@dataclasses.dataclass(frozen=True)
class Section:
    """One process. `may_be_late`: if it must be killed it was only slow, while any other section hangs."""

    name: str
    seconds: float
    may_be_late: bool = False
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


# The most important first: what stands at the end may find no time left.
SECTIONS = (
    Section("retrieve_cases", 100),
    Section("leaky_average_cases", 70),
    Section("hopper", 110),
    Section("cudnn", 50, may_be_late=True),
    Section("recurrence", 50),
    # Its batch is chosen by what fits: all memory in one piece.
    Section(
        "train", 110,
        environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"},
    ),
    # jax only makes the intervals and the answers: the GPU is torch's.
    Section("flex", 110, may_be_late=True, environment={"JAX_PLATFORMS": "cpu"}),
    Section("xla", 40, may_be_late=True),
    Section("tokamax", 60, may_be_late=True),
)  # fmt: skip


def main() -> None:
    begin = time.monotonic()
    # Before jax is imported. Little memory for this process, which only looks at the device; and the tests' own
    # settings for quick compilation on CPU must not reach what is measured.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_FLAGS", "")
    import jax

    from pallas_kernels.choice import no_hopper

    if (reason := no_hopper()) is not None:
        raise ValueError(f"the GPU suite cannot run: {reason}")
    report = gpu_report.Report(
        pathlib.Path(_OUTPUT.value),
        {
            "device": jax.devices()[0].device_kind,
            "date": datetime.date.today().isoformat(),
            "jax": jax.__version__,
            "quick": _QUICK.value,
            "seconds": 0.0,
            "sections": {section.name: {"state": "not begun", "seconds": 0.0, "records": []} for section in SECTIONS},
        },
    )
    for section in SECTIONS:
        left = BUDGET - (time.monotonic() - begin)
        result = report.results["sections"][section.name]
        if left < LEAST:
            result["state"] = gpu_report.OUT_OF_TIME
        else:
            _run(section, min(section.seconds, left), report)
        report.results["seconds"] = time.monotonic() - begin
        report.save()
        print(f"{section.name}: {result['state']} ({result['seconds']:.0f} s)", flush=True)
    failed = gpu_report.failures(report.results)
    print("\n".join(["", *(line[:200] for line in failed[:SHOWN]), f"{len(failed)} failure(s); results: {report}"]))
    sys.exit(1 if failed else 0)


def _run(section: Section, seconds: float, report: gpu_report.Report) -> None:
    """Runs a section for at most `seconds` and GRACE, and takes over its records as they appear."""
    result: dict[str, Any] = report.results["sections"][section.name]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        part = pathlib.Path(directory) / "records.jsonl"
        part.touch()
        arguments = [sys.executable, "-m", "launch.gpu_sections", section.name, str(part), f"{seconds:.0f}"]
        child = subprocess.Popen(
            arguments + ["quick"] * _QUICK.value, env=os.environ | section.environment, start_new_session=True
        )
        result["state"] = "running"
        killed = False
        while True:
            try:
                child.wait(timeout=2)
            except subprocess.TimeoutExpired:
                if time.monotonic() - begin > seconds + GRACE and not killed:
                    os.killpg(child.pid, signal.SIGKILL)  # with the compilers that it started
                    killed = True
            result["records"], result["seconds"] = _records(part), time.monotonic() - begin
            if child.returncode is not None:
                break
            report.save()
    result["state"] = _state(section, child.returncode, killed, result)


def _records(part: pathlib.Path) -> list[dict[str, Any]]:
    """All whole lines: the last may be half written."""
    lines = part.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _state(section: Section, code: int, killed: bool, result: dict[str, Any]) -> str:
    if killed:
        return gpu_report.OUT_OF_TIME if section.may_be_late else f"failed: killed after {result['seconds']:.0f} s"
    if code:
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"failed: the process ended with {name}"
    return "failed" if gpu_report.failures({"sections": {section.name: result}}) else "passed"


if __name__ == "__main__":
    command.run(main)
