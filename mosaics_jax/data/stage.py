"""One unit of work tokenized into one stage file: the first of prepare's two passes, and what a worker does.

    ids of every document, in the order of the input         unit.tokens
    where and how long each is, and CRC-32, for each split   uint64 triples
    counts of its pairs of bytes, for each split             uint16 pairs, uint64 counts
    a JSON footer with sizes, counts, and its own digest, and its length, uint64

The name of the file holds the unit's identity, the tokenizer's and the limit, so that what was done of an unchanged
file is found again.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from mosaics_jax import whole
from mosaics_jax.data.corpus import SPLITS, cannot_write
from mosaics_jax.data.documents import PART_BYTES, Broken, read_parts
from mosaics_jax.data.inputs import Unit
from mosaics_jax.data.splits import Rule, assigned
from mosaics_jax.data.tokenizer import Tokenizer

_MAGIC = "mosaics_jax stage 3"
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How units become documents: the settings of `prepare` that its workers need."""

    text_field: str
    record_format: str
    rule: Rule


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is known of a finished stage file: counts of each split, and where in the file its tables begin."""

    path: str
    bytes: dict[str, int]
    documents: dict[str, int]
    tokens: dict[str, int]
    offsets: dict[str, int]
    bigrams: dict[str, list[int]]  # where, how many, and their CRC-32
    hashes: list[int]  # the least and the greatest of a document, or none
    empty: int
    not_utf8: int
    broken: list[list[str]]

    @classmethod
    def open(cls, path: pathlib.Path) -> "Stage":
        with path.open("rb") as stream:
            stream.seek(-8, os.SEEK_END)
            size = int.from_bytes(stream.read(8), "little")
            end = stream.seek(-8 - size, os.SEEK_END)
            body = whole.opened(json.loads(stream.read(size)))
        if body.pop("magic") != _MAGIC:
            raise ValueError(f"{str(path)!r} was made by another version; remove its folder")
        made = cls(path=str(path), **body)
        tables = [(made.offsets[name], 24 * made.documents[name]) for name in SPLITS]
        tables += [(offset, 10 * count) for offset, count, _ in (made.bigrams[name] for name in SPLITS)]
        numbers = [*made.bytes.values(), *made.tokens.values(), *made.hashes, made.empty, made.not_utf8]
        numbers += itertools.chain(*tables)
        if any(type(number) is not int or number < 0 for number in numbers) or max(map(sum, tables)) > end:
            raise ValueError(f"{str(path)!r} has a footer that is damaged; remove its folder")
        if sorted(made.bytes) != sorted(SPLITS) or sorted(made.tokens) != sorted(SPLITS):
            raise ValueError(f"{str(path)!r} has a footer of other splits; remove its folder")
        if any(len(pair) != 2 or not all(isinstance(part, str) for part in pair) for pair in made.broken):
            raise ValueError(f"{str(path)!r} has a footer whose list of broken records is damaged; remove its folder")
        return made

    @classmethod
    def find(cls, path: pathlib.Path) -> "Stage | None":
        """The stage at `path`, or None where it is absent or broken, and must be made."""
        broken = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, OSError)
        with contextlib.suppress(*broken):
            return cls.open(path)
        return None

    def damaged(self) -> ValueError:
        """What to raise where a table or a document in it is not as it was written."""
        return ValueError(f"{self.path!r} is not what was written; remove it, and the same command goes on")

    def documents_of(self, split: str) -> np.ndarray:
        """Beginning, length in tokens and CRC-32 of each document of `split`: [N, 3] uint64, read when asked for."""
        if not self.documents[split]:
            return np.zeros((0, 3), np.uint64)
        return np.memmap(self.path, "<u8", "r", self.offsets[split], (self.documents[split], 3))

    def bigrams_of(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        offset, count, known = self.bigrams[split]
        with open(self.path, "rb") as stream:
            stream.seek(offset)
            content = stream.read(10 * count)
        if zlib.crc32(content) != known:
            raise self.damaged()
        return np.frombuffer(content[: 2 * count], "<u2"), np.frombuffer(content[2 * count :], "<u8")


def stage_name(unit: Unit, tokenizer: Tokenizer, reading: Reading, limit: int | None) -> str:
    rule = f"{reading.rule.below:x}-{reading.rule.cut or 0:x}"
    return f"{unit.identity}-{tokenizer.fingerprint[:16]}-{rule}-{limit or 'all'}.stage"


def token_type(tokenizer: Tokenizer) -> np.dtype:
    """Type of an id on disk: uint32 where 65,536 ids are not enough."""
    return np.dtype("<u2" if tokenizer.vocabulary <= 2**16 else "<u4")


def write_stage(
    unit: Unit, folder: pathlib.Path, tokenizer: Tokenizer, reading: Reading, most_broken: int,
    limit: int | None = None, progress: Progress = lambda tokens, size: None,
) -> Stage:  # fmt: skip
    """Tokenizes `unit` into `folder`; the file is whole or absent.

    Args:
      most_broken: records that may be left out; one more is an error.
      limit: stop after the document that brings the unit's text to so many bytes.
      progress: called with tokens written and bytes of the unit read since the last call.
    """
    target = folder / stage_name(unit, tokenizer, reading, limit)
    draft = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with draft.open("wb", buffering=1 << 20) as stream:
            _Writer(unit, stream, folder, tokenizer, reading, most_broken, progress).write(limit)
        os.replace(draft, target)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        draft.unlink(missing_ok=True)
    return Stage.open(target)


class _Writer:
    def __init__(
        self, unit: Unit, stream: BinaryIO, folder: pathlib.Path, tokenizer: Tokenizer, reading: Reading,
        most_broken: int, progress: Progress,
    ):  # fmt: skip
        self._unit, self._stream, self._tokenizer, self._reading = unit, stream, tokenizer, reading
        self._most_broken, self._progress = most_broken, progress
        self._type = token_type(tokenizer)
        self._place = self._sum = 0
        # 24 bytes a document wait on the disk: a unit may hold more documents than memory.
        self._documents = {name: tempfile.TemporaryFile(dir=folder) for name in SPLITS}  # noqa: SIM115
        self._document_tokens = dict.fromkeys(SPLITS, 0)
        self._bytes = dict.fromkeys(SPLITS, 0)
        self._bigrams = {name: _Bigrams() for name in SPLITS}
        self._empty = self._not_utf8 = 0
        self._broken: list[list[str]] = []
        self._hashes: list[int] = []

    def write(self, limit: int | None) -> None:
        try:
            self._write_documents(limit)
            self._finish()
        finally:
            for documents in self._documents.values():
                documents.close()

    def _write_documents(self, limit: int | None) -> None:
        begin, within = 0, False
        parts = read_parts(self._unit, self._reading.text_field, self._reading.record_format, self._advance)
        for piece in assigned(parts, self._reading.rule):
            if isinstance(piece, Broken):
                self._leave_out(piece)
                continue
            split, part = piece.split, piece.part
            if not split:
                self._empty += 1
                continue
            if not within:
                if not self._tokenizer.divisible and (not part.last or len(part.utf8) > PART_BYTES):
                    raise ValueError(
                        f"{self._unit.path!r} has a document of more than {PART_BYTES:,} bytes, too long for a "
                        "tokenizer.json, which encodes documents whole; divide it, or take another kind of tokenizer"
                    )
                begin, within, self._sum = self._place, True, 0
                self._hashes = [min([piece.hash, *self._hashes]), max([piece.hash, *self._hashes])]
                self._put(np.array([self._tokenizer.begin]))
            self._put(self._tokenizer.encode(part.text))
            self._bytes[split] += len(part.utf8)
            self._bigrams[split].add(part.utf8, part.last)
            if part.last:
                self._put(np.array([self._tokenizer.end]))
                self._documents[split].write(np.array([begin, self._place - begin, self._sum], "<u8").tobytes())
                self._document_tokens[split] += self._place - begin
                within = False
                if piece.ends and limit is not None and sum(self._bytes.values()) >= limit:
                    return

    def _advance(self, size: int) -> None:
        self._progress(0, size)

    def _put(self, ids: np.ndarray) -> None:
        content = ids.astype(self._type).tobytes()
        self._sum = zlib.crc32(content, self._sum)
        self._stream.write(content)
        self._place += ids.size
        self._progress(ids.size, 0)

    def _leave_out(self, broken: Broken) -> None:
        if self._unit.lenient:
            self._not_utf8 += 1
            return
        self._broken.append([broken.where, broken.why])
        if len(self._broken) > self._most_broken:
            raise ValueError(f"{broken}; mend or remove it, or leave it out with --skip_bad_records=N")

    def _finish(self) -> None:
        self._stream.write(bytes(-self._stream.tell() % 8))
        footer: dict[str, Any] = {"magic": _MAGIC, "bytes": self._bytes, "offsets": {}, "bigrams": {}}
        footer["documents"] = {name: found.tell() // 24 for name, found in self._documents.items()}
        footer["tokens"] = self._document_tokens
        for name in SPLITS:
            footer["offsets"][name] = self._stream.tell()
            self._documents[name].seek(0)
            shutil.copyfileobj(self._documents[name], self._stream)
        for name in SPLITS:
            counts = self._bigrams[name].counts()
            (pairs,) = np.nonzero(counts)
            table = pairs.astype("<u2").tobytes() + counts[pairs].astype("<u8").tobytes()
            footer["bigrams"][name] = [self._stream.tell(), len(pairs), zlib.crc32(table)]
            self._stream.write(table)
        footer |= {"hashes": self._hashes, "empty": self._empty, "not_utf8": self._not_utf8, "broken": self._broken}
        content = json.dumps(whole.sealed(footer)).encode()
        self._stream.write(content + len(content).to_bytes(8, "little"))


class _Bigrams:
    """Counts of adjacent bytes, never across documents."""

    def __init__(self) -> None:
        self._counts = np.zeros(2**16, np.int64)
        self._waiting: list[np.ndarray] = []
        self._waiting_pairs = 0
        self._previous = b""

    def add(self, utf8: bytes, last: bool) -> None:
        text = np.frombuffer(self._previous + utf8, np.uint8)
        self._previous = b"" if last else utf8[-1:]
        self._waiting.append(text[:-1].astype(np.uint16) << 8 | text[1:])
        self._waiting_pairs += text.size
        # Counting has a cost of its own that small documents should share.
        if self._waiting_pairs >= 2**20:
            self.counts()

    def counts(self) -> np.ndarray:
        if self._waiting:
            self._counts += np.bincount(np.concatenate(self._waiting), minlength=2**16)
        self._waiting, self._waiting_pairs = [], 0
        return self._counts
