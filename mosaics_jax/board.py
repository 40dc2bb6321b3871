"""The curves of a run for TensorBoard. They only watch: what cannot be written is left out, and no step waits."""

import contextlib
import os
import pathlib
import socket
import struct
import time
from typing import Any

from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from mosaics_jax.background import Background

_MOST = 1000  # records that wait to be written
_NAME = "events.out.tfevents"


class Board:
    """Writes one life's curves, into a file of events; after a failure into a new one."""

    def __init__(self, folder: pathlib.Path, anew: int):
        """`anew`: the step from which on this life tells again what a life before has told."""
        self._folder, self._anew = folder, anew
        self._marked = False
        self._file: int | None = None
        self._events = Background(f"writing curves into {folder}", self._write, _MOST)

    def add(self, kind: str, record: dict[str, Any]) -> None:
        """Every number of the record of a step is a point of a curve; never waits."""
        self._events.put((kind, record, time.time()))

    def close(self) -> None:
        self._events.close()

    def _write(self, told: tuple[str, dict[str, Any], float]) -> None:
        kind, record, when = told
        points = [
            summary.scalar(f"{kind}/{name}", value).value[0]
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float)
        ]
        try:
            if self._file is None:
                self._file = self._open()
            self._append(self._file, Event(wall_time=when, step=record["step"], summary=Summary(value=points)))
        except OSError:
            if self._file is not None:
                with contextlib.suppress(OSError):
                    os.close(self._file)
            self._file = None
            raise

    def _open(self) -> int:
        """A new file. TensorBoard reads them in the order of the times in their names, whatever the clock does."""
        self._folder.mkdir(exist_ok=True)
        times = [name.split(".")[3] for name in os.listdir(self._folder) if name.startswith(f"{_NAME}.")]
        number = max([int(time.time()), *(int(one) + 1 for one in times if one.isdecimal())])
        path = self._folder / f"{_NAME}.{number:010d}.{socket.gethostname()}"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            self._append(file, Event(wall_time=time.time(), file_version="brain.Event:2"))
            if not self._marked:
                mark = SessionLog(status=SessionLog.START)
                self._append(file, Event(wall_time=time.time(), step=self._anew, session_log=mark))
                self._marked = True
        except OSError:
            os.close(file)
            raise
        return file

    @staticmethod
    def _append(file: int, event: Event) -> None:
        data = event.SerializeToString()
        size = struct.pack("<Q", len(data))
        left = size + struct.pack("<I", masked_crc32c(size)) + data + struct.pack("<I", masked_crc32c(data))
        while left:
            left = left[os.write(file, left) :]
