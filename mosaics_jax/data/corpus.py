"""What a prepared corpus is: its manifest, and the small files beside each shard (docs/data_format.md)."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from mosaics_jax import paths, whole
from mosaics_jax.data import files, legal

MANIFEST = "manifest.json"
SKIPPED = "skipped.jsonl"
FILES = "files.jsonl"
SPLITS = ("train", "valid")
BLOCK = 1 << 14
_FORMAT = "mosaics_jax tokens"
# Version 2 had no digest, and nothing told whether its .documents files were damaged.
_VERSION, _BEFORE = 3, 2
_REMEDY = "run `python -m launch.prepare --output=DIR` to make one"
AGAIN = "restore it from a copy, or prepare the corpus again"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of little-endian token ids, and nothing else in it; whole documents.

    Attributes:
      sha256: of the file.
      documents_sha256: of `documents_file`; "" in a corpus of version 2, which did not keep it.
    """

    file: str
    tokens: int
    documents: int
    sha256: str
    documents_sha256: str = ""

    @property
    def checksums_file(self) -> str:
        """CRC-32 of every 16 KiB of the shard, uint32 each: what a reader checks, without reading the whole."""
        return self.file.removesuffix(".tokens") + ".crc32"

    @property
    def documents_file(self) -> str:
        """Where each document ends, in tokens from the shard's beginning, uint64 each."""
        return self.file.removesuffix(".tokens") + ".documents"


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
    """What `prepare` made and how; written as manifest.json beside the shards.

    Attributes:
      skipped: number of documents left out, by reason: empty, not_utf8, broken (each listed in skipped.jsonl).
      arguments, command: what made it, without what does not change the result.
      note: how documents were held out, where the hash of each left a split empty.
    """

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
    command: str = ""
    note: str = ""

    @property
    def fingerprint(self) -> str:
        """sha256 of what rows are made of: equal for the same tokens in the same shards, wherever they lie."""
        # Without documents_sha256: where documents end stands in the tokens too, and older corpora keep theirs.
        shards = {
            name: [(shard.file, shard.tokens, shard.documents, shard.sha256) for shard in split.shards]
            for name, split in sorted(self.splits.items())
        }
        parts = [shards, self.tokenizer_fingerprint, self.dtype, self.vocabulary, self.begin, self.end]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def stored(self) -> np.dtype:
        """The type of an id on disk."""
        return np.dtype(self.dtype).newbyteorder("<")

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
        write_sealed(self.directory / MANIFEST, body)

    @classmethod
    def load(cls, directory: str | pathlib.Path) -> "Manifest":
        """Reads `directory`/manifest.json. ValueError if it is absent, not JSON, or of another format."""
        path = paths.absolute(directory) / MANIFEST
        if not os.path.isdir(path.parent):  # False also for what can be no path; so is isfile
            raise ValueError(f"no prepared corpus: {str(directory)!r} is not a directory; {_REMEDY}")
        if not os.path.isfile(path):
            raise ValueError(f"no prepared corpus: {str(directory)!r} holds no {MANIFEST}; {_REMEDY}")
        try:
            return _manifest_from(path.parent, whole.load_json(path))
        except OSError as error:
            raise files.cannot_read(path, error, AGAIN) from error
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{str(path)!r} is not a manifest ({reason}); {AGAIN}") from error


def _manifest_from(directory: pathlib.Path, sealed: Any) -> Manifest:
    """ValueError for anything that `Manifest.save` does not write."""
    body = whole.opened(sealed)
    if (found := (body.get("format"), body.get("version"))) not in ((_FORMAT, _VERSION), (_FORMAT, _BEFORE)):
        raise ValueError(f"format {reprlib.repr(found)}, this version reads {(_FORMAT, _VERSION)}")
    if body["version"] != _BEFORE and whole.DIGEST not in sealed:
        raise ValueError(f"it lacks the field {whole.DIGEST!r}")
    body = {name: value for name, value in body.items() if name not in ("format", "version")}
    made = legal.checked(Manifest, body | {"directory": directory}, "it", {
        "dtype": lambda value: value in ("uint16", "uint32"),
        "vocabulary": legal.token_id, "begin": legal.token_id, "end": legal.token_id,
        "tokenizer_kind": legal.text, "tokenizer_fingerprint": legal.text, "splits": legal.mapping,
        "skipped": legal.counts, "arguments": legal.mapping, "command": lambda value: isinstance(value, str),
        "note": legal.text,
    })  # fmt: skip
    if sorted(made.splits) != sorted(SPLITS):
        raise ValueError(f"splits {reprlib.repr(list(made.splits))}; legal: {', '.join(SPLITS)}")
    return dataclasses.replace(made, splits={name: _split_from(split, name) for name, split in made.splits.items()})


def _split_from(body: Any, name: str) -> Split:
    made = legal.checked(Split, body, f"split {name!r}", {
        "documents": legal.count, "tokens": legal.count, "bytes": legal.count,
        "shards": lambda value: isinstance(value, list),
        "bigram_entropy": lambda value: isinstance(value, int | float) and 0 <= value <= 8,
        "document_lengths": lambda value: (
            legal.counts(value) and all(map(re.compile("[1-9][0-9]{0,18}").fullmatch, value))
        ),
    })  # fmt: skip
    shards = tuple(shard_from(shard, name) for shard in made.shards)
    lengths = {int(power): count for power, count in made.document_lengths.items()}
    return dataclasses.replace(made, shards=shards, document_lengths=lengths)


def shard_from(body: Any, split: str) -> Shard:
    """The shard that `body`, read from a file, describes. ValueError where it is none, or its file lies elsewhere."""
    return legal.checked(Shard, body, f"a shard of split {split!r}", {
        # A name of the directory's own: no folder, no NUL, nothing that a file system reads in a way of its own.
        "file": lambda value: legal.text(value) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\.tokens", value),
        "tokens": legal.count, "documents": legal.count, "sha256": legal.sha256,
        "documents_sha256": lambda value: value == "" or legal.sha256(value),
    })  # fmt: skip


def shard_document_ends(manifest: Manifest, shard: Shard) -> np.ndarray:
    """Where each document of a shard ends, in tokens from its beginning. ValueError if the file is not the shard's."""
    path = manifest.directory / shard.documents_file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise files.cannot_read(path, error, AGAIN) from error
    if shard.documents_sha256 not in ("", hashlib.sha256(content).hexdigest()) or len(content) != 8 * shard.documents:
        raise ValueError(f"{str(path)!r} is not what was written; {AGAIN}")
    ends = np.frombuffer(content, "<u8").astype(np.int64)
    sizes = np.diff(ends, prepend=0)
    if sizes.min(initial=2) < 2 or int(sizes.sum()) != shard.tokens:
        raise ValueError(f"{str(path)!r} does not match its shard; {AGAIN}")
    return ends


def document_ends(manifest: Manifest, split: str) -> np.ndarray:
    """Where each document of a split ends, in tokens from the split's beginning."""
    parts, before = [np.zeros(0, np.int64)], 0
    for shard in manifest.split(split).shards:
        parts.append(before + shard_document_ends(manifest, shard))
        before += shard.tokens
    return np.concatenate(parts)


def checksums(stream: BinaryIO) -> tuple[bytes, str]:
    """CRC-32 of every block of a shard, as its .crc32 file holds them, and the sha256 of the whole."""
    whole = hashlib.sha256()
    blocks = bytearray()
    while piece := stream.read(64 * BLOCK):
        whole.update(piece)
        view = memoryview(piece)
        for start in range(0, len(piece), BLOCK):
            blocks += zlib.crc32(view[start : start + BLOCK]).to_bytes(4, "little")
    return bytes(blocks), whole.hexdigest()


def length_counts(lengths: np.ndarray) -> Counter[int]:
    """`Split.document_lengths` of documents of these lengths in tokens."""
    return Counter(1 << (length - 1).bit_length() for length in lengths.tolist())


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that is whole or absent. ValueError, naming it, where the disk refuses."""
    try:
        whole.write(path, content)
    except OSError as error:
        raise cannot_write(path, error) from error


def write_sealed(path: pathlib.Path, body: Mapping[str, Any]) -> None:
    """Writes a JSON file with its own digest. ValueError, naming it, where the disk refuses."""
    try:
        whole.write_json(path, body)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: pathlib.Path, error: OSError) -> ValueError:
    return ValueError(
        f"{str(path)!r} cannot be written ({files.meaning(error)}); mend that, or name another --output; "
        "the same command goes on from what is done"
    )
