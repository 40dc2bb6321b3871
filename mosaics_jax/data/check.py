"""A prepared corpus, looked at: everything checked, what it holds, what a row of it holds."""

import itertools
import json
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from mosaics_jax.data import files
from mosaics_jax.data.corpora import PACKINGS
from mosaics_jax.data.corpus import (
    AGAIN,
    FILES,
    SKIPPED,
    Manifest,
    Shard,
    Split,
    checksums,
    length_counts,
    shard_document_ends,
)
from mosaics_jax.data.inputs import suffixes
from mosaics_jax.data.packing import BestFitRows
from mosaics_jax.data.source import fields
from mosaics_jax.data.tokenizer import Tokenizer, continuation, load_tokenizer

_PIECE_TOKENS = 1 << 22
_SHOWN = 300
_SKIPPED_LEGAL = [frozenset({"where", "why"})]
_FILES_LEGAL = [frozenset({"path", "read"}), frozenset({"path", "left_out"})]


def problems(manifest: Manifest) -> Iterator[str]:
    """A line for everything that is wrong with a corpus: files, checksums, ids, documents, counts, tokenizer, plans.

    Reads all of it, a few MB at a time.
    """
    try:
        _tokenizer_of(manifest)
    except ValueError as error:
        yield str(error)
    for name, split in manifest.splits.items():
        lengths: Counter[int] = Counter()
        whole = True
        for shard in split.shards:
            found = list(_shard_problems(manifest, shard, lengths))
            whole &= not found
            yield from found
        if whole:
            yield from _count_problems(name, split, lengths)
    for folder in sorted(manifest.directory.glob("packing-*")):
        yield from _plan_problems(manifest, folder)
    yield from _list_problems(manifest)


def _tokenizer_of(manifest: Manifest) -> Tokenizer:
    """The corpus's tokenizer. ValueError where another lies in its place."""
    tokenizer = load_tokenizer(manifest.tokenizer_directory)
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        where = str(manifest.tokenizer_directory)
        raise ValueError(f"{where!r} is not the tokenizer that the shards were made with; {AGAIN}")
    return tokenizer


def _shard_problems(manifest: Manifest, shard: Shard, lengths: Counter[int]) -> Iterator[str]:
    path = manifest.directory / shard.file
    try:
        with path.open("rb") as stream:
            blocks, sha256 = checksums(stream)
        size = path.stat().st_size
        sums = (manifest.directory / shard.checksums_file).read_bytes()
    except OSError as error:
        problem = files.cannot_read(error.filename or path, error, AGAIN)
        if not isinstance(problem, ValueError):
            raise problem from error
        yield str(problem)
        return
    if (expected := shard.tokens * manifest.stored.itemsize) != size:
        yield f"shard {str(path)!r} has {size} bytes, {expected} expected; {AGAIN}"
        return
    if sha256 != shard.sha256:
        yield f"shard {str(path)!r} has sha256 {sha256}, the manifest says {shard.sha256}; {AGAIN}"
    if blocks != sums:
        yield f"{str(manifest.directory / shard.checksums_file)!r} does not match its shard; {AGAIN}"
    try:
        ends = shard_document_ends(manifest, shard)
    except ValueError as error:
        yield str(error)
        return
    sizes = np.diff(ends, prepend=0)
    if len(ends):
        yield from _content_problems(manifest, path, ends, ends - sizes)
    lengths.update(length_counts(sizes))


def _content_problems(manifest: Manifest, path: pathlib.Path, ends: np.ndarray, starts: np.ndarray) -> Iterator[str]:
    """Ids in range; begin where a document begins and nowhere else, end likewise."""
    with path.open("rb") as stream:
        place = 0
        while content := stream.read(_PIECE_TOKENS * manifest.stored.itemsize):
            ids = np.frombuffer(content, manifest.stored)
            if int(ids.max()) >= manifest.vocabulary:
                at = (place + int(ids.argmax())) * manifest.stored.itemsize
                yield f"shard {str(path)!r}, byte {at}: token id {ids.max()} of {manifest.vocabulary}; {AGAIN}"
                return
            for kind, marker, where in (("begin", manifest.begin, starts), ("end", manifest.end, ends - 1)):
                expected = where[np.searchsorted(where, place) : np.searchsorted(where, place + len(ids))]
                if not np.array_equal(np.flatnonzero(ids == marker) + place, expected):
                    yield f"shard {str(path)!r}: its {kind} tokens are not where its documents {kind}; {AGAIN}"
                    return
            place += len(ids)


def _count_problems(name: str, split: Split, lengths: dict[int, int]) -> Iterator[str]:
    for kind in ("tokens", "documents"):
        if (found := sum(getattr(shard, kind) for shard in split.shards)) != getattr(split, kind):
            yield f"split {name!r} has {found} {kind} in its shards, the manifest says {getattr(split, kind)}"
    if lengths != dict(split.document_lengths):
        yield f"split {name!r} has other document lengths than the manifest says"


def _plan_problems(manifest: Manifest, folder: pathlib.Path) -> Iterator[str]:
    if not re.fullmatch("packing-[1-9][0-9]{0,9}", folder.name):
        yield f"{str(folder)!r} is not named as a plan is, packing-CONTEXT; move it away"
        return
    try:
        context = int(folder.name.removeprefix("packing-"))
        for split in manifest.splits:
            rows = BestFitRows(manifest, split, context)
            if (found := rows.problem()) is not None:
                yield found
    except ValueError as error:
        yield f"{str(folder)!r}: {error}"


def summary(manifest: Manifest) -> str:
    """What a corpus holds, for a person."""
    lines = [
        f"{manifest.directory}: {manifest.tokenizer_kind} tokenizer of {manifest.vocabulary:,} ids, {manifest.dtype}"
    ]
    lines += [f"made by {manifest.command}"] if manifest.command else []
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in manifest.skipped.items() if count)
    lines += [f"left out: {left_out}"] if left_out else []
    for name, split in manifest.splits.items():
        lines += [
            "",
            f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes, "
            f"{len(split.shards):,} shards, bigram entropy {split.bigram_entropy:.3f} bits per byte",
        ]
        most = max(1, *split.document_lengths.values())
        for power, count in split.document_lengths.items():
            lines.append(f"  {power // 2 + 1:>11,} to {power:>11,} tokens {count:>11,} {'#' * -(-40 * count // most)}")
    return "\n".join(lines)


def describe_row(manifest: Manifest, split: str, row: int, context: int, packing: str) -> str:
    """The pieces of one row: where each lies, whether its document begins and ends there, and its text.

    Raises ValueError for a row, split, context or packing that is not there.
    """
    if packing not in PACKINGS:
        raise ValueError(f"packing is {packing!r}; legal: {', '.join(PACKINGS)}")
    rows = PACKINGS[packing](manifest, split, context)
    if not 0 <= row < len(rows):
        raise ValueError(f"row is {row}; legal: 0 to {len(rows) - 1} of split {split!r} at context {context}")
    batch = fields(rows[row], manifest.begin)
    tokenizer = _tokenizer_of(manifest)
    edges = [0, *(np.flatnonzero(np.diff(batch.document)) + 1).tolist(), context]
    lines = [
        f"row {row} of {len(rows):,}, split {split}, context {context}, {packing}: {len(edges) - 1} pieces, "
        f"{int(batch.weight.sum())} targets in the loss"
    ]
    for first, last in itertools.pairwise(edges):
        ids = batch.tokens[first:last]
        where = f"[{first}, {last})"
        if not batch.weight[first:last].any() and ids[0] == manifest.end:
            lines.append(f"\n--- {where} padding, {last - first} places")
            continue
        begins = "begins" if ids[0] == manifest.begin else "goes on from another row"
        ended = manifest.end in (ids[-1], batch.targets[last - 1])
        ends = "ends" if ended else "goes on in another row"
        lines += [f"\n--- {where} {last - first} tokens; its document {begins}, and {ends}", _shortened(tokenizer, ids)]
    return "\n".join(lines)


def _shortened(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    text = tokenizer.decode(ids) if ids[0] == tokenizer.begin else continuation(tokenizer, ids)
    if len(text) <= 2 * _SHOWN:
        return text
    return f"{text[:_SHOWN]}\n[... {len(text) - 2 * _SHOWN:,} characters ...]\n{text[-_SHOWN:]}"


def files_read(manifest: Manifest) -> list[str]:
    """What of its input was read, and as what, and what was left out, in a few lines; files.jsonl has all."""
    path = manifest.directory / FILES
    found = _records(path, _FILES_LEGAL)
    if not found:
        return []
    kinds = Counter(_kind(pathlib.Path(one["path"]), one["read"]) for one in found if "read" in one)
    number = f"{kinds.total():,} file{'s' if kinds.total() != 1 else ''}"
    lines = [f"read {number}: {', '.join(f'{count:,} {kind}' for kind, count in kinds.most_common(8))}"]
    why = Counter((pathlib.Path(one["path"]).suffix, one["left_out"]) for one in found if "left_out" in one)
    for (suffix, reason), count in why.most_common(8):
        which = "it" if count == 1 else "each"
        lines.append(f"left out: {count:,} {suffix or 'without a suffix'}, because {which} {reason}")
    if len(why) > 8:
        lines.append(f"left out: {why.total() - sum(count for _, count in why.most_common(8)):,} others")
    return [*lines, f"{path} lists each file"] if why else lines


def _kind(path: pathlib.Path, read: str) -> str:
    suffix, compression = suffixes(path)
    named = f"{suffix}{compression}"
    return f"{named} as records" if read == "jsonl" and suffix == ".json" else named or f"as {read}"


def skipped_records(manifest: Manifest) -> list[str]:
    """A line for each record that was left out."""
    return [f"{record['where']} {record['why']}" for record in _records(manifest.directory / SKIPPED, _SKIPPED_LEGAL)]


def _list_problems(manifest: Manifest) -> Iterator[str]:
    """Of the lists beside the shards, which no row depends on."""
    try:
        _records(manifest.directory / FILES, _FILES_LEGAL)
        skipped = len(_records(manifest.directory / SKIPPED, _SKIPPED_LEGAL))
    except ValueError as error:
        yield str(error)
        return
    if skipped != (expected := manifest.skipped.get("broken", 0)):
        yield f"{str(manifest.directory / SKIPPED)!r} lists {skipped} records, the manifest says {expected}; {AGAIN}"


def _records(path: pathlib.Path, legal: Sequence[frozenset[str]]) -> list[dict[str, str]]:
    """The lines of a list: objects of strings, with the fields of one of `legal`; none where there is no such file.

    Raises ValueError for a line that is something else.
    """
    if not os.path.lexists(path):
        return []
    found: list[dict[str, str]] = []
    try:
        content = path.read_bytes()
    except OSError as error:
        raise files.cannot_read(path, error, AGAIN) from error
    for number, line in enumerate(content.splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        texts = isinstance(record, dict) and all(isinstance(value, str) for value in record.values())
        if not texts or frozenset(record) not in legal:
            kinds = " or ".join(" and ".join(sorted(names)) for names in legal)
            raise ValueError(f"line {number} of {str(path)!r} is no object with {kinds}; {AGAIN}")
        found.append(record)
    return found
