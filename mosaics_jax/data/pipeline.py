"""Rows to batches, read ahead of the training step.

Global batch s holds rows [s * batch, (s + 1) * batch) of the run, and a row is a pure function of its number. Nothing
here has a state, so resuming at a step, on any number of processes and workers, needs the step only.
"""

import atexit
import functools
from collections.abc import Callable, Iterator
from typing import Protocol

import grain
import numpy as np
from absl import flags

from mosaics_jax.data import pool
from mosaics_jax.data.source import Batch, fields

_FOR_EVER = 1 << 60


class _Numbered(Protocol):
    def __getitem__(self, row: int) -> np.ndarray: ...


class _LocalRows:
    """Random access to one process's share of every global batch: rows [len(share), 2, T]."""

    def __init__(self, rows: _Numbered, count: int, batch: int, share: range, start: int):
        """`share`: which rows of a batch are this process's; `start`: the global batch to begin at."""
        self._rows, self._batch, self._share, self._start = rows, batch, share, start
        self._length = max(0, count // batch - start)

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"_LocalRows({self._length} of {len(self._share)} rows)"

    def __getitem__(self, index: int) -> np.ndarray:
        first = (self._start + int(index)) * self._batch
        return np.stack([self._rows[first + row] for row in self._share])


def batches(
    rows: _Numbered,
    begin: int,
    *,
    batch: int,
    count: int = _FOR_EVER,
    start_batch: int = 0,
    workers: int = 0,
    prefetch: int = 2,
    share: range | None = None,
) -> Iterator[Batch]:
    """This process's share of the global batches start_batch, start_batch + 1, ...

    Closing the iterator, or dropping it, stops its threads and processes.

    Args:
      rows: `rows[k]` is row k, [2, T]: a `Mixture`, or the rows of one split in order.
      begin: the id that opens a document.
      batch: rows of a global batch.
      count: rows there are; those that do not fill a last batch are left out.
      workers: processes that read batches; 0 does so in a thread of this process. The order is the same.
        They are spawned, so a script that asks for them needs `if __name__ == "__main__":`.
      prefetch: batches made ahead, by each worker.
      share: which rows of every global batch to read; None is all of them.

    Raises:
      ValueError: at once for an argument out of range; while reading, from any worker, for a damaged shard.
    """
    least = {"batch": 1, "start_batch": 0, "workers": 0, "prefetch": 1}
    given = (batch, start_batch, workers, prefetch)
    for (name, limit), value in zip(least.items(), given, strict=True):
        if value < limit:
            raise ValueError(f"{name} is {value}; legal: an integer of {limit} or more")
    share = range(batch) if share is None else share
    if not (share and 0 <= share[0] <= share[-1] < batch):
        raise ValueError(f"share is {share}; legal: one or more rows of a batch, 0 to {batch - 1}")
    local = grain.MapDataset.source(_LocalRows(rows, count, batch, share, start_batch))
    return _drain(_read_ahead(local, functools.partial(fields, begin=begin), workers, prefetch))


def _read_ahead(
    rows: grain.MapDataset, make_fields: Callable[[np.ndarray], Batch], workers: int, prefetch: int
) -> grain.IterDataset:
    if not workers:
        # An element is a whole batch, so one thread is enough to keep the buffer full.
        threads = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        return rows.map(make_fields).to_iter_dataset(threads)
    if not flags.FLAGS.is_parsed():
        # Grain asks its own flags before it spawns, which fails in a notebook or a test, where nobody parses any.
        flags.FLAGS.mark_as_parsed()
    # A worker is ahead of the reader as it is, without threads of its own.
    alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
    # Rows are two fifths of the fields' bytes, and going between the processes costs more than making fields.
    return rows.to_iter_dataset(alone).mp_prefetch(options, _belong).map(make_fields)


def _belong(worker: int, workers: int) -> None:
    pool.belong()


def _drain(dataset: grain.IterDataset) -> Iterator[Batch]:
    iterator = iter(dataset)
    # An iterator still open when the interpreter ends is closed while Grain's modules are whole.
    atexit.register(iterator.close)
    try:
        with pool.interrupts_wait():  # processes are started here
            first = next(iterator, None)
        if first is not None:
            yield first
            yield from iterator
    finally:
        atexit.unregister(iterator.close)
        iterator.close()
