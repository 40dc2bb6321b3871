"""What a folder is, so that no command writes over the place of something else."""

import json
import os
import pathlib
from collections.abc import Sequence

EMPTY, RUN, CORPUS, EXPORT, EVALUATIONS, STUDY, FOREIGN = (
    "empty", "run", "corpus", "export", "evaluations", "study", "foreign",
)  # fmt: skip
# By what lies in it, the surest first. A study is a search over runs (launch.claims).
_MARKS = (
    (RUN, ("checkpoints", "metrics.jsonl")),
    (CORPUS, ("manifest.json",)),
    (EXPORT, ("model.safetensors",)),
    (STUDY, ("claims.json",)),
)
_CALLED = {
    EMPTY: "an empty folder",
    RUN: "a run of launch.train",
    CORPUS: "a corpus of launch.prepare",
    EXPORT: "an export of launch.export",
    EVALUATIONS: "evaluations of launch.evaluate",
    STUDY: "a study of launch.claims",
    FOREIGN: "a folder of something else",
}
# What a scheduler, a file system or a process that was killed leaves in a folder that nothing was made in yet; logs and
# restarts are those of launch/slurm/train.sbatch.
_NOTHING = ("lock", "lost+found", "logs", "restarts")
_NOTHING_ENDS = (".log", ".out", ".err", ".partial", ".tmp")


def kind_of(folder: pathlib.Path) -> str:
    """What lies at a path: EMPTY where nothing does. Raises OSError where it cannot be looked at."""
    if not os.path.lexists(folder):
        return EMPTY
    if not folder.is_dir():
        return FOREIGN
    names = {name for name in os.listdir(folder) if not _is_nothing(name)}
    for kind, marks in _MARKS:
        if names.intersection(marks):
            return kind
    if not names:
        return EMPTY
    if all(name.isdecimal() for name in names):
        return EVALUATIONS
    # A run that has just begun, or whose other files are lost.
    return RUN if "config.json" in names and _is_record(folder / "config.json") else FOREIGN


def check(folder: pathlib.Path, legal: Sequence[str], flag: str) -> str:
    """What the folder is. ValueError where a command that is given it by `flag` would write over something else."""
    try:
        found = kind_of(folder)
    except OSError as error:
        raise ValueError(f"{flag} is {str(folder)!r}, which cannot be looked at ({error.strerror})") from error
    if found not in legal:
        what = "a file" if os.path.lexists(folder) and not folder.is_dir() else _CALLED[found]
        raise ValueError(
            f"{flag} is {str(folder)!r}, which is {what}; nothing was written. Legal: "
            f"{'a folder that is not there yet, or ' * (EMPTY in legal)}{', or '.join(_CALLED[kind] for kind in legal)}"
        )
    return found


def _is_nothing(name: str) -> bool:
    return name.startswith(".") or name in _NOTHING or name.endswith(_NOTHING_ENDS)


def _is_record(path: pathlib.Path) -> bool:
    try:
        body = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(body, dict) and {"config", "manifest"} <= body.keys()
