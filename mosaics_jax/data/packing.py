"""Best-fit packing: rows that hold whole documents, padded; only what is longer than a row is cut.

Ding et al., *Fewer truncations improve language modeling*, 2024. A document is cut into pieces of at most T tokens,
and each piece, the longest first, goes to the row with the least space that still holds it. Which piece lies where is
worked out once, shard by shard, and kept beside the shards (`plan_rows`), so that any row is found in O(1) memory.

    SHARD.pieces    for each piece its first token in the shard, and its length          uint64 pairs
    SHARD.rows      for each row the number of its first piece, and a CRC-32 of the row  uint64 pairs
                    and at the end the number of all pieces                              uint64

A row's checksum is of all that makes it: the corpus, the context, the shard, its number, its pieces.
"""

import bisect
import contextlib
import itertools
import os
import pathlib
import zlib
from collections.abc import Callable

import numpy as np

from mosaics_jax import lock, whole
from mosaics_jax.data import files
from mosaics_jax.data.corpus import Manifest, Shard, cannot_write, shard_document_ends, write_sealed, write_whole
from mosaics_jax.data.source import Tokens, check_context, check_size

PLAN = "plan.json"
_LOCK = "lock"
_FORMAT = "mosaics_jax packing 2"


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
    """Writes the rows of one shard, and returns their number."""
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
    table = np.stack([starts[order], lengths[order]], axis=1).astype("<u8")
    begins = [0, *itertools.accumulate(map(len, rows))]
    seed, content = _seed(manifest, shard, context), table.tobytes()
    index = np.zeros(2 * len(rows) + 1, "<u8")
    index[::2] = begins
    index[1::2] = [_sum(seed, row, content[16 * a : 16 * b]) for row, (a, b) in enumerate(itertools.pairwise(begins))]
    folder, name = plan_folder(manifest, context), shard.file.removesuffix(".tokens")
    write_whole(folder / f"{name}.pieces", content)
    write_whole(folder / f"{name}.rows", index.tobytes())
    return len(rows)


def _seed(manifest: Manifest, shard: Shard, context: int) -> int:
    return zlib.crc32(f"{manifest.fingerprint} {context} {shard.file}".encode())


def _sum(seed: int, row: int, pieces: bytes) -> int:
    return zlib.crc32(pieces, zlib.crc32(row.to_bytes(8, "little"), seed))


def plan_rows(manifest: Manifest, context: int) -> dict[str, float]:
    """Plans all shards for rows of `context`; returns the fill of each split: predictions by places.

    The plan is whole or absent: its description is written last. ValueError where another process plans the same, or
    the folder for it is something else.
    """
    check_context(context)
    folder = plan_folder(manifest, context)
    _check_place(manifest, folder)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(exist_ok=True)
            stack.enter_context(lock.hold(folder / _LOCK, f"the plan {str(folder)!r}"))
            for draft in _drafts(folder):  # of a process that was killed
                draft.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        rows = {
            name: [plan_shard(manifest, shard, context) for shard in split.shards]
            for name, split in manifest.splits.items()
        }
        body = {"format": _FORMAT, "context": context, "corpus": manifest.fingerprint, "rows": rows}
        write_sealed(folder / PLAN, body)
        (folder / _LOCK).unlink(missing_ok=True)
    return {
        name: (split.tokens - split.documents) / max(1, sum(rows[name]) * context)
        for name, split in manifest.splits.items()
    }


def _check_place(manifest: Manifest, folder: pathlib.Path) -> None:
    """ValueError where something else than a plan of this corpus lies at `folder`."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder, and a plan would be written there; move it away")
    shards = [shard.file.removesuffix(".tokens") for split in manifest.splits.values() for shard in split.shards]
    own = {PLAN, _LOCK} | {f"{name}.{kind}" for name in shards for kind in ("rows", "pieces")}
    own |= {draft.name for draft in _drafts(folder)}
    for path in sorted(folder.iterdir()):
        if path.name not in own or path.is_dir():
            raise ValueError(f"{str(folder)!r} holds {path.name!r}, which is not of a plan; move it away")


def _drafts(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for kind in (PLAN, "*.rows", "*.pieces") for path in folder.glob(f"{kind}.*.partial")]


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
        folder, shards = plan_folder(manifest, context), manifest.split(split).shards
        counts = _row_counts(manifest, folder, context, split)
        self._shards = shards
        self._seeds = [_seed(manifest, shard, context) for shard in shards]
        self._names = [str(folder / shard.file.removesuffix(".tokens")) for shard in shards]
        self._rows = [0, *itertools.accumulate(counts)]
        self._shard_starts = [0, *itertools.accumulate(shard.tokens for shard in shards)]
        for name, count in zip(self._names, counts, strict=True):
            check_size(f"{name}.rows", 8 * (2 * count + 1))

    def __len__(self) -> int:
        return self._rows[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index}; legal: 0 to {len(self) - 1}")
        shard = bisect.bisect_right(self._rows, index) - 1
        name = self._names[shard]
        content = self._pieces(
            shard, int(index) - self._rows[shard], lambda kind, *place: _read(f"{name}.{kind}", *place)
        )
        table = np.frombuffer(content, "<u8").astype(np.int64).reshape(-1, 2)
        row = np.empty((2, self.context), np.int32)
        row[0], row[1] = self._end, self._tokens.begin
        place = 0
        for start, length in table.tolist():
            piece = self._tokens.read(self._shard_starts[shard] + start, length + 1)
            row[0, place : place + length], row[1, place : place + length] = piece[:-1], piece[1:]
            row[0, place] = ~row[0, place]
            place += length
        if place < self.context:
            row[0, place] = ~row[0, place]
        return row

    def _pieces(self, shard: int, row: int, read: Callable[[str, int, int], bytes]) -> bytes:
        """The pieces of a shard's row, as they lie in its file. ValueError where they are damaged.

        Args:
          read: gives so many numbers, from such a number on, of .rows or of .pieces; fewer where the file ends.
        """
        place = read("rows", 2 * row, 3)
        first, known, last = (int.from_bytes(place[at : at + 8], "little") for at in (0, 8, 16))
        count = last - first if len(place) == 24 else 0
        content = read("pieces", 2 * first, 2 * count) if 0 < count <= self.context else b""
        if len(content) != 16 * count or _sum(self._seeds[shard], row, content) != known:
            rows, pieces = (f"{self._names[shard]}.{kind}" for kind in ("rows", "pieces"))
            raise ValueError(f"row {row} of {rows!r} and {pieces!r} does not match its checksum; plan the rows again")
        return content

    def problem(self) -> str | None:
        """What is wrong with the plan, if something is: every document must lie in the rows, and no row be too full."""
        for number, (name, shard) in enumerate(zip(self._names, self._shards, strict=True)):
            try:
                held = {kind: _read(f"{name}.{kind}") for kind in ("rows", "pieces")}

                def read(kind: str, start: int, count: int, held: dict[str, bytes] = held) -> bytes:
                    return held[kind][8 * start : 8 * (start + count)]

                for row in range(self._rows[number + 1] - self._rows[number]):
                    self._pieces(number, row, read)
            except ValueError as error:
                return str(error)
            first = np.frombuffer(held["rows"], "<u8").astype(np.int64)[::2]
            table = np.frombuffer(held["pieces"], "<u8").astype(np.int64).reshape(-1, 2)
            full = np.add.reduceat(table[:, 1], first[:-1]) if len(first) > 1 else np.zeros(1, np.int64)
            in_order = table[np.argsort(table[:, 0])]
            ends = in_order.sum(axis=1)
            gaps = np.append(in_order[:, 0], shard.tokens) - np.append(0, ends)  # the end of each document is one
            whole = len(gaps) and not gaps[0] and set(gaps.tolist()) <= {0, 1} and gaps.sum() == shard.documents
            if full.max() > self.context or not whole:
                return f"the plan {name!r} does not cover its shard; plan the rows again"
        return None


def _row_counts(manifest: Manifest, folder: pathlib.Path, context: int, split: str) -> list[int]:
    """Rows of each shard of a split, as plan.json has them. ValueError where there is no plan of this corpus."""
    path = folder / PLAN
    remedy = f"`python -m launch.prepare --pack={manifest.directory} --context={context}` makes it"
    try:
        sealed = whole.load_json(path)
        body = whole.opened(sealed)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{str(manifest.directory)!r} has no best-fit plan for rows of {context}; {remedy}") from error
    except OSError as error:
        raise files.cannot_read(path, error, remedy) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); {remedy}") from error
    rows = body.pop("rows", None)
    if body != {"format": _FORMAT, "context": context, "corpus": manifest.fingerprint}:
        raise ValueError(f"{str(path)!r} is of another corpus or version; {remedy} anew")
    counts = rows.get(split) if isinstance(rows, dict) else None
    if (
        not isinstance(counts, list)
        or len(counts) != len(manifest.split(split).shards)
        or not all(type(count) is int and 0 <= count < 2**50 for count in counts)
        or whole.DIGEST not in sealed
    ):
        raise ValueError(f"{str(path)!r} is damaged (its rows of {split!r}); {remedy}")
    return counts


def _read(path: str, start: int = 0, count: int | None = None) -> bytes:
    """So many numbers of 8 bytes from number `start` on, or all; fewer where the file ends."""
    try:
        with open(path, "rb", buffering=0) as stream:
            if count is None:
                return stream.read()
            size = os.fstat(stream.fileno()).st_size
            return os.pread(stream.fileno(), 8 * count, 8 * start) if 8 * start < size else b""
    except OSError as error:
        raise files.cannot_read(path, error, "plan the rows again") from error
