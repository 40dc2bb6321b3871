import itertools

import numpy as np
import pytest

from mosaics_jax.data.mixture import Mixture, Phase, Source


class Numbered:
    """A source whose row i is `offset` + i."""

    context = 4

    def __init__(self, length, offset=0):
        self._length, self._offset = length, offset

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        assert 0 <= index < self._length
        return self._offset + index


def mixture(lengths, *phases, shuffle=True, key="k"):
    sources = [Source(Numbered(length, 1000 * n), f"{key}{n}") for n, length in enumerate(lengths)]
    return Mixture(sources, [Phase(first, weights) for first, weights in phases], shuffle)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1, 1), (5, 0.001, 2), (0.2, 0, 0.8), (1e-5, 1)])
def test_shares_are_kept_to_a_row_and_places_count_up(weights):
    made = mixture([10] * len(weights), (0, weights))
    counts = np.zeros(len(weights), int)
    for row in range(500):
        np.testing.assert_array_equal(made.given(row), counts)
        source, place = made.place(row)
        assert place == counts[source]
        counts[source] += 1
        assert np.abs(counts - (row + 1) * np.array(weights) / sum(weights)).max() < len(weights)
    np.testing.assert_allclose(np.array(made.given(10**12)) / 10**12, np.array(weights) / sum(weights), atol=1e-6)


def test_weights_that_change_go_on_in_every_source():
    made = mixture([10, 10, 10], (0, (1, 1, 0)), (30, (0, 1, 3)), (31, (1, 0, 0)))
    places = [made.place(row) for row in range(60)]
    for source in range(3):
        assert [place for s, place in places if s == source] == list(range(sum(s == source for s, _ in places)))
    assert [sum(s == n for s, _ in places[:30]) for n in range(3)] == [15, 15, 0]
    assert {s for s, _ in places[31:]} == {0}


def test_every_epoch_of_every_source_is_a_permutation_of_its_own():
    made = mixture([11, 7], (0, (0.7, 0.3)))
    rows = [made[row] for row in range(300)]
    for length, offset in ((11, 0), (7, 1000)):
        mine = [row - offset for row in rows if offset <= row < offset + 1000]
        epochs = list(itertools.batched(mine, length))[:-1]
        assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
        assert len(set(epochs)) == len(epochs) > 10


def test_keys_and_order():
    orders = {key: [mixture([50], (0, (1,)), key=key)[row] for row in range(100)] for key in ("a", "b")}
    assert orders["a"] != orders["b"]
    assert [mixture([5], (0, (1,)), shuffle=False)[row] for row in range(12)] == [*range(5), *range(5), 0, 1]


def test_the_rows_are_pinned():
    # A change here means that runs no longer resume in the order they began with.
    made = mixture([5, 3], (0, (0.7, 0.3)), (8, (0.5, 0.5)))
    assert [made[row] for row in range(16)] == PINNED


PINNED = [1000, 2, 4, 1002, 1, 0, 1001, 3, 1001, 4, 1000, 2, 1002, 1, 1002, 3]
