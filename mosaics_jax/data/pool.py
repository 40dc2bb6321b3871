"""Processes that share out independent tasks: results come in order, progress is heard while a task still runs."""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from types import FrameType
from typing import Any

from mosaics_jax.data.tokenizer import load_tokenizer

Report = Callable[[int, int], None]
_EVERY_SECONDS = 0.5


class _Worker:
    """What one process knows: the counters of all processes, and what its tasks get first."""

    counters: Any
    held: Any


class _StoppedError(Exception):
    """The pool is being left because of an error; what a task has not finished is given up."""


class Pool:
    """`workers` spawned processes, or with 0 this one.

    A task is a module's function of (what the pool holds, *arguments, progress=): the tokenizer first, or what `share`
    was last given.
    """

    def __init__(self, workers: int, tokenizer: pathlib.Path):
        self.tokenizer = load_tokenizer(tokenizer)
        self._held: Any = self.tokenizer
        self._workers = workers
        self._context = multiprocessing.get_context("spawn")
        # Two sums of the tasks' progress, and whether they should stop.
        self._counters: Any = self._context.Array("q", 3) if workers else [0, 0, 0]
        self._folder = tokenizer
        self._executor: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> "Pool":
        self._start(None)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._counters[2] = kind is not None
        self._stop()

    def share(self, held: Any) -> None:
        """From now on tasks get `held` first. It is sent to each process once, not with each task."""
        self._held = held
        self._stop()
        self._start(held)

    def map(self, task: Callable[..., Any], arguments: Sequence[tuple], report: Report) -> Iterator[Any]:
        """Results in order; `report` is called with the sums of what the tasks told their `progress`.

        Tasks are begun a few ahead of the result that is waited for, so leaving the iteration early wastes little.
        """
        self._counters[0] = self._counters[1] = 0
        if self._executor is None:
            yield from self._map_here(task, arguments, report)
            return
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        rest = iter(arguments)
        try:
            while True:
                while len(waiting) < 4 * self._workers and (one := next(rest, None)) is not None:
                    with interrupts_wait():
                        waiting.append(self._executor.submit(_run, task, one))
                if not waiting:
                    break
                while not (done := concurrent.futures.wait([waiting[0]], _EVERY_SECONDS).done):
                    report(*self._counters[:2])
                report(*self._counters[:2])
                yield done.pop().result()
                waiting.popleft()
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker process was killed (by hand, or for want of memory); the same command goes on from what is "
                "done, with fewer --workers if memory was short"
            ) from error
        finally:
            for future in waiting:
                future.cancel()

    def _map_here(self, task: Callable[..., Any], arguments: Sequence[tuple], report: Report) -> Iterator[Any]:
        def progress(first: int, second: int) -> None:
            self._counters[0] += first
            self._counters[1] += second
            report(*self._counters[:2])

        for one in arguments:
            yield task(self._held, *one, progress=progress)

    def _start(self, shared: Any) -> None:
        if self._workers:
            self._executor = concurrent.futures.ProcessPoolExecutor(
                self._workers, self._context, _begin, (self._folder, self._counters, shared)
            )

    def _stop(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        self._executor = None


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """A process that is started meanwhile hears no Ctrl-C before it ignores it; this one hears it afterwards.

    Blocked in this thread, from which that one inherits it; put off, since other threads of this process may hear it.
    """
    came: list[tuple[int, FrameType | None]] = []
    handler = signal.getsignal(signal.SIGINT)
    puts_off = callable(handler) and threading.current_thread() is threading.main_thread()
    if puts_off:
        signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if puts_off:
            signal.signal(signal.SIGINT, handler)
        if came and callable(handler):
            handler(*came[0])


def _begin(tokenizer: pathlib.Path, counters: Any, shared: Any) -> None:
    belong()
    _Worker.counters = counters
    _Worker.held = load_tokenizer(tokenizer) if shared is None else shared


def belong() -> None:
    """In a new process: it ends with the one that made it, and leaves Ctrl-C to that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _run(task: Callable[..., Any], arguments: tuple) -> Any:
    unsent = [0, 0]

    def send() -> None:
        with _Worker.counters.get_lock():
            _Worker.counters[0] += unsent[0]
            _Worker.counters[1] += unsent[1]
            stopped = _Worker.counters[2]
        unsent[:] = 0, 0
        if stopped:
            raise _StoppedError

    def progress(first: int, second: int) -> None:
        unsent[0] += first
        unsent[1] += second
        if max(unsent) > 1 << 18:
            send()

    result = task(_Worker.held, *arguments, progress=progress)
    send()
    return result
