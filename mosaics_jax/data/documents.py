"""The documents of a unit of work, in order, in parts of bounded size: memory does not grow with a file."""

import codecs
import itertools
import json
import pathlib
import re
import reprlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from mosaics_jax.data.bpe import SAFE_CUT
from mosaics_jax.data.files import Advance, guarded, open_plain
from mosaics_jax.data.inputs import Unit

MOST_RECORD_BYTES = 1 << 25
PART_BYTES = 1 << 22
_MOST_HELD = 1 << 23  # characters


class Part(NamedTuple):
    """A document, or one part of a long one; the parts of one follow each other and the last is marked."""

    text: str
    utf8: bytes
    last: bool = True


class Broken(NamedTuple):
    """A record that holds no document: where it stands and what is wrong with it."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where} {self.why}"


def read_parts(unit: Unit, text_field: str, record_format: str, advance: Advance) -> Iterator[Part | Broken]:
    """The documents of `unit`, empty ones included.

    A text file is one document, in parts where it is long; a record of anything else is one whole document.
    Raises ValueError for a file that cannot be read, is damaged, or has no such field at all.
    """
    if unit.kind == "text":
        return _read_text(unit, advance)
    if unit.kind == "jsonl":
        return _read_jsonl(unit, text_field, advance)
    from mosaics_jax.data import tables

    if unit.kind == "parquet":
        return tables.read_parquet(unit, text_field, advance)
    if unit.kind == "array_record":
        return tables.read_array_record(unit, text_field, record_format, advance)
    return tables.read_tfds(unit, text_field, advance)


def _read_text(unit: Unit, advance: Advance) -> Iterator[Part | Broken]:
    path = pathlib.Path(unit.path)
    with open_plain(path, advance) as stream:
        start = guarded(path, lambda: stream.read(PART_BYTES + 1))
        if len(start) <= PART_BYTES:
            yield as_document(start, f"{str(path)!r}")
            return
    # Too long for one part: a first reading, so that a document is not found broken when half of it is written.
    with open_plain(path, lambda size: None) as stream:
        decoder, seen = codecs.getincrementaldecoder("utf-8")(), 0
        while True:
            content = guarded(path, lambda: stream.read(PART_BYTES))
            try:
                decoder.decode(content, final=not content)
            except UnicodeDecodeError as error:
                place = seen + len(content) - len(error.object) + error.start  # some bytes of the piece before are held
                yield Broken(f"{str(path)!r}", f"is not UTF-8 at byte {place}")
                return
            seen += len(content)
            if not content:
                break
    with open_plain(path, advance) as stream:
        yield from _cut(path, stream)


def _cut(path: pathlib.Path, stream: BinaryIO) -> Iterator[Part]:
    """The text of a long file, cut where no tokenizer of ours changes an id, and in words of over 8 M characters."""
    decoder, held = codecs.getincrementaldecoder("utf-8")(), ""
    while content := guarded(path, lambda: stream.read(PART_BYTES)):
        held += decoder.decode(content)
        cut = 0
        for tail in (1 << 10, 1 << 16, len(held)):
            first = max(0, len(held) - tail)
            if cuts := list(re.finditer(SAFE_CUT, held[first:])):
                cut = first + cuts[-1].end()
                break
        if cut:
            yield Part(held[:cut], held[:cut].encode(), last=False)
            held = held[cut:]
        elif len(held) > _MOST_HELD:  # one word: memory ends before it does
            yield Part(held, held.encode(), last=False)
            held = ""
    yield Part(held, held.encode())


def as_document(utf8: bytes, where: str) -> Part | Broken:
    try:
        return Part(utf8.decode(), utf8)
    except UnicodeDecodeError as error:
        return Broken(where, f"is not UTF-8 at byte {error.start}")


def from_text(text: Any, where: str, what: str) -> Part | Broken:
    """The document of a record's field, which should be a string or UTF-8."""
    if isinstance(text, bytes):
        return as_document(text, where)
    if not isinstance(text, str):
        return Broken(where, f"is not {what}")
    try:
        return Part(text, text.encode())
    except UnicodeEncodeError:
        return Broken(where, "holds half of a surrogate pair")


def from_json(line: bytes, text_field: str, where: str) -> Part | Broken:
    what = f"an object with a string {json.dumps(text_field)}"
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Broken(where, f"is not UTF-8 at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return Broken(where, f"is not JSON ({error})")
    if not isinstance(record, dict):
        return Broken(where, f"is not {what}")
    if text_field not in record:
        found = ", ".join(map(reprlib.repr, itertools.islice(record, 8)))
        return Broken(where, f"is not {what}; its fields are {found or 'none'} (--text_field names another)")
    return from_text(record[text_field], where, what)


def _read_jsonl(unit: Unit, text_field: str, advance: Advance) -> Iterator[Part | Broken]:
    path, number = pathlib.Path(unit.path), 0
    with open_plain(path, advance) as stream:
        place = 0
        if unit.start:
            # The line that holds the byte before the range belongs to the range before.
            stream.seek(unit.start - 1)
            place = unit.start - 1 + _line(path, stream)[1]
        first = place
        while unit.stop is None or place < unit.stop:
            line, size = _line(path, stream)
            if not size:
                return
            number += 1
            place += size
            if size > len(line):
                found: Part | Broken = Broken("", f"is longer than {MOST_RECORD_BYTES:,} bytes")
            elif not line.strip():
                continue
            else:
                found = from_json(line, text_field, "")
            if isinstance(found, Broken):
                found = Broken(f"'{path}:{_lines_before(path, first) + number}'", found.why)
            yield found


def _line(path: pathlib.Path, stream: BinaryIO) -> tuple[bytes, int]:
    """The next line and its size, which is larger than what is there of it where it is too long for a record."""
    line = piece = guarded(path, lambda: stream.readline(MOST_RECORD_BYTES))
    size = len(line)
    while len(piece) == MOST_RECORD_BYTES and not piece.endswith(b"\n"):
        line, piece = b"", guarded(path, lambda: stream.readline(MOST_RECORD_BYTES))
        size += len(piece)
    return line, size


def _lines_before(path: pathlib.Path, place: int) -> int:
    """Line ends before byte `place`: counted only where a message needs it."""
    count = 0
    with path.open("rb") as stream:
        while place > 0 and (piece := stream.read(min(place, PART_BYTES))):
            count += piece.count(b"\n")
            place -= len(piece)
    return count
