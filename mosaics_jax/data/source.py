"""What a row is: checked random access to the tokens of a split, rows of them, and the fields made of a row.

A row is int32 [2, T]: inputs and targets. An input that opens a piece, a stretch of one document that nothing before
it is seen from, stands there as its complement ~id, which is negative; so one array says all, and batches of it are
cheap to send between processes.
"""

import bisect
import itertools
import os
import zlib
from typing import Any, NamedTuple, Protocol

import numpy as np

from mosaics_jax.data import files
from mosaics_jax.data.corpus import AGAIN, BLOCK, Manifest


class Batch(NamedTuple):
    """The fields of rows, each [B, T] (or [T] for one row): NumPy arrays here, jax arrays once they are on the mesh.

    Attributes:
      tokens: int32, what the model reads.
      targets: int32, the token after each one.
      document: int32, equal within a piece of a document and never decreasing along T; padding is a piece by itself.
      position: int32, index within the piece, from 0.
      weight: float32, 1 where the target counts in the loss, 0 where a document has ended, and in padding.
    """

    tokens: Any
    targets: Any
    document: Any
    position: Any
    weight: Any


class Tokens:
    """Random access to the tokens of a split, laid end to end: `read(start, count)`, with every block checked.

    Memory does not grow with the corpus. Instances can be pickled; each process opens its own files, when it first
    reads them.
    """

    def __init__(self, manifest: Manifest, split: str):
        """ValueError if a shard or its checksums are missing or not of the size they were written with."""
        described = manifest.split(split)
        self.begin, self.vocabulary = manifest.begin, manifest.vocabulary
        self.documents = described.documents
        self._type = manifest.stored
        self._starts = [0, *itertools.accumulate(shard.tokens for shard in described.shards)]
        self._paths = [os.path.join(manifest.directory, shard.file) for shard in described.shards]
        self._sums = [os.path.join(manifest.directory, shard.checksums_file) for shard in described.shards]
        for shard, path, sums in zip(described.shards, self._paths, self._sums, strict=True):
            size = shard.tokens * self._type.itemsize
            check_size(path, size)
            check_size(sums, -(-size // BLOCK) * 4)
        self._handles = files.Kept()

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [count] int32 from `start`. ValueError names shard and bytes that are damaged, or an impossible id."""
        assert 0 <= start <= start + count <= len(self), (start, count, len(self))
        found = np.empty(count, np.int32)
        filled = 0
        while filled < count:
            shard = bisect.bisect_right(self._starts, start + filled) - 1
            offset = start + filled - self._starts[shard]
            part = self._read(shard, offset, min(count - filled, self._starts[shard + 1] - start - filled))
            if (greatest := int(part.max())) >= self.vocabulary:
                place = (offset + int(part.argmax())) * self._type.itemsize
                raise ValueError(
                    f"shard {self._paths[shard]!r}, byte {place}: token id {greatest}, but the vocabulary has "
                    f"{self.vocabulary}; {AGAIN}"
                )
            found[filled : filled + part.size] = part
            filled += part.size
        return found

    def _read(self, shard: int, offset: int, count: int) -> np.ndarray:
        """Reads the whole blocks that hold the tokens, and checks them."""
        size = self._type.itemsize
        first, stop = offset * size, (offset + count) * size
        blocks = range(first // BLOCK, -(-stop // BLOCK))
        begin = blocks.start * BLOCK
        end = min(blocks.stop * BLOCK, (self._starts[shard + 1] - self._starts[shard]) * size)
        content, sums = self._pread(shard, (end - begin, begin), (4 * len(blocks), 4 * blocks.start))
        view = memoryview(content)
        for number, block in enumerate(blocks):
            piece = view[number * BLOCK : (number + 1) * BLOCK]
            if zlib.crc32(piece) != int.from_bytes(sums[4 * number : 4 * number + 4], "little"):
                raise ValueError(
                    f"shard {self._paths[shard]!r}, bytes {block * BLOCK} to {block * BLOCK + len(piece) - 1}: they do "
                    f"not match their checksum in {self._sums[shard]!r}; {AGAIN}"
                )
        return np.frombuffer(content, self._type)[(first - begin) // size : (stop - begin) // size]

    def _pread(self, shard: int, *ranges: tuple[int, int]) -> list[bytes]:
        """(size, offset) of the shard and of its checksums."""
        paths = self._paths[shard], self._sums[shard]
        handles = self._handles.get(shard)
        kept = handles is not None
        if handles is None:
            handles = files.open_all(paths, AGAIN)
            kept = self._handles.keep(shard, handles)
        found = []
        try:
            for handle, path, (size, offset) in zip(handles, paths, ranges, strict=True):
                content = os.pread(handle, size, offset)
                if len(content) != size:
                    raise ValueError(
                        f"shard {path!r} ends at byte {offset + len(content)}, {offset + size} expected; {AGAIN}"
                    )
                found.append(content)
        except OSError as error:
            raise files.cannot_read(paths[0], error, AGAIN) from error
        finally:
            if not kept:
                files.close_all(handles)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_handles"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._handles = files.Kept()


def check_size(path: str, expected: int) -> None:
    if not os.path.isfile(path):
        raise ValueError(f"shard {path!r} is missing, {expected} bytes expected; {AGAIN}")
    if (found := os.path.getsize(path)) != expected:
        raise ValueError(f"shard {path!r} has {found} bytes, {expected} expected; {AGAIN}")


class Rows(Protocol):
    """The rows of a split, however they are packed: `rows[i]` is int32 [2, T]."""

    context: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


class ConcatRows:
    """Documents laid end to end and cut into rows: `rows[i]` predicts tokens i * context + 1 to (i + 1) * context.

    Every token but the split's first is once a target. What does not fill a last row is left out.
    """

    def __init__(self, manifest: Manifest, split: str, context: int):
        """ValueError if the split has no whole row, or is damaged."""
        check_context(context)
        self.context = context
        self._tokens = Tokens(manifest, split)
        self._length = (len(self._tokens) - 1) // context
        if self._length < 1:
            raise ValueError(
                f"split {split!r} of {str(manifest.directory)!r} has {len(self._tokens)} tokens, fewer than one row of "
                f"context + 1 = {context + 1}; prepare more text or take a shorter context"
            )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self._length:
            raise IndexError(f"row {index}; legal: 0 to {self._length - 1}")
        return row_of_window(self._tokens.read(int(index) * self.context, self.context + 1), self._tokens.begin)


def check_context(context: int) -> None:
    if not 1 <= context < 2**31:
        raise ValueError(f"context is {context}; legal: an integer of 1 or more, below 2**31")


def row_of_window(window: np.ndarray, begin: int) -> np.ndarray:
    """Rows [..., 2, T] of windows [..., T + 1] of documents laid end to end; `begin` is the id that opens one."""
    window = np.asarray(window, np.int32)
    tokens = window[..., :-1]
    return np.stack([np.where(tokens == begin, ~tokens, tokens), window[..., 1:]], axis=-2)


def fields(row: np.ndarray, begin: int) -> Batch:
    """The fields of rows [2, T] or [B, 2, T].

    A piece that a row's end cuts off goes on in another row as a piece of its own, with positions from 0.
    """
    row = np.asarray(row)  # also takes rows off the shared memory of a worker
    marked, targets = row[..., 0, :], row[..., 1, :].astype(np.int32)
    opens = marked < 0
    index = np.broadcast_to(np.arange(marked.shape[-1], dtype=np.int32), marked.shape)
    start = np.maximum.accumulate(np.where(opens, index, np.int32(0)), axis=-1)
    return Batch(
        tokens=np.where(opens, ~marked, marked),
        targets=targets,
        document=np.cumsum(opens, axis=-1, dtype=np.int32),
        position=index - start,
        weight=(targets != begin).astype(np.float32),
    )


def pack(window: np.ndarray, begin: int) -> Batch:
    """The fields of a window [T + 1] or [B, T + 1] of documents laid end to end."""
    return fields(row_of_window(window, begin), begin)
