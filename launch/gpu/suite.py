"""Runs parts in processes of their own, each with a hard limit, and keeps what they find as it comes.

Nothing that failed or hung is run again: the canary tries every kernel first, and a program that a part was killed in
takes its kernels with it.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch.gpu import records
from launch.gpu.bundle import wheels
from launch.gpu.bundle.read import ROOT
from launch.gpu.programs import CANARY, average_kernels, read_kernels

NOT_BEGUN = "not begun: no time was left"
# Seconds, assumed and not measured: what a part's prediction is made of.
PROCESS = 9.0  # Python, jax, a CUDA context
CARRIED = 0.6  # loading a carried program and its first run
CUDNN = 6.0  # compiling a call of cuDNN on the card, one core
MARGIN = 1.5  # a part's limit is at least this many times its prediction
_CANARY_PROCESS = 20.0  # seconds after which a canary's process is killed
_COMPILING = 45.0  # more, for each program that a part has to compile on the card
_DRY = 900.0  # every limit of a dry run: it is interpreted, and beside other tests
_POLL = 0.2
_SAVE_EVERY = 1.0  # seconds: what a run that is cut off may lose


@dataclasses.dataclass(frozen=True)
class Part:
    """A process. `limit`: seconds until it is killed. The rest says what it is predicted to take."""

    name: str
    limit: float
    carried: int = 0  # programs loaded
    cudnn: int = 0  # programs that only the card can compile
    seconds: float = 0.0  # of timing and all else
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    late: bool = False  # begun only where the parts before it left time: no part of the call's six minutes

    @property
    def predicted(self) -> float:
        return PROCESS + CARRIED * self.carried + CUDNN * self.cudnn + self.seconds


_WHOLE_MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
CANARY_PART = Part("canary", 45, carried=3, seconds=2)
SUITE = (
    CANARY_PART,
    Part("reads_long", 60, carried=7, cudnn=2, seconds=12),
    Part("reads_short_and_packed", 70, carried=14, cudnn=2, seconds=14),
    Part("counters", 65, carried=4, seconds=30),
    Part("recurrence", 45, carried=21, seconds=8),
    Part("cases", 45, carried=7, seconds=15),
    Part("train", 40, carried=2, seconds=15, environment=_WHOLE_MEMORY),
    Part("reads_more", 135, carried=20, cudnn=8, seconds=18, late=True),
    Part("xla", 45, carried=6, seconds=14, late=True),
    # jax only makes the inputs: the GPU is torch's.
    Part("flex", 110, seconds=60, environment={"JAX_PLATFORMS": "cpu"}, late=True),
    Part("tokamax", 75, cudnn=6, seconds=4, late=True),
    Part("train_compiled_here", 180, carried=2, seconds=105, environment=_WHOLE_MEMORY, late=True),
)
VARIANTS = (CANARY_PART, Part("variants", 120, carried=10, seconds=30))
JOBS = {"suite": (SUITE, 360.0), "variants": (VARIANTS, 180.0)}


class Runner:
    """One call: what it is given, what has been found, what is broken. `with` it: it has a folder of its own."""

    def __init__(
        self,
        results: dict[str, Any],
        save: Callable[[], None],
        bundle: pathlib.Path | None,
        dry: bool,
        log: pathlib.Path,
        module: str = "launch.gpu.parts",
    ):
        """`results["parts"]` is filled, and `save` called as it is; `log` takes what the parts print."""
        self._results, self._save, self._bundle, self._dry = results, save, bundle, dry
        self._log, self._module = log, module
        self._site = tempfile.TemporaryDirectory()
        results["wheels_unpacked"] = wheels.unpack(bundle, pathlib.Path(self._site.name))
        self.broken: dict[str, str] = {}
        self._started = 0

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *error: object) -> None:
        self._site.cleanup()

    @property
    def _setting(self) -> str:
        return "dry" if self._dry else "card"

    def run(self, parts: Sequence[Part], seconds: float) -> None:
        """The parts in turn, until `seconds` are over; none begins that could not end as predicted."""
        begin = time.monotonic()
        for part in parts:
            left = seconds - (time.monotonic() - begin)
            result = self._results["parts"].setdefault(part.name, {"state": NOT_BEGUN, "seconds": 0.0, "records": []})
            if not self._dry and left < part.predicted:
                self._save()
                continue
            limit = _DRY if self._dry else min(part.limit, left)
            started = time.monotonic()
            if part is CANARY_PART:
                self._canary(part, result, limit)
            else:
                self._one(part, result, limit)
            result["seconds"] = time.monotonic() - started
            self._results["seconds"] = time.monotonic() - begin
            self._results["broken"] = self.broken
            self._save()
            print(f"{part.name}: {result['state']} ({result['seconds']:.0f} s)", flush=True)

    def _one(self, part: Part, result: dict[str, Any], limit: float) -> None:
        argument = str(self._log.with_suffix(".counters.csv")) if part.name == "counters" else ""
        child = self._start(part, argument)
        saved = 0.0
        while child.wait(limit) is None:
            if time.monotonic() - saved >= _SAVE_EVERY:
                result["records"] = child.records
                self._save()
                saved = time.monotonic()
        result["records"] = child.records
        result["state"] = child.state(limit)
        self._learn(child)

    def _canary(self, part: Part, result: dict[str, Any], limit: float) -> None:
        """All groups at once: they are small, and a kernel that hangs leaves the others their share of the card."""
        mine = limit if self._dry else min(limit, _CANARY_PROCESS)
        children = {group: self._start(part, group) for group in CANARY}
        states = []
        for group, child in children.items():
            while child.wait(mine) is None:
                pass
            states.append(f"{group}: {child.state(mine)}")
            self._learn(child)
            for kernel in kernels_of(group):
                found = [r for r in child.records if r["kind"] == "canary" and r["kernel"] == kernel]
                if found and not found[-1]["ok"]:
                    self.broken.setdefault(kernel, f"the canary: {found[-1]['message']}")
                elif not found:
                    self.broken.setdefault(kernel, f"the canary did not reach it; {child.state(mine)}")
            result["records"] += child.records
        failed = [state for state in states if not state.endswith("passed")]
        wrong = [r for r in result["records"] if r["kind"] == "canary" and not r["ok"]]
        result["state"] = f"failed: {'; '.join(failed)}" if failed else "failed" if wrong else "passed"

    def _learn(self, child: "Child") -> None:
        """What a part was killed in, or what raised as it ran, is broken from here on."""
        hung = records.unfinished(child.records) if child.failed else None
        if hung is not None:
            for kernel in hung["kernels"]:
                self.broken.setdefault(kernel, f"{child.part.name} ended while {hung['program']!r} ran: {child.reason}")
        for record in child.records:
            if record["kind"] == "end" and record.get("error"):
                for kernel in record["kernels"]:
                    self.broken.setdefault(kernel, f"{record['program']}: {record['error']}")

    def _start(self, part: Part, argument: str) -> "Child":
        broken = pathlib.Path(self._site.name) / "broken.json"
        broken.write_text(json.dumps(self.broken), encoding="utf-8")
        arguments = [part.name, f"--setting={self._setting}", f"--broken={broken}"]
        if self._bundle is not None:
            arguments.append(f"--bundle={self._bundle}")
        if argument:
            arguments.append(f"--argument={argument}")
        self._started += 1
        found = pathlib.Path(self._site.name) / f"records-{self._started}.jsonl"
        words = [sys.executable, "-m", self._module, *arguments, f"--records={found}"]
        return Child(part, words, environment(part, self._dry, self._site.name), found, self._log)


class Child:
    """A part that runs."""

    def __init__(self, part: Part, words: list[str], env: dict[str, str], found: pathlib.Path, log: pathlib.Path):
        """`words` are the command, which writes its records to `found`."""
        self.part, self._records, self._log = part, found, log
        self._printed = found.with_suffix(".txt")
        self._begin, self._killed = time.monotonic(), False
        with open(self._printed, "wb") as file:
            self._process = subprocess.Popen(
                words, cwd=ROOT, env=env, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True
            )

    @property
    def records(self) -> list[records.Record]:
        return records.read(self._records)

    @property
    def failed(self) -> bool:
        return self._killed or bool(self._process.returncode)

    @property
    def reason(self) -> str:
        code = self._process.returncode
        if self._killed:
            return f"killed after {self._seconds:.0f} s"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"it ended with {how}, and printed last: {self._last_line()}"

    def _last_line(self) -> str:
        lines = self._printed.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][-300:] if lines else "nothing"

    def wait(self, limit: float) -> int | None:
        """The exit code, or None after a little while. What runs past `limit` is killed, with all it started."""
        try:
            self._process.wait(_POLL)
        except subprocess.TimeoutExpired:
            self._seconds = time.monotonic() - self._begin
            compiled = sum(record["kind"] == records.COMPILING for record in self.records)
            if self._seconds <= limit + _COMPILING * compiled:
                return None
            self.kill()
        else:
            self._keep_what_it_printed()
        return self._process.returncode

    def kill(self) -> None:
        """And all that it started."""
        self._killed = True
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._keep_what_it_printed()

    def _keep_what_it_printed(self) -> None:
        with open(self._log, "ab") as log:
            log.write(f"--- {self.part.name}\n".encode() + self._printed.read_bytes())

    def state(self, limit: float) -> str:
        """ "passed", or "failed" with a reason that is not among the records."""
        if self.failed:
            hung = records.unfinished(self.records)
            return f"failed: {self.reason}" + (f", while {hung['program']!r} ran" if hung else "")
        return "failed" if any(failures(self.part.name, self.records)) else "passed"


def kernels_of(group: str) -> list[str]:
    width, unit_norm = CANARY[group]
    return list((average_kernels(width) if unit_norm is None else read_kernels(width, unit_norm)).values())


def failures(part: str, found: Sequence[records.Record]) -> list[str]:
    """One line for each record of something that went wrong. What is not installed, or was skipped, did not."""
    lines = []
    for record in found:
        kind, name = record["kind"], ", ".join(str(record[k]) for k in _NAMED if k in record)
        if kind == "error":
            lines.append(f"{part}: {record['message']}")
        elif (kind == "canary" and not record["ok"]) or (kind == "case" and record["outcome"] == "failed"):
            lines.append(f"{name}: {record['message']}")
        elif kind == "check" and not record["ok"]:
            lines.append(f"{name}: wrong values, {record['errors']}")
        elif record.get("failed"):
            lines.append(f"{name}: {record['missing']}")
    return lines


_NAMED = ("by", "kernel", "variant", "name", "memory", "rows", "time", "what")


def environment(part: Part, dry: bool, site: str) -> dict[str, str]:
    """Of a part's process: carried packages after installed ones, little memory at first, a compiler that is found."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")]), site])
    env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    env["PYTHONUNBUFFERED"] = "1"
    if dry:
        # Interpreted kernels wait for one another inside callbacks: a small pool of threads would wait for ever.
        return env | {"JAX_PLATFORMS": "cpu", "NPROC": "8", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    root = pathlib.Path("/usr/local/cuda")
    if "CUDA_ROOT" not in env and (root / "bin" / "ptxas").exists():
        env["CUDA_ROOT"] = str(root)
        env["PATH"] = os.pathsep.join([str(root / "bin"), env["PATH"]])
    return env | dict(part.environment)
