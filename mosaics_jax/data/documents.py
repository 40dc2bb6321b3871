"""What `prepare` reads: files, folders and Python's own library, as a stream of documents in a fixed order."""

import gzip
import io
import json
import lzma
import os
import pathlib
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import zstandard

PYTHON_CORPUS = "python"
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
    f".txt and .jsonl (also with {', '.join(COMPRESSIONS)}), and text source such as .py, .md or .c; "
    'write other formats out as .jsonl with a field "text"'
)
# What the decompressors raise for a file that is damaged or is not of its suffix's format.
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


class Document(NamedTuple):
    text: str
    utf8: bytes


class _Input(NamedTuple):
    name: str
    files: list[pathlib.Path]


def read_documents(inputs: Sequence[str], skipped: Counter[str]) -> Iterator[Document]:
    """The documents of `inputs`, in order; memory holds one at a time.

    An input is a .txt file (one document), a .jsonl file (a document for the field "text" of each line), either of them
    compressed, a text source file (one document), a folder (all text source files below it, sorted) or the word
    `python` (the standard library of this interpreter). Empty documents, and files of the standard library that are
    not UTF-8, are counted in `skipped`. All inputs are looked up before the first is read.

    Raises:
      ValueError: an input is missing, unreadable, damaged or empty; the message names file and place.
    """
    if not inputs:
        raise ValueError("no inputs; give files, folders or the word 'python'")
    for source in [_find(name) for name in inputs]:
        count = 0
        for document in _read_input(source, skipped):
            if document.text:
                count += 1
                yield document
            else:
                skipped["empty"] += 1
        if not count:
            raise ValueError(f"input {source.name!r} holds no documents with text")


def _find(name: str) -> _Input:
    if name == PYTHON_CORPUS:
        return _Input(name, _walk(pathlib.Path(sysconfig.get_paths()["stdlib"]), frozenset([".py"])))
    path = pathlib.Path(name)
    if path.is_dir():
        files = _walk(path, SOURCE_SUFFIXES)
        if not files:
            raise ValueError(
                f"folder {name!r} holds no text source files (.py, .md, .txt, ...); give other files by their names"
            )
        return _Input(name, files)
    if not path.is_file():
        raise ValueError(f"input {name!r} does not exist; an input is a file, a folder or the word 'python'")
    kind, compression = _suffixes(path)
    if kind != ".jsonl" and (kind not in SOURCE_SUFFIXES or (compression and kind != ".txt")):
        raise ValueError(f"input {name!r} is of a format that is not read; read are {LEGAL_FILES}")
    return _Input(name, [path])


def _walk(folder: pathlib.Path, suffixes: frozenset[str]) -> list[pathlib.Path]:
    """Sorted files below `folder`, without hidden ones, caches and installed packages."""
    found: list[pathlib.Path] = []
    for directory, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in _UNREAD_FOLDERS]
        paths = (pathlib.Path(directory, f) for f in files if not f.startswith("."))
        found += [p for p in paths if p.suffix.lower() in suffixes and p.is_file()]
    return sorted(found)


_UNREAD_FOLDERS = frozenset(["__pycache__", "site-packages", "dist-packages", "node_modules"])


def _suffixes(path: pathlib.Path) -> tuple[str, str]:
    """`a.txt.xz` -> (.txt, .xz); `a.py` -> (.py, "")."""
    compression = path.suffix.lower()
    if compression not in COMPRESSIONS:
        return compression, ""
    return path.with_suffix("").suffix.lower(), compression


def _read_input(source: _Input, skipped: Counter[str]) -> Iterator[Document]:
    for path in source.files:
        if _suffixes(path)[0] == ".jsonl":
            yield from _read_jsonl(path)
            continue
        with _open(path) as stream:
            utf8 = _guarded_read(path, stream.read)
        try:
            text = utf8.decode()
        except UnicodeDecodeError as error:
            if source.name == PYTHON_CORPUS:
                skipped["not_utf8"] += 1
                continue
            raise ValueError(f"{str(path)!r} is not UTF-8 at byte {error.start}; convert or remove the file") from None
        yield Document(text, utf8)


def _read_jsonl(path: pathlib.Path) -> Iterator[Document]:
    with _open(path) as stream:
        number = 0
        while line := _guarded_read(path, stream.readline):
            number += 1
            if not line.strip():
                continue
            where = f"'{path}:{number}'"
            try:
                text = json.loads(line.decode())["text"]
                if not isinstance(text, str):
                    raise TypeError
                utf8 = text.encode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{where} is not UTF-8 at byte {error.start} of the line; mend the line") from None
            except UnicodeEncodeError:
                raise ValueError(f'{where} holds half of a surrogate pair in "text"; mend the line') from None
            except (TypeError, KeyError):
                raise ValueError(f'{where} is not an object with a string "text"; mend or remove the line') from None
            except ValueError as error:
                raise ValueError(f"{where} is not JSON ({error}); mend or remove the line") from None
            yield Document(text, utf8)


def _guarded_read(path: pathlib.Path, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except _DAMAGE as error:
        raise ValueError(
            f"{str(path)!r} cannot be read ({error}); the file is damaged or not what its suffix says"
        ) from error


def _open(path: pathlib.Path) -> BinaryIO:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)  # type: ignore[return-value]
        case ".xz":
            return lzma.open(path)  # type: ignore[return-value]
        case ".zst":
            return io.BufferedReader(_ZstdFile(path))
        case _:
            return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of a .zst file; EOFError if it is cut short, where zstandard's own reader would just stop."""

    def __init__(self, path: pathlib.Path):
        self._file = path.open("rb")
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._compressed or self._file.read(1 << 14)
            if not data:
                if self._frame:
                    raise EOFError("it ends inside a compressed frame")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._ready, self._compressed = memoryview(self._frame.decompress(data)), b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
