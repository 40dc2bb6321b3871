"""Best-fit packing: rows that hold whole documents, padded; only what is longer than a row is cut.

Ding et al., *Fewer truncations improve language modeling*, 2024. A document is cut into pieces of at most T tokens,
and each piece, the longest first, goes to the row with the least space that still holds it. Which piece lies where is
worked out once, shard by shard, and kept beside the shards (`plan_rows`), so that any row is found in O(1) memory.
"""

import bisect
import itertools
import json
import os
import pathlib
from typing import Any

import numpy as np

from mosaics_jax.data import files
from mosaics_jax.data.corpus import Manifest, Shard, cannot_write, shard_document_ends, write_whole
from mosaics_jax.data.source import Tokens, check_context, check_size

_FORMAT = "mosaics_jax packing 1"


def plan_folder(manifest: Manifest, context: int) -> pathlib.Path:
    return manifest.directory / f"packing-{context}"


def best_fit(lengths: np.ndarray, context: int) -> list[list[int]]:
    """Rows of indices of `lengths` (each at most `context`), whose sums are at most `context`."""
    rows: list[list[int]] = []
    with_space: dict[int, list[int]] = {}  # rows by the space they have left
    spaces: list[int] = []  # the keys of it, sorted
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        place = bisect.bisect_left(spaces, length)
        if place == len(spaces):
            row, space = len(rows), context
            rows.append([])
        else:
            space = spaces[place]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[place]
        rows[row].append(index)
        if left := space - length:
            if left not in with_space:
                with_space[left] = []
                bisect.insort(spaces, left)
            with_space[left].append(row)
    return rows


def plan_shard(manifest: Manifest, shard: Shard, context: int) -> int:
    """Writes the rows of one shard: .rows, where each row's pieces begin; .pieces, where each begins and its length.

    Both are uint64, counted in pieces, and in tokens from the shard's beginning. Returns the number of rows.
    """
    ends = shard_document_ends(manifest, shard)
    # A document's end token is predicted and nothing is predicted from it, so it takes no place.
    sizes = np.diff(ends, prepend=0) - 1
    counts = -(-sizes // context)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    part = np.arange(int(counts.sum())) - first
    starts = np.repeat(ends - 1 - sizes, counts) + part * context
    lengths = np.minimum(np.repeat(ends - 1, counts) - starts, context)
    rows = best_fit(lengths, context)
    order = np.fromiter(itertools.chain.from_iterable(rows), np.int64, len(lengths))
    table = np.stack([starts[order], lengths[order]], axis=1)
    folder, name = plan_folder(manifest, context), shard.file.removesuffix(".tokens")
    write_whole(folder / f"{name}.pieces", table.astype("<u8").tobytes())
    write_whole(folder / f"{name}.rows", np.cumsum([0, *map(len, rows)]).astype("<u8").tobytes())
    return len(rows)


def plan_rows(manifest: Manifest, context: int) -> dict[str, float]:
    """Plans all shards for rows of `context`; returns the fill of each split: predictions by places.

    The plan is whole or absent: its description is written last.
    """
    check_context(context)
    try:
        plan_folder(manifest, context).mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(plan_folder(manifest, context), error) from error
    rows = {
        name: [plan_shard(manifest, shard, context) for shard in split.shards]
        for name, split in manifest.splits.items()
    }
    body = {"format": _FORMAT, "context": context, "corpus": manifest.fingerprint, "rows": rows}
    write_whole(plan_folder(manifest, context) / "plan.json", json.dumps(body, indent=2).encode())
    return {
        name: (split.tokens - split.documents) / max(1, sum(rows[name]) * context)
        for name, split in manifest.splits.items()
    }


class BestFitRows:
    """The rows of a plan: `rows[i]` is int32 [2, T]. Every token but those that begin a document is once a target.

    What is left of a row is padding: a piece by itself, of inputs `end` (which no document has as an input here) and
    targets `begin`, which are never counted.
    """

    def __init__(self, manifest: Manifest, split: str, context: int):
        """ValueError if there is no plan for this context, or it is of another corpus, or damaged."""
        check_context(context)
        self.context = context
        self._tokens = Tokens(manifest, split)
        self._end = manifest.end
        folder = plan_folder(manifest, context)
        remedy = f"`python -m launch.prepare --pack={manifest.directory} --context={context}` makes it"
        try:
            body = json.loads((folder / "plan.json").read_bytes())
        except OSError:
            raise ValueError(
                f"{str(manifest.directory)!r} has no best-fit plan for rows of {context}; {remedy}"
            ) from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{str(folder / 'plan.json')!r} is damaged ({error}); {remedy}") from error
        if not isinstance(body, dict) or (body.get("format"), body.get("corpus")) != (_FORMAT, manifest.fingerprint):
            raise ValueError(f"{str(folder)!r} was planned for another corpus; {remedy} anew")
        shards = manifest.split(split).shards
        counts = _row_counts(body.get("rows"), split, len(shards))
        if counts is None:
            raise ValueError(f"{str(folder / 'plan.json')!r} is damaged (its rows of {split!r}); {remedy}")
        self._shards = shards
        self._names = [str(folder / shard.file.removesuffix(".tokens")) for shard in shards]
        self._rows = [0, *itertools.accumulate(counts)]
        self._shard_starts = [0, *itertools.accumulate(shard.tokens for shard in shards)]
        for name, count in zip(self._names, counts, strict=True):
            check_size(f"{name}.rows", 8 * (count + 1))

    def __len__(self) -> int:
        return self._rows[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index}; legal: 0 to {len(self) - 1}")
        shard = bisect.bisect_right(self._rows, index) - 1
        first, last = _numbers(f"{self._names[shard]}.rows", int(index) - self._rows[shard], 2).tolist()
        table = _numbers(f"{self._names[shard]}.pieces", 2 * first, 2 * (last - first)).reshape(-1, 2)
        row = np.empty((2, self.context), np.int32)
        row[0], row[1] = self._end, self._tokens.begin
        place = 0
        tokens = self._shards[shard].tokens
        for start, length in table.tolist():
            if not (0 <= start < start + length < tokens and place + length <= self.context):
                raise ValueError(f"the plan {self._names[shard]!r} does not fit its shard; plan the rows again")
            piece = self._tokens.read(self._shard_starts[shard] + start, length + 1)
            row[0, place : place + length], row[1, place : place + length] = piece[:-1], piece[1:]
            row[0, place] = ~row[0, place]
            place += length
        if place < self.context:
            row[0, place] = ~row[0, place]
        return row

    def problem(self) -> str | None:
        """What is wrong with the plan, if something is: every document must lie in the rows, and no row be too full."""
        for name, first, shard in zip(self._names, self._rows, self._shards, strict=False):
            rows = _numbers(f"{name}.rows", 0, os.path.getsize(f"{name}.rows") // 8)
            if rows[0] or (np.diff(rows) < 1).any():
                return f"the plan {name!r} (rows from {first}) is damaged; plan the rows again"
            table = _numbers(f"{name}.pieces", 0, 2 * int(rows[-1])).reshape(-1, 2)
            full = np.add.reduceat(table[:, 1], rows[:-1]) if len(rows) > 1 else np.zeros(1, np.int64)
            in_order = table[np.argsort(table[:, 0])]
            ends = in_order.sum(axis=1)
            gaps = np.append(in_order[:, 0], shard.tokens) - np.append(0, ends)  # the end of each document is one
            whole = len(gaps) and not gaps[0] and set(gaps.tolist()) <= {0, 1} and gaps.sum() == shard.documents
            if full.max() > self.context or not whole:
                return f"the plan {name!r} (rows from {first}) does not cover its shard; plan the rows again"
        return None


def _row_counts(rows: Any, split: str, shards: int) -> list[int] | None:
    """Rows of each shard as plan.json has them; None where it has something else."""
    counts = rows.get(split) if isinstance(rows, dict) else None
    if not isinstance(counts, list) or len(counts) != shards:
        return None
    return counts if all(type(count) is int and 0 <= count < 2**50 for count in counts) else None


def _numbers(path: str, start: int, count: int) -> np.ndarray:
    try:
        with open(path, "rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            whole = 0 <= 8 * start <= 8 * (start + count) <= size  # a damaged plan names places that no file has
            content = os.pread(stream.fileno(), 8 * count, 8 * start) if whole else b""
    except OSError as error:
        raise files.cannot_read(path, error, "plan the rows again") from error
    if not whole or len(content) != 8 * count:
        raise ValueError(f"{path!r} ends at byte {size}, {8 * (start + count)} expected; plan the rows again")
    return np.frombuffer(content, "<u8").astype(np.int64)
