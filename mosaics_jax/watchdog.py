"""Finds a run that stands still: no step for many times the median. Every process writes its stacks, and ends.

A collective that one process never joins holds all of them for ever, without a word. Each process watches itself from a
thread; the first that has waited too long asks the others, through a file in the workdir, to write their stacks too.
Times are of the monotonic clock, so a wall clock that jumps moves nothing.
"""

import contextlib
import datetime
import faulthandler
import json
import os
import pathlib
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

from mosaics_jax.config import RunConfig

HUNG = 70  # the exit code of a run that stood still

_BEAT = 5.0  # seconds between heartbeats
_GRACE = 10.0  # seconds that the first to end leaves the others to write their stacks
_RECENT = 64  # steps that the median is of


class _At(NamedTuple):
    """Where a process is: the last step done, what it does, and since when."""

    done: int
    phase: str
    since: float


class Watchdog:
    """Watches one process of a run, from `start` to `stop`.

    `step` is called when a step's result has come; `phase` holds while something else is done. A step may take
    max(watchdog_seconds, watchdog_factor x the median step), anything else watchdog_phase_seconds.

    Files, in the workdir:
      heartbeats/<process>.json: every five seconds, where the process is and since when.
      hangs/<time>-step-<n>/process-<k>.txt: the stacks of every thread.
    """

    def __init__(self, workdir: pathlib.Path, config: RunConfig, process: int, processes: int):
        self._workdir, self._config = workdir, config
        self._process, self._processes = process, processes
        self._at = _At(0, "start", time.monotonic())  # replaced as one: the thread never sees half a change
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._stopped = threading.Event()
        self._request = _request(workdir)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @staticmethod
    def clear(workdir: pathlib.Path) -> None:
        """Takes away what an earlier life asked for. One process calls it, before any starts to watch."""
        _request(workdir).unlink(missing_ok=True)

    def start(self) -> None:
        for folder in ("hangs", "heartbeats"):
            (self._workdir / folder).mkdir(parents=True, exist_ok=True)
        self._at = self._at._replace(since=time.monotonic())
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def begin(self, done: int) -> None:
        """Steps follow. The first counts as a phase: whoever is ready waits for those that still compile."""
        self._at = _At(done, "first step", time.monotonic())

    def step(self, number: int) -> None:
        """Step `number` is done."""
        at, now = self._at, time.monotonic()
        if at.phase == "train" and number > at.done:
            self._seconds.append((now - at.since) / (number - at.done))
        self._at = _At(number, "train", now)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done inside is no step: compile, restore, save, evaluate."""
        before = self._at.phase
        self._at = self._at._replace(phase=name, since=time.monotonic())
        try:
            yield
        finally:
            self._at = self._at._replace(phase=before, since=time.monotonic())

    def patience(self, phase: str) -> float:
        """Seconds that a phase, or a step ("train"), may last."""
        if phase != "train":
            return self._config.watchdog_phase_seconds
        median = statistics.median(self._seconds) if self._seconds else 0.0
        return max(self._config.watchdog_seconds, self._config.watchdog_factor * median)

    def _watch(self) -> None:
        watching = self._config.watchdog_seconds > 0
        poll = min(1.0, self._config.watchdog_seconds / 4) if watching else _BEAT
        beaten = -_BEAT
        while not self._stopped.wait(poll):
            now = time.monotonic()
            if now - beaten >= _BEAT:
                beaten = now
                self._beat()
                if watching and self._processes > 1 and self._request.exists():
                    self._answer()
            if watching:
                at = self._at
                limit, waited = self.patience(at.phase), time.monotonic() - at.since
                # Should this thread never run again, as under a call that holds the interpreter: without Python.
                faulthandler.dump_traceback_later(2 * limit + 60, exit=True, file=sys.__stderr__ or 2)
                if waited > limit:
                    self._end(at, waited, limit)

    def _beat(self) -> None:
        at = self._at
        seen = {
            "process": self._process, "host": socket.gethostname(), "pid": os.getpid(), "time": round(time.time(), 3),
            "step": at.done, "phase": at.phase, "seconds": round(time.monotonic() - at.since, 3),
        }  # fmt: skip
        # A disk that is full or away is for the save to report.
        with contextlib.suppress(OSError):
            _write_whole(self._workdir / "heartbeats" / f"{self._process}.json", json.dumps(seen) + "\n")

    def _end(self, at: _At, waited: float, limit: float) -> NoReturn:
        what = f"step {at.done + 1}" if at.phase == "train" else at.phase
        message = f"process {self._process}: {what} is not done after {waited:.0f} s (limit {limit:.0f} s)"
        when = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
        folder = f"{when}-step-{at.done}"
        with contextlib.suppress(OSError, ValueError, KeyError):
            if self._request.exists():  # another was first
                folder = json.loads(self._request.read_text())["folder"]
            else:
                _write_whole(self._request, json.dumps({"folder": folder, "why": message}) + "\n")
        self._dump(folder, message)
        if self._processes > 1:
            time.sleep(_GRACE)
        print(
            f"hung: {message}; stacks of all threads: {self._workdir / 'hangs' / folder}", file=sys.stderr, flush=True
        )
        os._exit(HUNG)

    def _answer(self) -> NoReturn:
        """Another process found that the run stands still."""
        request: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            request = json.loads(self._request.read_text())
        why = request.get("why", "another process asked")
        self._dump(request.get("folder", "unknown"), why)
        print(f"hung: {why}; this is process {self._process}", file=sys.stderr, flush=True)
        os._exit(HUNG)

    def _dump(self, folder: str, why: str) -> None:
        with contextlib.suppress(OSError):
            path = self._workdir / "hangs" / folder / f"process-{self._process}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", encoding="utf-8") as out:
                out.write(f"{why}\nprocess {self._process} of {self._processes}, pid {os.getpid()}\n")
                out.writelines(f"{line}\n" for line in silent(self._workdir, self._processes))
                out.write("\n")
                out.flush()
                faulthandler.dump_traceback(out, all_threads=True)


def silent(workdir: pathlib.Path, processes: int) -> list[str]:
    """A line for every process whose heartbeat is older than three should be, from the files' own times."""
    lines, newest = [], 0.0
    seen: dict[int, float] = {}
    for process in range(processes):
        with contextlib.suppress(OSError):
            seen[process] = (workdir / "heartbeats" / f"{process}.json").stat().st_mtime
            newest = max(newest, seen[process])
    for process in range(processes):
        if process not in seen:
            lines.append(f"process {process} has no heartbeat")
        elif newest - seen[process] > 3 * _BEAT:
            with contextlib.suppress(OSError, ValueError, KeyError):
                beat = json.loads((workdir / "heartbeats" / f"{process}.json").read_text())
                lines.append(
                    f"process {process} is silent for {newest - seen[process]:.0f} s: host {beat['host']}, pid "
                    f"{beat['pid']}, then at step {beat['step']} ({beat['phase']})"
                )
    return lines


def _request(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / "hangs" / "request.json"


def _write_whole(path: pathlib.Path, text: str) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
