"""What only watches is done in a thread for which nothing waits: it may fail, or hang, and no step stops."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable

_CLOSING = 5.0  # seconds that the end waits for what is left to do


class Background[Item]:
    """Calls `act` with one thing after another. Whatever it raises is one warning, and it is tried again later.

    Args:
      what: is done, in the warning.
      most: things that wait; those that find no place are dropped.
      again: seconds in which all is dropped after a failure.
    """

    def __init__(self, what: str, act: Callable[[Item], None], most: int, again: float = 60.0):
        self._what, self._act, self._again = what, act, again
        self._waiting: queue.Queue[Item | None] = queue.Queue(most)
        self._warned = False
        self._thread = threading.Thread(target=self._run, name=what, daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Never waits."""
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            self._warn("it takes too long")

    def close(self) -> None:
        """Waits for what is left, a few seconds at most: a file system that is away holds no process."""
        deadline = time.monotonic() + _CLOSING
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=_CLOSING)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn("it takes too long")

    def _run(self) -> None:
        rested = float("-inf")
        while (item := self._waiting.get()) is not None:
            if time.monotonic() < rested:
                continue
            try:
                self._act(item)
            except Exception as error:
                rested = time.monotonic() + self._again
                self._warn(str(error) or type(error).__name__)

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            logging.getLogger(__name__).warning(
                "%s: %s; the run goes on without, and this is tried again and again", self._what, why
            )
