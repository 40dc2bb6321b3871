"""Rows to batches: in an order that is arithmetic, read ahead of the training step.

Row k of the run is a pure function of (manifest, split, context, seed, k): epoch k // N is put in its own order by
Grain's shuffle, a permutation that is computed and not stored. Global batch s holds rows [s * batch, (s + 1) * batch).
Nothing else has a state, so resuming at a step, on any number of processes and workers, needs the step only.
"""

import atexit
import functools
import hashlib
from collections.abc import Callable, Iterator

import grain
import numpy as np
from absl import flags

from mosaics_jax.data.source import Batch, Manifest, Rows, pack

# Grain's permutation works on 32-bit indices and would silently repeat rows beyond them.
_MOST_ROWS = 2**32


class _LocalWindows:
    """Random access to one process's share of every global batch: windows of tokens [len(share), T + 1]."""

    def __init__(self, order: grain.MapDataset, batch: int, share: range, start: int):
        """`share`: which rows of a batch are this process's; `start`: the global batch to begin at."""
        self._order, self._batch, self._share, self._start = order, batch, share, start
        self._length = max(0, len(order) // batch - start)

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"_LocalWindows({self._length} of {len(self._share)} rows)"

    def __getitem__(self, index: int) -> np.ndarray:
        first = (self._start + int(index)) * self._batch
        return np.stack([self._order[first + row] for row in self._share])


def batches(
    manifest: Manifest,
    split: str,
    *,
    context: int,
    batch: int,
    seed: int,
    start_batch: int = 0,
    workers: int = 0,
    prefetch: int = 2,
    shuffle: bool = True,
    repeat: bool = True,
    share: range | None = None,
) -> Iterator[Batch]:
    """This process's share of the global batches start_batch, start_batch + 1, ...

    Closing the iterator, or dropping it, stops its threads and processes.

    Args:
      batch: rows of a global batch.
      workers: processes that read batches; 0 does so in a thread of this process. The order is the same.
        They are spawned, so a script that asks for them needs `if __name__ == "__main__":`.
      prefetch: batches made ahead, by each worker.
      shuffle: every epoch in an order of its own; otherwise in the order of the text.
      repeat: epoch after epoch, for ever; otherwise one pass, without the rows that do not fill a last batch.
      share: which rows of every global batch to read; None is all of them.

    Raises:
      ValueError: at once for an argument out of range, a damaged corpus, or one pass of less than a batch; while
        reading, from any worker, for a damaged shard.
    """
    least = {"batch": 1, "start_batch": 0, "workers": 0, "prefetch": 1}
    given = (batch, start_batch, workers, prefetch)
    for (name, limit), value in zip(least.items(), given, strict=True):
        if value < limit:
            raise ValueError(f"{name} is {value}; legal: an integer of {limit} or more")
    share = range(batch) if share is None else share
    if not (share and 0 <= share[0] <= share[-1] < batch):
        raise ValueError(f"share is {share}; legal: one or more rows of a batch, 0 to {batch - 1}")
    rows = Rows(manifest, split, context)
    if len(rows) > _MOST_ROWS:
        raise ValueError(f"split {split!r} has {len(rows)} rows; legal: at most {_MOST_ROWS}; take a longer context")
    if not repeat and len(rows) < batch:
        raise ValueError(
            f"split {split!r} has {len(rows)} rows of context {context}, fewer than one batch of {batch}; "
            "take a smaller batch or context, or prepare more text"
        )
    order = grain.MapDataset.source(rows)
    if shuffle:
        order = order.shuffle(seed=_order_seed(seed))
    if repeat:
        order = order.repeat()
    windows = grain.MapDataset.source(_LocalWindows(order, batch, share, start_batch))
    return _drain(_read_ahead(windows, functools.partial(pack, begin=manifest.begin), workers, prefetch))


def _read_ahead(
    windows: grain.MapDataset, make_fields: Callable[[np.ndarray], Batch], workers: int, prefetch: int
) -> grain.IterDataset:
    if not workers:
        # An element is a whole batch, so one thread is enough to keep the buffer full.
        threads = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        return windows.map(make_fields).to_iter_dataset(threads)
    if not flags.FLAGS.is_parsed():
        # Grain asks its own flags before it spawns, which fails in a notebook or a test, where nobody parses any.
        flags.FLAGS.mark_as_parsed()
    # A worker is ahead of the reader as it is, without threads of its own.
    alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
    # Windows are a fifth of the fields' bytes, and going between the processes costs more than making fields.
    return windows.to_iter_dataset(alone).mp_prefetch(options).map(make_fields)


def _drain(dataset: grain.IterDataset) -> Iterator[Batch]:
    iterator = iter(dataset)
    # An iterator still open when the interpreter ends is closed while Grain's modules are whole.
    atexit.register(iterator.close)
    try:
        yield from iterator
    finally:
        atexit.unregister(iterator.close)
        iterator.close()


def _order_seed(seed: int) -> int:
    """32 bits of `seed`, hashed: Grain orders epoch e by seed + e, so neighbouring seeds would share epochs."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
