"""A prepared corpus, looked at: everything checked, what it holds, what a row of it holds."""

import itertools
import json
import pathlib
from collections import Counter
from collections.abc import Iterator

import numpy as np

from mosaics_jax.data import files
from mosaics_jax.data.corpora import PACKINGS
from mosaics_jax.data.corpus import AGAIN, FILES, SKIPPED, Manifest, Shard, Split, checksums, length_counts
from mosaics_jax.data.inputs import suffixes
from mosaics_jax.data.packing import BestFitRows
from mosaics_jax.data.source import fields
from mosaics_jax.data.tokenizer import Tokenizer, continuation, load_tokenizer

_PIECE_TOKENS = 1 << 22
_SHOWN = 300


def problems(manifest: Manifest) -> Iterator[str]:
    """A line for everything that is wrong with a corpus: files, checksums, ids, documents, counts, tokenizer, plans.

    Reads all of it, a few MB at a time.
    """
    try:
        tokenizer = load_tokenizer(manifest.tokenizer_directory)
        if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
            yield f"{str(manifest.tokenizer_directory)!r} is not the tokenizer that the shards were made with"
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


def _shard_problems(manifest: Manifest, shard: Shard, lengths: Counter[int]) -> Iterator[str]:
    path = manifest.directory / shard.file
    try:
        with path.open("rb") as stream:
            blocks, sha256 = checksums(stream)
        size = path.stat().st_size
        sums = (manifest.directory / shard.checksums_file).read_bytes()
        ends = np.fromfile(manifest.directory / shard.documents_file, "<u8").astype(np.int64)
    except OSError as error:
        problem = files.cannot_read(error.filename, error, AGAIN)
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
    sizes = np.diff(ends, prepend=0)
    if len(ends) != shard.documents or sizes.min(initial=2) < 2 or int(ends[-1] if len(ends) else 0) != shard.tokens:
        yield f"{str(manifest.directory / shard.documents_file)!r} does not match its shard; {AGAIN}"
        return
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
    tokenizer = load_tokenizer(manifest.tokenizer_directory)
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
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
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
    path = manifest.directory / SKIPPED
    if not path.exists():
        return []
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [f"{record['where']} {record['why']}" for record in records]
