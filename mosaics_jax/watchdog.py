"""Finds a run that stands still: no step for many times the median. Every process writes its stacks, and ends.

A collective that one process never joins holds all of them for ever, without a word. Each process watches itself from a
thread; the first that has waited too long asks the others, through a file in the workdir, to write their stacks too.
Times are of the monotonic clock, so a wall clock that jumps moves nothing. The thread that watches waits for no disk.
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
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from mosaics_jax.background import Background
from mosaics_jax.config import RunConfig

HUNG = 70  # the exit code of a run that stood still

_BEAT = 5.0  # seconds between heartbeats
_GRACE = 10.0  # seconds that the first to end leaves the others to write their stacks
_RECENT = 64  # steps that the median is of
_STDERR = 2


class _At(NamedTuple):
    """Where a process is: the last step done, what it does, and since when."""

    done: int
    phase: str
    since: float


class _Asked(NamedTuple):
    """What another process that found the run standing still has left: where stacks go, and what it found."""

    folder: str
    why: str


class Watchdog:
    """Watches one process of a run, from `start` to `stop`.

    `step` is called when a step's result has come; `phase` holds while something else is done. A step may take
    max(watchdog_seconds, watchdog_factor x the median step), anything else watchdog_phase_seconds.

    Files, in the workdir:
      heartbeats/<process>.json: every five seconds, where the process is and since when.
      hangs/<time>-step-<n>/process-<k>.txt: the stacks of every thread; where they cannot be written, stderr has them.
    """

    def __init__(self, workdir: pathlib.Path, config: RunConfig, process: int, processes: int):
        self._workdir, self._config = workdir, config
        self._process, self._processes = process, processes
        self._at = _At(0, "start", time.monotonic())  # replaced as one: the thread never sees half a change
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._stopped = threading.Event()
        self._asked: _Asked | None = None
        self._files: Background[bool] | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @staticmethod
    def clear(workdir: pathlib.Path) -> None:
        """Takes away what an earlier life asked for. One process calls it, before any starts to watch."""
        _request(workdir).unlink(missing_ok=True)

    def start(self) -> None:
        self._files = Background(f"heartbeats in {self._workdir}", self._beat, most=1, again=_BEAT)
        self._at = self._at._replace(since=time.monotonic())
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._files:
            self._files.close()
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
        assert self._files
        while not self._stopped.wait(poll):
            now = time.monotonic()
            if now - beaten >= _BEAT:
                beaten = now
                self._files.put(True)
            if not watching:
                continue
            at = self._at
            limit, waited = self.patience(at.phase), time.monotonic() - at.since
            # Should this thread never run again, as under a call that holds the interpreter: without Python.
            faulthandler.dump_traceback_later(2 * limit + 60, exit=True, file=_STDERR)
            if self._asked:
                self._answer(self._asked)
            if waited > limit:
                self._end(at, waited, limit)

    def _beat(self, _: bool) -> None:
        """Writes where this process is, and looks whether another asks for stacks."""
        at = self._at
        seen = {
            "process": self._process, "host": socket.gethostname(), "pid": os.getpid(), "time": round(time.time(), 3),
            "step": at.done, "phase": at.phase, "seconds": round(time.monotonic() - at.since, 3),
        }  # fmt: skip
        if self._processes > 1:
            self._asked = _asked(self._workdir)
        (self._workdir / "heartbeats").mkdir(exist_ok=True)
        self._write_whole(self._workdir / "heartbeats" / f"{self._process}.json", seen)

    def _end(self, at: _At, waited: float, limit: float) -> NoReturn:
        what = f"step {at.done + 1}" if at.phase == "train" else at.phase
        why = f"process {self._process}: {what} is not done after {waited:.0f} s (limit {limit:.0f} s)"
        when = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
        stacks = _stacks()

        def write() -> str:
            folder = f"{when}-step-{at.done}"
            (self._workdir / "hangs").mkdir(exist_ok=True)
            if asked := _asked(self._workdir):  # another was first
                folder = asked.folder
            else:
                self._write_whole(_request(self._workdir), {"folder": folder, "why": why})
            return self._dump(folder, why, stacks)

        where = _within(_GRACE, write)
        if self._processes > 1:
            time.sleep(_GRACE)
        _leave(f"hung: {why}; stacks of all threads: {where or stacks}")

    def _answer(self, asked: _Asked) -> NoReturn:
        """Another process found that the run stands still."""
        stacks = _stacks()
        where = _within(_GRACE, lambda: self._dump(asked.folder, asked.why, stacks))
        _leave(f"hung: {asked.why}; this is process {self._process}" + ("" if where else f": {stacks}"))

    def _dump(self, folder: str, why: str, stacks: str) -> str:
        path = self._workdir / "hangs" / folder / f"process-{self._process}.txt"
        path.parent.mkdir(exist_ok=True)
        who = f"process {self._process} of {self._processes}, pid {os.getpid()}"
        path.write_text("\n".join([why, who, *silent(self._workdir, self._processes), stacks]), encoding="utf-8")
        return str(path.parent)

    def _write_whole(self, path: pathlib.Path, body: dict[str, Any]) -> None:
        draft = path.with_suffix(f".{self._process}.tmp")
        draft.write_text(json.dumps(body) + "\n", encoding="utf-8")
        draft.replace(path)


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


def _asked(workdir: pathlib.Path) -> _Asked | None:
    """What another process asks for, if one does. Raises OSError."""
    try:
        found = json.loads(_request(workdir).read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        found = None
    told = found if isinstance(found, dict) else {}
    folder = pathlib.PurePath(str(told.get("folder", ""))).name  # in hangs/, whatever is written there
    return _Asked(folder or "unknown", str(told.get("why", "another process asked")))


def _request(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / "hangs" / "request.json"


def _stacks() -> str:
    """Where every thread is; no file is looked at."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for thread, innermost in sys._current_frames().items():
        lines.append(f"\nthread {names.get(thread, thread)}, innermost call first:")
        frame: FrameType | None = innermost
        while frame is not None:
            lines.append(f"  {frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}")
            frame = frame.f_back
    return "\n".join(lines) + "\n"


def _within(seconds: float, action: Callable[[], str]) -> str:
    """What `action` gives; "" where it fails, or takes longer, as on a file system that is away."""
    found: list[str] = []

    def act() -> None:
        with contextlib.suppress(Exception):
            found.append(action())

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else ""


def _leave(message: str) -> NoReturn:
    def tell() -> str:
        os.write(_STDERR, f"{message}\n".encode(errors="backslashreplace"))
        return ""

    _within(_GRACE, tell)
    os._exit(HUNG)
