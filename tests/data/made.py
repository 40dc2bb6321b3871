"""Corpora written by hand: known ids, and everything beside them as `prepare` would write it."""

import hashlib
import io
import pathlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mosaics_jax.data.corpus import Manifest, Shard, Split, checksums
from mosaics_jax.data.tokenizer import ByteTokenizer

# Ids beyond the bytes' 258 are free for a test to mark its tokens with.
BEGIN, END, VOCABULARY = 256, 257, 60_000


def write_shard(directory: pathlib.Path, file: str, ids: np.ndarray, ends: Sequence[int]) -> Shard:
    content = ids.tobytes()
    blocks, sha256 = checksums(io.BytesIO(content))
    where = np.array(ends, "<u8").tobytes()
    shard = Shard(file, ids.size, len(ends), sha256, hashlib.sha256(where).hexdigest())
    (directory / shard.file).write_bytes(content)
    (directory / shard.checksums_file).write_bytes(blocks)
    (directory / shard.documents_file).write_bytes(where)
    return shard


def write_split(
    directory: pathlib.Path, name: str, shards: Sequence[Sequence[Sequence[int]]], dtype: str = "uint16"
) -> Split:
    """A split of shards of documents, each given by its ids without both ends."""
    made, lengths = [], Counter()
    for number, documents in enumerate(shards):
        whole = [[BEGIN, *ids, END] for ids in documents]
        ids = np.array([i for document in whole for i in document], np.dtype(dtype).newbyteorder("<"))
        ends = np.cumsum([len(document) for document in whole])
        made.append(write_shard(directory, f"{name}-{number:05d}.tokens", ids, ends.tolist()))
        lengths.update(1 << (len(document) - 1).bit_length() for document in whole)
    tokens = sum(shard.tokens for shard in made)
    documents = sum(shard.documents for shard in made)
    return Split(documents, tokens, max(1, 2 * (tokens - documents)), 1.5, dict(sorted(lengths.items())), tuple(made))


def write_corpus(
    directory: pathlib.Path,
    train: Sequence[Sequence[Sequence[int]]],
    valid: Sequence[Sequence[Sequence[int]]] = ((tuple(range(80)),),),
    dtype: str = "uint16",
    vocabulary: int = VOCABULARY,
) -> Manifest:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = ByteTokenizer()
    tokenizer.save(directory / "tokenizer")
    fingerprint = tokenizer.fingerprint
    splits = {
        name: write_split(directory, name, shards, dtype) for name, shards in (("train", train), ("valid", valid))
    }
    manifest = Manifest(
        directory, dtype, vocabulary, BEGIN, END, "bytes", fingerprint, splits, {"empty": 0}, {"inputs": ["x"]}
    )  # fmt: skip
    manifest.save()
    return manifest


def random_documents(count: int, seed: int = 0, longest: int = 60, first: int = 1000) -> list[list[int]]:
    """Documents of 1 to `longest` ids; ids of `first` and more tell where a token came from."""
    draw = np.random.default_rng(seed)
    ids = iter(range(first, first + count * longest))
    return [[next(ids) for _ in range(draw.integers(1, longest + 1))] for _ in range(count)]
