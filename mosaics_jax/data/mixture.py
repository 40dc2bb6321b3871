"""Which corpus gives row k of a run, and which of its rows: arithmetic, without a state.

Row k is the next row of one source. After r rows since the weights were last set, source i of weights w has given

    n_i(r) = floor(r_i w_i / (w_i + w_(i+1) + ...)),   r_0 = r,   r_(i+1) = r_i - n_i(r)

rows: always within one row for each source before it of its share, growing by one at exactly one source a row, so that
r is turned into a source and a place in O(1). A source's rows come in epochs, each a permutation of its own.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mosaics_jax.data.permutation import permutation_key, permute
from mosaics_jax.data.source import Rows

# Weights are counted in millionths, about, so that shares are exact in integers.
_UNITS = 1 << 20


class Source(NamedTuple):
    """One corpus of a mixture. `key` names the orders of its epochs."""

    rows: Rows
    key: str


class Phase(NamedTuple):
    """Weights of all sources, from row `first` of the run on; a source may have none."""

    first: int
    weights: Sequence[float]


class Mixture:
    """Rows of a run by their number."""

    def __init__(self, sources: Sequence[Source], phases: Sequence[Phase], shuffle: bool = True):
        """Phases in order, the first from row 0."""
        assert phases[0].first == 0
        self._sources, self._shuffle = sources, shuffle
        self._phases = [(phase.first, _integers(phase.weights)) for phase in phases]
        self._before = [[0] * len(sources)]
        for (first, weights), (stop, _) in itertools.pairwise(self._phases):
            self._before.append(_sums(self._before[-1], _given(stop - first, weights)))

    def place(self, row: int) -> tuple[int, int]:
        """Number of the source that gives `row`, and which of that source's rows it is, counted over all epochs."""
        after, before = self.given(row + 1), self.given(row)
        source = next(number for number, count in enumerate(before) if after[number] != count)
        return source, before[source]

    def given(self, count: int) -> list[int]:
        """Rows that each source has given among the first `count` of the run."""
        number = max(n for n, (first, _) in enumerate(self._phases) if first <= count)
        first, weights = self._phases[number]
        return _sums(self._before[number], _given(count - first, weights))

    def lies(self, row: int) -> tuple[int, int]:
        """Number of the source that gives `row`, and the number of the row among the source's own."""
        number, place = self.place(row)
        source = self._sources[number]
        epoch, index = divmod(place, len(source.rows))
        if self._shuffle:
            key = permutation_key("rows", source.key, source.rows.context, epoch)
            index = int(permute(np.array([index]), len(source.rows), key)[0])
        return number, index

    def __getitem__(self, row: int) -> np.ndarray:
        number, index = self.lies(row)
        return self._sources[number].rows[index]


def _integers(weights: Sequence[float]) -> list[int]:
    total = float(sum(weights))
    whole = [round(weight / total * _UNITS) for weight in weights]
    whole[int(np.argmax(whole))] += _UNITS - sum(whole)
    return whole


def _given(count: int, weights: Sequence[int]) -> list[int]:
    given = []
    left, rest = count, _UNITS
    for weight in weights:
        given.append(left * weight // rest if weight else 0)
        left, rest = left - given[-1], rest - weight
    return given


def _sums(a: Sequence[int], b: Sequence[int]) -> list[int]:
    return [x + y for x, y in zip(a, b, strict=True)]
