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
from typing import Any, NamedTuple

from mosaics_jax import paths
from mosaics_jax.data.files import COMPRESSIONS, guarded, meaning, open_plain

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
LEGAL_FILES = (
    f".txt, .jsonl, .json and .parquet (also with {', '.join(COMPRESSIONS)}), .array_record, and text source such as "
    '.py, .md or .c; write other formats out as .jsonl with a field "text"'
)
_LEGAL_INPUTS = "a file, a glob, a folder, tfds:NAME@SPLIT or the word 'python'"
_ARRAY_RECORD = re.compile(r"\.array_?record(-\d+-of-\d+)?$")
_UNREAD_FOLDERS = frozenset(["__pycache__", "site-packages", "dist-packages", "node_modules"])
# A plain .jsonl or .parquet longer than this is several units, so that one file can occupy several workers.
UNIT_BYTES = 1 << 27
_HEAD_BYTES = 1 << 20  # what is looked at of a file, to tell what it is
_LONGEST_LINE = 1 << 25


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


class Found(NamedTuple):
    """What inputs hold: the units of each, and the files and folders that are left out, with the reason."""

    units: list[list[Unit]]
    left_out: list[tuple[str, str]]


def find_units(inputs: Sequence[str], tfds_dir: str | None = None, text_field: str = "text") -> Found:
    """The units of each input, in order. ValueError for an input that is missing or of a format that is not read."""
    if not inputs:
        raise ValueError(f"no inputs; an input is {_LEGAL_INPUTS}")
    found = Found([], [])
    for name in inputs:
        found.units.append(list(_units_of(name, tfds_dir, text_field, found.left_out)))
    return found


def _units_of(name: str, tfds_dir: str | None, text_field: str, left_out: list[tuple[str, str]]) -> Iterator[Unit]:
    if name.startswith("~"):
        name = str(paths.absolute(name))
    if name.startswith(TFDS_PREFIX):
        from mosaics_jax.data.tables import tfds_units

        yield from tfds_units(name.removeprefix(TFDS_PREFIX), tfds_dir)
    elif name == PYTHON_CORPUS:
        for path in _walk(pathlib.Path(sysconfig.get_paths()["stdlib"]), []):
            if path.suffix == ".py":
                yield _unit(path, "text", lenient=True)
    elif os.path.isdir(name):
        read = 0
        for path in _walk(pathlib.Path(name), left_out):
            try:
                units = list(_units_of_file(path, text_field))
            except UnreadFormatError as error:
                left_out.append((str(path), error.why))
                continue
            read += 1
            yield from units
        if not read:
            raise ValueError(f"folder {name!r} holds no files that are read; read are {LEGAL_FILES}")
    elif os.path.isfile(name):
        yield from _units_of_file(pathlib.Path(name), text_field)
    elif glob.has_magic(name):
        files = [pathlib.Path(found) for found in sorted(glob.glob(name, recursive=True)) if os.path.isfile(found)]
        if not files:
            raise ValueError(
                f"input {name!r} matches no files; an input is {_LEGAL_INPUTS} (in a glob, [[] is a bracket itself)"
            )
        for path in files:
            yield from _units_of_file(path, text_field)
    else:
        raise ValueError(f"input {name!r} does not exist; an input is {_LEGAL_INPUTS}")


def _walk(folder: pathlib.Path, left_out: list[tuple[str, str]]) -> list[pathlib.Path]:
    """Sorted files below `folder`, through links too, each folder and file once; and what of it is left out."""
    found: list[pathlib.Path] = []
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise ValueError(f"folder {str(error.filename)!r} cannot be read ({meaning(error)})") from error

    def new(path: pathlib.Path) -> bool:
        try:
            about = path.stat()
        except OSError as error:
            left_out.append((str(path), f"cannot be looked at ({meaning(error)})"))
            return False
        if (about.st_dev, about.st_ino) in seen:
            left_out.append((str(path), "is a link to what is read already"))
            return False
        seen.add((about.st_dev, about.st_ino))
        return True

    new(folder)
    for directory, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders.sort()
        for name in [name for name in folders if name.startswith(".") or name in _UNREAD_FOLDERS]:
            left_out.append((os.path.join(directory, name), "is a folder that is hidden, or of caches and packages"))
            folders.remove(name)
        folders[:] = [name for name in folders if new(pathlib.Path(directory, name))]
        for name in sorted(files):
            path = pathlib.Path(directory, name)
            if name.startswith("."):
                left_out.append((str(path), "is hidden"))
            elif not path.is_file():
                left_out.append((str(path), "is no file, or a link to nothing"))
            elif new(path):
                found.append(path)
    return sorted(found)


def suffixes(path: pathlib.Path) -> tuple[str, str]:
    """`a.txt.xz` -> (.txt, .xz); `a.py` -> (.py, "")."""
    compression = path.suffix.lower()
    if compression not in COMPRESSIONS:
        return compression, ""
    return path.with_suffix("").suffix.lower(), compression


class UnreadFormatError(ValueError):
    """A file that is not read. `why` is the reason without the file's name."""

    def __init__(self, path: pathlib.Path, why: str):
        super().__init__(f"input {str(path)!r} {why}; read are {LEGAL_FILES}")
        self.why = why


def _kind(path: pathlib.Path, text_field: str) -> str:
    """How a file is read: by its suffix, and where that may mean two things, by its content."""
    if _ARRAY_RECORD.search(path.name.lower()):
        return "array_record"
    suffix, compression = suffixes(path)
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffix == ".parquet":
        return "parquet"
    if suffix in (".json", ".txt"):
        begins = _beginning(path, text_field)
        if suffix == ".txt" and begins == "records":
            raise ValueError(f"input {str(path)!r} holds JSON Lines; name it .jsonl, and its records are read")
        if suffix == ".json" and begins == "records":
            return "jsonl"
        if suffix == ".json" and begins == "objects":
            raise UnreadFormatError(
                path, f"is JSON Lines without the field {text_field!r} (--text_field names another)"
            )
        if suffix == ".json" and begins == "array":
            raise UnreadFormatError(path, "is one JSON array of records; write them as JSON Lines, one a line")
    if suffix not in SOURCE_SUFFIXES or (compression and suffix not in (".txt", ".json")):
        raise UnreadFormatError(path, "is of a format that is not read")
    return "text"


def _beginning(path: pathlib.Path, text_field: str) -> str:
    """How a file of text begins: with "records" (JSON Lines with the field), with other "objects", one a line, with an
    "array" of records, or otherwise."""
    with open_plain(path, lambda size: None) as stream:
        lines = [guarded(path, lambda: stream.readline(_LONGEST_LINE)) for _ in range(2)]
        rest = guarded(path, lambda: stream.read(_HEAD_BYTES))
    objects = [_object(line) for line in lines if line.strip()]
    if objects and None not in objects:
        if all(text_field in one for one in objects):
            return "records"
        if len(objects) == 2:
            return "objects"
    start = b"".join([*lines, rest])[:_HEAD_BYTES].lstrip()
    if not start.startswith(b"["):
        return ""
    try:
        first, _ = json.JSONDecoder().raw_decode(start[1:].decode(errors="ignore").lstrip())
    except (ValueError, RecursionError):
        return ""
    return "array" if isinstance(first, dict) and isinstance(first.get(text_field), str) else ""


def _object(line: bytes) -> Any:
    """The JSON object that a line is, or None."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _units_of_file(path: pathlib.Path, text_field: str) -> Iterator[Unit]:
    kind = _kind(path, text_field)
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
        raise ValueError(f"input {str(path)!r} cannot be read ({meaning(error)})") from error
    return Unit(str(path), kind, size=found.st_size, stamp=found.st_mtime_ns, **rest)
