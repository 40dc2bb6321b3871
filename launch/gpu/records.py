"""What a part has found, one line of JSON a record, written as soon as it is known: a crash loses nothing."""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

Record = dict[str, Any]
COMPILING = "compiling"  # the kind that says that a program takes long to load


class Recorder:
    """record(kind, **fields) appends a line."""

    def __init__(self, path: str | os.PathLike[str]):
        self._path = path

    def __call__(self, kind: str, **fields: Any) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite({"kind": kind} | fields)) + "\n")

    @contextlib.contextmanager
    def running(self, program: str, kernels: tuple[str, ...] = (), *, blame: bool = True) -> Iterator[None]:
        """Around the first run of a program: one that begins and does not end is what hung.

        An error that comes out is recorded and raised; with `blame`, its kernels are not to be run again.
        """
        begin = time.monotonic()
        self("begin", program=program, kernels=list(kernels))
        try:
            yield
        except BaseException as error:
            self("end", program=program, kernels=list(kernels) if blame else [], error=first_line(error))
            raise
        self("end", program=program, seconds=time.monotonic() - begin)


def read(path: pathlib.Path) -> list[Record]:
    """All whole lines: the last may be half written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def unfinished(records: list[Record]) -> Record | None:
    """The program that began and did not end."""
    last = None
    for record in records:
        if record["kind"] == "begin":
            last = record
        elif record["kind"] == "end":
            last = None
    return last


def finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite is written as a string."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
