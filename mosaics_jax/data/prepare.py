"""Text to a prepared corpus: token shards, the tokenizer, and a manifest that says what they are.

Every document becomes [begin] + ids + [end]; the documents of a split lie end to end, cut into shards of equal size.
Whether a document is held out depends on its content alone, so equal documents are never on both sides.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from mosaics_jax.data.documents import Document, read_documents
from mosaics_jax.data.source import MANIFEST, SPLITS, Manifest, Shard, Split
from mosaics_jax.data.tokenizer import Tokenizer, make_tokenizer

Progress = Callable[[int, int], None]

_CHUNK_BYTES = 4_000_000


def prepare(
    inputs: Sequence[str],
    output: str,
    tokenizer: str = "bytes",
    valid_fraction: float = 0.02,
    shard_tokens: int = 2**26,
    max_bytes: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Tokenizes `inputs` into the new directory `output`.

    Everything is written beside `output` and renamed at the end: a prepared corpus is whole or not there.

    Args:
      inputs: files, folders and the word `python`; see `read_documents`.
      output: directory to make; it may exist if it is empty.
      tokenizer: see `make_tokenizer`. A BPE is trained on the training documents only.
      valid_fraction: share of documents to hold out.
      shard_tokens: tokens of a shard; the last of a split may have fewer.
      max_bytes: stop before the document that would bring the text (UTF-8) past this many bytes.
      progress: called with documents and bytes done so far.

    Raises:
      ValueError: an input cannot be read, an argument is out of range, a split would be empty, or `output` is
        not empty.
    """
    if not 0 < valid_fraction < 1:
        raise ValueError(f"valid_fraction is {valid_fraction}; legal: more than 0 and less than 1")
    for name, value in (("shard_tokens", shard_tokens), ("max_bytes", max_bytes)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; legal: an integer of 1 or more")
    target = pathlib.Path(output).absolute()
    _check_free(target)
    arguments = {
        "inputs": list(inputs), "tokenizer": tokenizer, "valid_fraction": valid_fraction,
        "shard_tokens": shard_tokens, "max_bytes": max_bytes,
    }  # fmt: skip
    texts = (
        document.text
        for document in _cut(read_documents(inputs, Counter()), max_bytes)
        if _split_of(document, valid_fraction) == "train"
    )
    made = make_tokenizer(tokenizer, texts)
    skipped: Counter[str] = Counter(empty=0, not_utf8=0)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    temporary.mkdir(parents=True)
    try:
        documents = _cut(read_documents(inputs, skipped), max_bytes)
        splits = _write_splits(documents, temporary, made, valid_fraction, shard_tokens, progress)
        manifest = Manifest(
            directory=temporary, dtype=_dtype(made).name, vocabulary=made.vocabulary, begin=made.begin, end=made.end,
            tokenizer_kind=made.kind, tokenizer_fingerprint=made.fingerprint,
            splits=splits, skipped=dict(skipped), arguments=arguments,
        )  # fmt: skip
        made.save(manifest.tokenizer_directory)
        manifest.save()
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return dataclasses.replace(manifest, directory=pathlib.Path(output))


def _check_free(target: pathlib.Path) -> None:
    if (target / MANIFEST).exists():
        raise ValueError(f"output {str(target)!r} already holds a prepared corpus; remove it or name another directory")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output {str(target)!r} exists and is not an empty directory; name another directory")


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocabulary <= 2**16 else np.uint32)


def _split_of(document: Document, valid_fraction: float) -> str:
    draw = int.from_bytes(hashlib.sha256(document.utf8).digest()[:8], "big") / 2**64
    return "valid" if draw < valid_fraction else "train"


def _cut(documents: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    if max_bytes is None:
        yield from documents
        return
    taken = 0
    for document in documents:
        taken += len(document.utf8)
        if taken > max_bytes:
            if taken == len(document.utf8):
                raise ValueError(f"max_bytes is {max_bytes}, but the first document has {taken} bytes; raise max_bytes")
            return
        yield document


def _write_splits(
    documents: Iterable[Document],
    directory: pathlib.Path,
    tokenizer: Tokenizer,
    valid_fraction: float,
    shard_tokens: int,
    progress: Progress | None,
) -> dict[str, Split]:
    writers = {name: _SplitWriter(directory, name, tokenizer, shard_tokens) for name in SPLITS}
    count = size = 0
    # tiktoken and tokenizers leave the interpreter lock while they encode, so threads use every core.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for chunk in _chunks(documents):
            encoded = pool.map(tokenizer.encode, [document.text for document in chunk])
            for document, ids in zip(chunk, encoded, strict=True):
                writers[_split_of(document, valid_fraction)].add(document.utf8, ids)
            count += len(chunk)
            size += sum(len(document.utf8) for document in chunk)
            if progress:
                progress(count, size)
    splits = {name: writer.finish() for name, writer in writers.items()}
    for name, remedy in (("valid", "raise"), ("train", "lower")):
        if not splits[name].documents:
            raise ValueError(
                f"valid_fraction is {valid_fraction}, which leaves the {name} split of {count} documents empty; "
                f"{remedy} valid_fraction or give more documents"
            )
    return splits


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.utf8)
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _SplitWriter:
    """Writes the shards of one split and keeps its statistics."""

    def __init__(self, directory: pathlib.Path, name: str, tokenizer: Tokenizer, shard_tokens: int):
        self._directory, self._name, self._shard_tokens = directory, name, shard_tokens
        self._begin, self._end = tokenizer.begin, tokenizer.end
        self._dtype = _dtype(tokenizer).newbyteorder("<")
        self._shards: list[Shard] = []
        self._waiting: list[np.ndarray] = []
        self._waiting_tokens = 0
        self._lengths: Counter[int] = Counter()
        self._bytes = 0
        self._bigrams = _Bigrams()

    def add(self, utf8: bytes, ids: np.ndarray) -> None:
        document = np.empty(ids.size + 2, self._dtype)
        document[0], document[1:-1], document[-1] = self._begin, ids, self._end
        self._lengths[1 << (document.size - 1).bit_length()] += 1
        self._bytes += len(utf8)
        self._bigrams.add(utf8)
        self._waiting.append(document)
        self._waiting_tokens += document.size
        if self._waiting_tokens >= self._shard_tokens:
            self._write(last=False)

    def finish(self) -> Split:
        self._write(last=True)
        return Split(
            documents=self._lengths.total(),
            tokens=sum(shard.tokens for shard in self._shards),
            bytes=self._bytes,
            bigram_entropy=self._bigrams.entropy(),
            document_lengths=dict(sorted(self._lengths.items())),
            shards=tuple(self._shards),
        )

    def _write(self, last: bool) -> None:
        """Writes whole shards of the tokens at hand, and with `last` what remains of them."""
        tokens = np.concatenate([np.empty(0, self._dtype), *self._waiting])
        stop = tokens.size if last else tokens.size - tokens.size % self._shard_tokens
        for start in range(0, stop, self._shard_tokens):
            content = tokens[start : min(start + self._shard_tokens, stop)].tobytes()
            file = f"{self._name}-{len(self._shards):05d}.tokens"
            (self._directory / file).write_bytes(content)
            size = len(content) // self._dtype.itemsize
            self._shards.append(Shard(file, size, hashlib.sha256(content).hexdigest()))
        self._waiting = [tokens[stop:].copy()]
        self._waiting_tokens = tokens.size - stop


class _Bigrams:
    """Counts of adjacent bytes, never across documents."""

    def __init__(self) -> None:
        self._counts = np.zeros(2**16, np.int64)
        self._waiting: list[np.ndarray] = []
        self._waiting_pairs = 0

    def add(self, utf8: bytes) -> None:
        text = np.frombuffer(utf8, np.uint8)
        self._waiting.append(text[:-1].astype(np.uint16) << 8 | text[1:])
        self._waiting_pairs += text.size
        # Counting has a cost of its own that small documents should share.
        if self._waiting_pairs >= 2**20:
            self._count()

    def _count(self) -> None:
        if self._waiting:
            self._counts += np.bincount(np.concatenate(self._waiting), minlength=2**16)
        self._waiting, self._waiting_pairs = [], 0

    def entropy(self) -> float:
        """H(next | previous) in bits: -sum p(previous, next) log2 p(next | previous); 0 where there are no pairs."""
        self._count()
        pairs = self._counts.reshape(256, 256)
        seen = pairs > 0
        given = np.broadcast_to(pairs.sum(1, keepdims=True), pairs.shape)[seen]
        bits = pairs[seen] * np.log2(given / pairs[seen])
        return float(bits.sum()) / max(1, int(pairs.sum()))
