"""Nsight Compute's counters of one launch of each kernel: tensor pipe, stall reasons, bytes, clock as it is."""

import csv
import functools
import glob
import io
import os
import pathlib
import re
import shutil
import subprocess
import sys

from launch.gpu import problem as lib
from launch.gpu.parts import read_programs, recurrence
from launch.gpu.parts.context import Context

SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "WarpStateStats",
    "LaunchStats",
    "Occupancy",
)
_KERNELS = "regex:retrieve|leaky"
_MOST = 12  # launches
_PLACES = ("/usr/local/cuda/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu")
# Of a few hundred columns, those that say what holds a kernel up.
_TELLING = re.compile(
    r"^gpu__time_duration.sum$|pipe_tensor|^(dram|lts|l1tex)__(t_)?bytes.*\.(sum|sum\.per_second)$|"
    r"throughput.avg.pct_of_peak|issue_stalled_.*ratio|^launch__(registers_per_thread|occupancy_limit.*|waves.*)$|"
    r"warps_active.avg.pct|^smsp__(inst_executed.sum|issue_active.avg.pct.*|cycles_active.avg)$"
)


def ncu() -> str | None:
    found = shutil.which("ncu")
    return found or next((path for pattern in _PLACES for path in sorted(glob.glob(pattern), reverse=True)), None)


def run(context: Context, arguments: list[str], output: pathlib.Path) -> None:
    """Runs the part `counted` below under ncu, with this part's own arguments; the whole table goes to `output`."""
    if (program := ncu()) is None:
        context.record("note", message="ncu is not installed: no counters")
        return
    command = [program, "--clock-control", "none", "--kernel-name", _KERNELS, "--launch-count", str(_MOST)]
    command += [word for section in SECTIONS for word in ("--section", section)]
    command += ["--page", "raw", "--csv", sys.executable, "-m", "launch.gpu.parts", "counted", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    output.write_text(result.stdout, encoding="utf-8")
    found = parse(result.stdout)
    for counters in found:
        context.record("counter", **counters)
    if result.returncode or not found:
        lines = (result.stderr + result.stdout).strip().splitlines()
        context.record("error", message=f"ncu ended with {result.returncode}: {' '.join(lines[-3:])[:300]}")


def parse(text: str) -> list[dict[str, object]]:
    """One record a launch from ncu's CSV, which stands among other lines: names, units, then a row a launch."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    names, units, *rows = csv.reader(io.StringIO("\n".join(lines[begin:])))
    found: list[dict[str, object]] = []
    for row in rows:
        if len(row) != len(names):
            continue
        cells = dict(zip(names, row, strict=True))
        values = {
            name: f"{cells[name]} {unit}".strip()
            for name, unit in zip(names, units, strict=True)
            if _TELLING.search(name)
        }
        found.append({"kernel": cells.get("Kernel Name", ""), "values": values})
    return found


def counted(context: Context) -> None:
    """What ncu sees: one run of each program that holds kernels."""
    import jax

    setting = context.setting
    (place,) = lib.places(setting)["reads_long"]
    made = context.load(read_programs.arrays(setting, place.time))()
    ends = tuple(map(jax.device_put, lib.interval(setting, place)))
    calls = []
    for what, bandwidth in (
        ("forward", lib.small_bandwidth), ("forward + backward", lib.model_bandwidth)
    ):  # fmt: skip
        arguments = (*made, jax.device_put(bandwidth(setting, place)), *ends)
        calls.append(functools.partial(context.first, read_programs.hopper(setting, what, place.time), *arguments))
    cotangent, key, _ = made
    arguments = (cotangent, key, *map(jax.device_put, recurrence.inputs(setting, place.time)))
    program = recurrence.average_program(setting, "hopper", "forward + backward", place.time)
    calls.append(functools.partial(context.first, program, *arguments))
    for call in calls:
        with context.attempt("note", message="not counted"):
            call()
