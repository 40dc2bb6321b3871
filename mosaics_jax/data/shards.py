"""Stage files to shards: the second of prepare's two passes. Documents are put in an order that is computed.

Shard s of S holds documents [N s / S, N (s + 1) / S) of the new order; document j of it is number `permute(j)` of the
input. So every shard can be made by itself, by any worker, from the stage files and the counts in them: neither the
corpus nor a list of its documents is ever in memory.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import operator
import os
import pathlib
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mosaics_jax import whole
from mosaics_jax.data.corpus import (
    SPLITS,
    Shard,
    Split,
    cannot_write,
    checksums,
    length_counts,
    shard_from,
    write_sealed,
    write_whole,
)
from mosaics_jax.data.permutation import permutation_key, permute
from mosaics_jax.data.pool import Pool
from mosaics_jax.data.stage import Stage
from mosaics_jax.data.workplace import Progress, Settings

# A worker holds some numbers for each document of a shard.
_MOST_DOCUMENTS = 1 << 20


@dataclasses.dataclass(frozen=True)
class Layout:
    """All that decides the shards of one split."""

    split: str
    stages: Sequence[Stage]
    shards: int
    seed: int | None  # None keeps the order of the input
    dtype: np.dtype

    @functools.cached_property
    def identity(self) -> str:
        """Changes when any shard does: it names the stage files, whose names change with their units."""
        names = [pathlib.PurePath(stage.path).name for stage in self.stages]
        parts = [self.split, self.shards, self.seed, self.dtype.name, names]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @functools.cached_property
    def begins(self) -> np.ndarray:
        """Documents before each stage, and of all of them at the end."""
        return np.cumsum([0] + [stage.documents[self.split] for stage in self.stages])


def write_splits(
    pool: Pool, stages: list[Stage], folder: pathlib.Path, settings: Settings, dtype: np.dtype,
    progress: Callable[[Progress], None],
) -> dict[str, Split]:  # fmt: skip
    """The shards of each split, and what the manifest says of them."""
    splits = {}
    for name in SPLITS:
        tokens, documents = (sum(getattr(stage, kind)[name] for stage in stages) for kind in ("tokens", "documents"))
        count = min(documents, max(-(-tokens // settings.shard_tokens), -(-documents // _MOST_DOCUMENTS)))
        layout = Layout(name, stages, count, settings.shuffle_seed, dtype)

        def report(done: int, _: int, name: str = name, tokens: int = tokens) -> None:
            progress(Progress(f"writing {name}", "tok", done, tokens, done))

        pool.share(layout)
        tasks = [(number, folder) for number in range(count)]
        described = list(pool.map(_shard_task, tasks, report))
        lengths: Counter[int] = Counter()
        for one in described:
            lengths.update({int(power): number for power, number in one.pop("lengths").items()})
        splits[name] = Split(
            documents=documents,
            tokens=tokens,
            bytes=sum(stage.bytes[name] for stage in stages),
            bigram_entropy=_bigram_entropy(stages, name),
            document_lengths=dict(sorted(lengths.items())),
            shards=tuple(Shard(**one) for one in described),
        )
    return splits


def _shard_task(
    layout: Layout, number: int, folder: pathlib.Path, progress: Callable[[int, int], None] = lambda done, size: None
) -> dict[str, Any]:
    return write_shard(layout, number, folder, lambda tokens: progress(tokens, 0))


def _bigram_entropy(stages: list[Stage], split: str) -> float:
    """H(next | previous) in bits: -sum p(previous, next) log2 p(next | previous); 0 where there are no pairs."""
    pairs = np.zeros(2**16, np.int64)
    for stage in stages:
        index, counts = stage.bigrams_of(split)
        pairs[index] += counts.astype(np.int64)
    table = pairs.reshape(256, 256)
    seen = table > 0
    given = np.broadcast_to(table.sum(1, keepdims=True), table.shape)[seen]
    bits = table[seen] * np.log2(given / table[seen])
    return float(bits.sum()) / max(1, int(table.sum()))


def write_shard(layout: Layout, number: int, folder: pathlib.Path, progress: Callable[[int], None]) -> dict:
    """Makes one shard and the files beside it; the description of it is returned, and written last.

    The description holds a histogram of document lengths by powers of two besides what `Shard` holds. Where one of the
    same layout is there, the shard was made before.
    """
    name = f"{layout.split}-{number:05d}"
    description = folder / f"{name}.json"
    if (found := _found(description, layout)) is not None:
        progress(found["tokens"])
        return found
    draft = folder / f"{name}.{os.getpid()}.partial"
    try:
        with draft.open("w+b") as stream:
            lengths = _copy_documents(layout, number, stream.fileno(), progress)
            stream.seek(0)
            blocks, sha256 = checksums(stream)
            os.fsync(stream.fileno())
        os.replace(draft, folder / f"{name}.tokens")
    except OSError as error:
        raise cannot_write(folder / f"{name}.tokens", error) from error
    finally:
        draft.unlink(missing_ok=True)
    ends = np.cumsum(lengths).astype("<u8").tobytes()
    shard = Shard(f"{name}.tokens", int(lengths.sum()), len(lengths), sha256, hashlib.sha256(ends).hexdigest())
    write_whole(folder / shard.checksums_file, blocks)
    write_whole(folder / shard.documents_file, ends)
    made = vars(shard) | {"lengths": {str(power): count for power, count in length_counts(lengths).items()}}
    write_sealed(description, made | {"layout": layout.identity})
    return made


def _found(description: pathlib.Path, layout: Layout) -> dict | None:
    """What `write_shard` returned for this shard before; None where it did not, or not for this layout."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        made = whole.read_json(description)
        lengths = {str(int(power)): operator.index(count) for power, count in made.pop("lengths").items()}
        same = made.pop("layout") == layout.identity
        shard = shard_from(made, layout.split)
        if same and shard.documents_sha256 and shard.file == f"{description.stem}.tokens":
            return vars(shard) | {"lengths": lengths}
    return None


def _copy_documents(layout: Layout, number: int, out: int, progress: Callable[[int], None]) -> np.ndarray:
    """Writes the shard's documents to the file `out`; returns their lengths in tokens, in order."""
    begins = layout.begins
    total = int(begins[-1])
    first, last = total * number // layout.shards, total * (number + 1) // layout.shards
    order = np.arange(first, last)
    if layout.seed is not None:
        order = permute(order, total, permutation_key("documents", layout.seed, layout.split))
    by_input = np.argsort(order)  # each stage file is read once, forwards
    stage_of = np.searchsorted(begins, order[by_input], side="right") - 1
    edges = np.flatnonzero(np.diff(stage_of, prepend=-1, append=-1))
    runs = [(int(stage_of[a]), by_input[a:b]) for a, b in itertools.pairwise(edges.tolist())]
    places = np.empty((len(order), 3), np.uint64)
    size = layout.dtype.itemsize
    for index, mine in runs:
        stage = layout.stages[index]
        places[mine] = stage.documents_of(layout.split)[order[mine] - begins[index]]
        if int(places[mine, :2].max()) * size > os.path.getsize(stage.path):
            raise stage.damaged()
    lengths = places[:, 1].astype(np.int64)
    targets = np.cumsum(lengths) - lengths
    for index, mine in runs:
        stage = layout.stages[index]
        with open(stage.path, "rb") as stream:
            for j in mine:
                begin, length, known = map(int, places[j])
                if _copy(stream.fileno(), begin * size, out, int(targets[j]) * size, length * size) != known:
                    raise stage.damaged()
        progress(int(lengths[mine].sum()))
    return lengths


def _copy(source: int, start: int, target: int, place: int, size: int) -> int | None:
    """Copies `size` bytes between open files, at most 16 MiB of them in memory; their CRC-32, or None if some lack."""
    found = 0
    while size:
        piece = os.pread(source, min(size, 1 << 24), start)
        if not piece:
            return None
        found = zlib.crc32(piece, found)
        view = memoryview(piece)
        while view:
            written = os.pwrite(target, view, place)
            view, place = view[written:], place + written
        start, size = start + len(piece), size - len(piece)
    return found
