"""Hearing that a run is to end soon: SIGTERM, as schedulers send it, and SIGHUP, as a terminal that is closed does."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax


@contextlib.contextmanager
def heard(note: Callable[[str], None]) -> Iterator[None]:
    """Meanwhile a signal calls `note` with its name, where the run has one process.

    With several, jax hears SIGTERM, whichever process gets it, and all agree on a step; a SIGHUP becomes one. A SIGHUP
    that is ignored, as under nohup, stays so.
    """
    alone = jax.process_count() == 1

    def hear(number: int, frame: Any) -> None:
        if alone:
            note(signal.Signals(number).name)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    numbers = [signal.SIGTERM] if alone else []
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, hear) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
