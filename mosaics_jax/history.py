"""What a run has told in its metrics.jsonl, over all its lives."""

import contextlib
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
    """All of a metrics.jsonl, without half a line that a process was killed in. ValueError where there is none."""
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no metrics.jsonl; legal: the workdir of a run")
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found
