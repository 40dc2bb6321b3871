"""What `prepare` is given: files, globs, folders, TFDS data sets and Python's own library, as units of work."""

import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import re
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Any

PYTHON_CORPUS = "python"
TFDS_PREFIX = "tfds:"
# fmt: off
SOURCE_SUFFIXES = frozenset(
    [
        ".bash", ".bib", ".bzl", ".c", ".cc", ".cfg", ".cmake", ".cpp", ".cs", ".css", ".cu", ".cuh", ".cxx",
        ".go", ".h", ".hpp", ".html", ".ini", ".java", ".jl", ".js", ".json", ".jsx", ".kt", ".lua", ".md",
        ".mjs", ".php", ".pl", ".proto", ".py", ".pyi", ".pyx", ".r", ".rb", ".rs", ".rst", ".scala", ".sh",
        ".sql", ".swift", ".tex", ".toml", ".ts", ".tsx", ".txt", ".xml", ".yaml", ".yml",
    ]
)
# fmt: on
COMPRESSIONS = (".gz", ".xz", ".zst")
LEGAL_FILES = (
    f".txt, .jsonl and .parquet (also with {', '.join(COMPRESSIONS)}), .array_record, and text source such as .py, "
    '.md or .c; write other formats out as .jsonl with a field "text"'
)
_LEGAL_INPUTS = "a file, a glob, a folder, tfds:NAME@SPLIT or the word 'python'"
_ARRAY_RECORD = re.compile(r"\.array_?record(-\d+-of-\d+)?$")
_UNREAD_FOLDERS = frozenset(["__pycache__", "site-packages", "dist-packages", "node_modules"])
# A plain .jsonl or .parquet longer than this is several units, so that one file can occupy several workers.
UNIT_BYTES = 1 << 27


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one worker reads at a time: a file, or a range of a large one.

    Attributes:
      kind: text, jsonl, parquet, array_record or tfds.
      start, stop: the range: bytes of a jsonl, row groups of a parquet, records of a tfds data set; None is all of it.
      size: bytes on disk that reading it takes.
      stamp: when the file was last written, in nanoseconds.
      lenient: text that is not UTF-8 is left out and counted, not an error (Python's library holds some).
    """

    path: str
    kind: str
    start: int | None = None
    stop: int | None = None
    size: int = 0
    stamp: int = 0
    lenient: bool = False

    @property
    def identity(self) -> str:
        """Changes when the file does."""
        return hashlib.sha256(json.dumps(dataclasses.astuple(self)).encode()).hexdigest()[:24]


def find_units(inputs: Sequence[str], tfds_dir: str | None = None) -> list[list[Unit]]:
    """The units of each input, in order. ValueError for an input that is missing or of a format that is not read."""
    if not inputs:
        raise ValueError(f"no inputs; an input is {_LEGAL_INPUTS}")
    return [list(_units_of(name, tfds_dir)) for name in inputs]


def _units_of(name: str, tfds_dir: str | None) -> Iterator[Unit]:
    if name.startswith(TFDS_PREFIX):
        from mosaics_jax.data.tables import tfds_units

        yield from tfds_units(name.removeprefix(TFDS_PREFIX), tfds_dir)
    elif name == PYTHON_CORPUS:
        for path in _walk(pathlib.Path(sysconfig.get_paths()["stdlib"])):
            if path.suffix == ".py":
                yield _unit(path, "text", lenient=True)
    elif os.path.isdir(name):
        files = [path for path in _walk(pathlib.Path(name)) if _kind(path)]
        if not files:
            raise ValueError(f"folder {name!r} holds no files that are read; read are {LEGAL_FILES}")
        for path in files:
            yield from _units_of_file(path)
    elif os.path.isfile(name):
        yield from _units_of_file(pathlib.Path(name))
    elif glob.has_magic(name):
        files = [pathlib.Path(found) for found in sorted(glob.glob(name, recursive=True)) if os.path.isfile(found)]
        if not files:
            raise ValueError(f"input {name!r} matches no files; an input is {_LEGAL_INPUTS}")
        for path in files:
            yield from _units_of_file(path)
    else:
        raise ValueError(f"input {name!r} does not exist; an input is {_LEGAL_INPUTS}")


def _walk(folder: pathlib.Path) -> list[pathlib.Path]:
    """Sorted files below `folder`, without hidden ones, caches and installed packages."""
    found: list[pathlib.Path] = []
    for directory, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in _UNREAD_FOLDERS]
        paths = (pathlib.Path(directory, f) for f in files if not f.startswith("."))
        found += [p for p in paths if p.is_file()]
    return sorted(found)


def suffixes(path: pathlib.Path) -> tuple[str, str]:
    """`a.txt.xz` -> (.txt, .xz); `a.py` -> (.py, "")."""
    compression = path.suffix.lower()
    if compression not in COMPRESSIONS:
        return compression, ""
    return path.with_suffix("").suffix.lower(), compression


def _kind(path: pathlib.Path) -> str | None:
    if _ARRAY_RECORD.search(path.name.lower()):
        return "array_record"
    suffix, compression = suffixes(path)
    if suffix in (".jsonl", ".parquet"):
        return suffix[1:]
    return "text" if suffix in SOURCE_SUFFIXES and (not compression or suffix == ".txt") else None


def _units_of_file(path: pathlib.Path) -> Iterator[Unit]:
    kind = _kind(path)
    if kind is None:
        raise ValueError(f"input {str(path)!r} is of a format that is not read; read are {LEGAL_FILES}")
    whole = _unit(path, kind)
    compressed = suffixes(path)[1] != ""
    if kind == "array_record" and (path.parent / "dataset_info.json").exists():
        raise ValueError(
            f"input {str(path)!r} is part of a TFDS data set; give that: --input={TFDS_PREFIX}{path.parent}@SPLIT"
        )
    if kind == "jsonl" and not compressed and whole.size > UNIT_BYTES:
        for start in range(0, whole.size, UNIT_BYTES):
            stop = min(start + UNIT_BYTES, whole.size)
            yield dataclasses.replace(whole, start=start, stop=stop, size=stop - start)
    elif kind == "parquet" and not compressed and whole.size > UNIT_BYTES:
        from mosaics_jax.data.tables import parquet_units

        yield from parquet_units(whole, UNIT_BYTES)
    else:
        yield whole


def _unit(path: pathlib.Path, kind: str, **rest: Any) -> Unit:
    try:
        found = path.stat()
    except OSError as error:
        raise ValueError(f"input {str(path)!r} cannot be read ({error.strerror})") from error
    return Unit(str(path), kind, size=found.st_size, stamp=found.st_mtime_ns, **rest)
