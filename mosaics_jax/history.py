"""What a run has told in its metrics.jsonl, over all its lives."""

import json
import os
import pathlib
from typing import Any

from mosaics_jax import paths

_BEGINNINGS = ("init", "resume", "finished")


def read_metrics(workdir: str | os.PathLike[str], kind: str = "train") -> list[dict[str, Any]]:
    """The records of a run that are of this kind ("train", "eval", "save", ...), each step once, in their order.

    A run that was killed goes on from its last checkpoint and tells the steps after it again; what it told of them
    first is left out. Raises ValueError where there is no run.
    """
    kept: list[dict[str, Any]] = []
    for record in records(paths.absolute(workdir) / "metrics.jsonl"):
        if record["kind"] in _BEGINNINGS:
            kept = [one for one in kept if one.get("step", 0) <= record["step"]]
            if not record["step"]:  # anew, from the first weights on
                kept.clear()
        if record["kind"] == kind:
            kept.append(record)
    return kept


def records(path: pathlib.Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl: objects with a kind, and a step that is an integer if any.

    What else stands there is no record, and passed over: half a line that a process was killed in, what a disk did.
    Raises ValueError where there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no metrics.jsonl; legal: the workdir of a run")
    with open(path, "rb") as stream:
        return [record for line in stream if (record := _record(line)) is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("kind"), str):
        return None
    step = found.get("step", None if found["kind"] in _BEGINNINGS else 0)
    return found if type(step) is int and abs(step) < 1 << 63 else None
