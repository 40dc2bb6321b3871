"""What a row is: the manifest of a prepared corpus, random access to its windows, and the fields made of a window."""

import bisect
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

MANIFEST = "manifest.json"
SPLITS = ("train", "valid")
_FORMAT = "mosaics_jax tokens"
_VERSION = 1
_REMEDY = "run `python -m launch.prepare --output=DIR` to make one"
_AGAIN = "prepare the corpus again"
_MOST_HANDLES = 256


class Batch(NamedTuple):
    """The fields of rows, each [B, T] (or [T] for one row): NumPy arrays here, jax arrays once they are on the mesh.

    Attributes:
      tokens: int32, what the model reads.
      targets: int32, the token after each one.
      document: int32, equal within a piece of a document and never decreasing along T.
      position: int32, index within the piece, from 0.
      weight: float32, 1 where the target counts in the loss, 0 where it is the begin of the next document.
    """

    tokens: Any
    targets: Any
    document: Any
    position: Any
    weight: Any


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of little-endian token ids, and nothing else in it."""

    file: str
    tokens: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a corpus.

    Attributes:
      bytes: UTF-8 bytes of its text; with `tokens` it turns nats per token into bits per byte.
      bigram_entropy: H(next byte | previous byte) of its own text, bits per byte, over pairs within documents.
      document_lengths: for each power of two p, documents of more than p / 2 and at most p tokens, both ends counted.
    """

    documents: int
    tokens: int
    bytes: int
    bigram_entropy: float
    document_lengths: Mapping[int, int]
    shards: tuple[Shard, ...]

    @property
    def bytes_per_prediction(self) -> float:
        """UTF-8 bytes per predicted token (all but each document's first): nats per token to bits per byte."""
        return self.bytes / max(1, self.tokens - self.documents)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `prepare` made and how; written as manifest.json beside the shards."""

    directory: pathlib.Path
    dtype: str
    vocabulary: int
    begin: int
    end: int
    tokenizer_kind: str
    tokenizer_fingerprint: str
    splits: Mapping[str, Split]
    skipped: Mapping[str, int]
    arguments: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """sha256 of what rows are made of: equal for the same tokens in the same shards, wherever they lie."""
        shards = {name: [dataclasses.astuple(s) for s in split.shards] for name, split in sorted(self.splits.items())}
        parts = [shards, self.tokenizer_fingerprint, self.dtype, self.vocabulary, self.begin, self.end]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def tokenizer_directory(self) -> pathlib.Path:
        return self.directory / "tokenizer"

    def split(self, name: str) -> Split:
        if name not in self.splits:
            raise ValueError(f"split is {name!r}; legal: {', '.join(self.splits)}")
        return self.splits[name]

    def documents_longer_than(self, split: str, context: int) -> tuple[int, int]:
        """Least and greatest possible number of documents of more than `context` tokens.

        Lengths are kept by powers of two, so the two are equal where `context` is one.
        """
        lengths = self.split(split).document_lengths
        least = sum(count for power, count in lengths.items() if power // 2 >= context)
        return least, sum(count for power, count in lengths.items() if power > context)

    def save(self) -> None:
        """Writes `directory`/manifest.json; ends in a rename, so that a manifest is whole or absent."""
        body = {"format": _FORMAT, "version": _VERSION} | dataclasses.asdict(self)
        del body["directory"]
        temporary = self.directory / (MANIFEST + ".partial")
        temporary.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, self.directory / MANIFEST)

    @classmethod
    def load(cls, directory: str | pathlib.Path) -> "Manifest":
        """Reads `directory`/manifest.json. ValueError if it is absent, not JSON, or of another format."""
        path = pathlib.Path(directory) / MANIFEST
        if not path.parent.is_dir():
            raise ValueError(f"no prepared corpus: {str(directory)!r} is not a directory; {_REMEDY}")
        if not path.is_file():
            raise ValueError(f"no prepared corpus: {str(directory)!r} holds no {MANIFEST}; {_REMEDY}")
        try:
            body = json.loads(path.read_bytes())
            found = body.pop("format"), body.pop("version")
            if found != (_FORMAT, _VERSION):
                raise ValueError(f"format {found}, this version reads {(_FORMAT, _VERSION)}")
            splits = {name: _split_from(split) for name, split in body.pop("splits").items()}
            return cls(directory=path.parent, splits=splits, **body)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(path)!r} is not a manifest ({type(error).__name__}: {error}); {_AGAIN}") from error


def _split_from(body: dict[str, Any]) -> Split:
    shards = tuple(Shard(**shard) for shard in body.pop("shards"))
    lengths = {int(power): count for power, count in body.pop("document_lengths").items()}
    return Split(shards=shards, document_lengths=lengths, **body)


def verify(manifest: Manifest) -> None:
    """Reads every shard and compares its checksum. ValueError names the first shard that differs or is missing."""
    for split in manifest.splits.values():
        for shard in split.shards:
            path = manifest.directory / shard.file
            if not path.is_file():
                raise ValueError(f"shard {str(path)!r} is missing; {_AGAIN}")
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != shard.sha256:
                raise ValueError(f"shard {str(path)!r} has sha256 {found}, the manifest says {shard.sha256}; {_AGAIN}")


class Rows:
    """Random access to the windows of a split: `rows[i]` is tokens [i * context, (i + 1) * context + 1), int32.

    A row shares its last token with the next row's first, so every token but the split's first is once a target. What
    does not fill a last row is left out. Memory does not grow with the corpus. Instances can be pickled; each process
    opens its own files, when it first reads them.
    """

    def __init__(self, manifest: Manifest, split: str, context: int):
        """ValueError if the split has no whole row, or a shard is missing or not of the size it was written with."""
        if context < 1:
            raise ValueError(f"context is {context}; legal: an integer of 1 or more")
        self.context = context
        self.vocabulary = manifest.vocabulary
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        described = manifest.split(split)
        self._length = (described.tokens - 1) // context
        if self._length < 1:
            raise ValueError(
                f"split {split!r} has {described.tokens} tokens, fewer than one row of context + 1 = {context + 1}; "
                "prepare more text or take a shorter context"
            )
        self._paths = [str(manifest.directory / shard.file) for shard in described.shards]
        self._starts = [0, *itertools.accumulate(shard.tokens for shard in described.shards)]
        for path, shard in zip(self._paths, described.shards, strict=True):
            expected = shard.tokens * self._dtype.itemsize
            if not os.path.isfile(path):
                raise ValueError(f"shard {path!r} is missing, {expected} bytes expected; {_AGAIN}")
            if (found := os.path.getsize(path)) != expected:
                raise ValueError(f"shard {path!r} has {found} bytes, {expected} expected; {_AGAIN}")
        self._reset_handles()

    def _reset_handles(self) -> None:
        self._handles: dict[int, int] = {}
        weakref.finalize(self, _close_all, self._handles)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_handles"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset_handles()

    def __repr__(self) -> str:
        return f"Rows({len(self)} of {self.context} + 1 tokens)"

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        """Tokens [context + 1] int32 of row `index`. ValueError if a shard is cut short or holds an impossible id."""
        if not 0 <= index < self._length:
            raise IndexError(f"row {index}; legal: 0 to {self._length - 1}")
        start = int(index) * self.context
        row = np.empty(self.context + 1, np.int32)
        filled = 0
        while filled < row.size:
            shard = bisect.bisect_right(self._starts, start + filled) - 1
            offset = start + filled - self._starts[shard]
            part = self._read(shard, offset, min(row.size - filled, self._starts[shard + 1] - start - filled))
            if (greatest := int(part.max())) >= self.vocabulary:
                raise ValueError(
                    f"shard {self._paths[shard]!r}, row {index}: token id {greatest}, but the vocabulary has "
                    f"{self.vocabulary}; {_AGAIN}"
                )
            row[filled : filled + part.size] = part
            filled += part.size
        return row

    def _read(self, shard: int, offset: int, count: int) -> np.ndarray:
        size = self._dtype.itemsize
        handle = self._handles.get(shard)
        kept = handle is not None
        if handle is None:
            handle = os.open(self._paths[shard], os.O_RDONLY)
            # Beyond this many shards a handle is closed after its read, well under the usual limit of a process.
            # setdefault: of two threads that open the same shard, the later one closes its own.
            kept = len(self._handles) < _MOST_HANDLES and self._handles.setdefault(shard, handle) == handle
        try:
            content = os.pread(handle, count * size, offset * size)
        finally:
            if not kept:
                os.close(handle)
        if len(content) != count * size:
            raise ValueError(f"shard {self._paths[shard]!r} was cut short while in use; {_AGAIN}")
        return np.frombuffer(content, self._dtype)


def _close_all(handles: dict[int, int]) -> None:
    for handle in handles.values():
        os.close(handle)


def pack(window: np.ndarray, begin: int) -> Batch:
    """The fields of a window of tokens [T + 1] or [B, T + 1]; `begin` is the id that opens a document.

    A document cut by a row's end goes on in the next row as a piece of its own, with positions from 0.
    """
    window = np.asarray(window)  # also takes a window off the shared memory of a worker
    tokens, targets = window[..., :-1].astype(np.int32), window[..., 1:].astype(np.int32)
    opens = tokens == begin
    index = np.broadcast_to(np.arange(tokens.shape[-1], dtype=np.int32), tokens.shape)
    start = np.maximum.accumulate(np.where(opens, index, np.int32(0)), axis=-1)
    return Batch(
        tokens=tokens,
        targets=targets,
        document=np.cumsum(opens, axis=-1, dtype=np.int32),
        position=index - start,
        weight=(targets != begin).astype(np.float32),
    )
