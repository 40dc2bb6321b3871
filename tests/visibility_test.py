"""Which pairs each query may see: tables written by hand, and what holds for every row of documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaics_jax import visibility

# Three documents of lengths 1, 2 and 5; the third has the id of the first.
DOCUMENT_BT = jnp.array([[7, 4, 4, 7, 7, 7, 7, 7]])
START_BT = jnp.array([[0, 1, 1, 3, 3, 3, 3, 3]])


def _table(interval):
    """[B, T, S] of 0 and 1: whether query t sees pair s."""
    stored_11S = np.arange(interval.start_BT.shape[1])[None, None]
    start_BT1, stop_BT1 = (np.asarray(end_BT)[..., None] for end_BT in interval)
    return ((start_BT1 <= stored_11S) & (stored_11S < stop_BT1)).astype(int)


def _read(rows):
    return np.array([[int(digit) for digit in row.split()] for row in rows])


def _random_documents(length, seed):
    """Four rows; about one position in ten starts a document."""
    starts_BT = np.random.default_rng(seed).random((4, length)) < 0.1
    return np.cumsum(starts_BT, axis=1, dtype=np.int32)


def test_document_start():
    np.testing.assert_array_equal(visibility.document_start(DOCUMENT_BT), START_BT)


@pytest.mark.parametrize(
    ("document", "start"),
    [
        ([5], [0]),
        ([5, 5, 5], [0, 0, 0]),
        ([0, 1, 2], [0, 1, 2]),
        ([3, 3, -1, -1, 3], [0, 0, 2, 2, 4]),
    ],
)
def test_a_document_starts_where_the_id_changes(document, start):
    """Whatever the ids are: they may be negative and may return."""
    np.testing.assert_array_equal(visibility.document_start(jnp.array([document])), [start])


def test_rows_of_a_batch_do_not_mix():
    document_BT = jnp.concatenate([DOCUMENT_BT, jnp.zeros_like(DOCUMENT_BT), DOCUMENT_BT])
    expected_BT = jnp.concatenate([START_BT, jnp.zeros_like(START_BT), START_BT])
    np.testing.assert_array_equal(visibility.document_start(document_BT), expected_BT)


def test_short_term():
    """A window of 3: the present pair is inside the window but is not seen."""
    expected_TS = _read(
        [
            "0 0 0 0 0 0 0 0",
            "0 0 0 0 0 0 0 0",
            "0 1 0 0 0 0 0 0",
            "0 0 0 0 0 0 0 0",
            "0 0 0 1 0 0 0 0",
            "0 0 0 1 1 0 0 0",
            "0 0 0 0 1 1 0 0",
            "0 0 0 0 0 1 1 0",
        ]
    )
    interval = visibility.short_term(START_BT, window=3)
    np.testing.assert_array_equal(_table(interval)[0], expected_TS)
    np.testing.assert_array_equal(interval.count_BT, [[0, 0, 1, 0, 1, 2, 2, 2]])


def test_long_term():
    """A delay of 2: pairs t-2 and before."""
    expected_TS = _read(
        [
            "0 0 0 0 0 0 0 0",
            "0 0 0 0 0 0 0 0",
            "0 0 0 0 0 0 0 0",
            "0 0 0 0 0 0 0 0",
            "0 0 0 0 0 0 0 0",
            "0 0 0 1 0 0 0 0",
            "0 0 0 1 1 0 0 0",
            "0 0 0 1 1 1 0 0",
        ]
    )
    interval = visibility.long_term(START_BT, delay=2)
    np.testing.assert_array_equal(_table(interval)[0], expected_TS)
    np.testing.assert_array_equal(interval.count_BT, [[0, 0, 0, 0, 0, 1, 2, 3]])


def test_causal():
    """The present pair is seen."""
    expected_TS = _read(
        [
            "1 0 0 0 0 0 0 0",
            "0 1 0 0 0 0 0 0",
            "0 1 1 0 0 0 0 0",
            "0 0 0 1 0 0 0 0",
            "0 0 0 1 1 0 0 0",
            "0 0 0 1 1 1 0 0",
            "0 0 0 1 1 1 1 0",
            "0 0 0 1 1 1 1 1",
        ]
    )
    interval = visibility.causal(START_BT)
    np.testing.assert_array_equal(_table(interval)[0], expected_TS)
    np.testing.assert_array_equal(interval.count_BT, [[1, 1, 2, 1, 2, 3, 4, 5]])


def test_causal_window():
    """The last 2 pairs, the present one among them."""
    expected_TS = _read(
        [
            "1 0 0 0 0 0 0 0",
            "0 1 0 0 0 0 0 0",
            "0 1 1 0 0 0 0 0",
            "0 0 0 1 0 0 0 0",
            "0 0 0 1 1 0 0 0",
            "0 0 0 0 1 1 0 0",
            "0 0 0 0 0 1 1 0",
            "0 0 0 0 0 0 1 1",
        ]
    )
    interval = visibility.causal(START_BT, window=2)
    np.testing.assert_array_equal(_table(interval)[0], expected_TS)
    np.testing.assert_array_equal(interval.count_BT, [[1, 1, 2, 1, 2, 2, 2, 2]])


def test_the_smallest_windows():
    """A short-term window of 1 holds the present pair alone, so nothing; a delay of 1 hides the present pair alone."""
    assert not visibility.short_term(START_BT, window=1).count_BT.any()
    longer_BT = visibility.long_term(START_BT, delay=1).count_BT
    np.testing.assert_array_equal(longer_BT, visibility.causal(START_BT).count_BT - 1)
    np.testing.assert_array_equal(_table(visibility.causal(START_BT, window=1))[0], np.eye(8))


def test_an_interval_that_ends_before_it_starts_counts_nothing():
    interval = visibility.Interval(jnp.array([[5, 2, 0]]), jnp.array([[3, 2, 2]]))
    np.testing.assert_array_equal(interval.count_BT, [[0, 0, 2]])


def test_the_delay_is_data():
    """One program serves all delays."""
    long_term = jax.jit(visibility.long_term)
    for delay in (1, 2, 4):
        jax.tree.map(
            np.testing.assert_array_equal,
            long_term(START_BT, jnp.int32(delay)),
            visibility.long_term(START_BT, delay),
        )
    assert long_term._cache_size() == 1


@pytest.mark.parametrize("seed", range(3))
def test_no_interval_ever_moves_back(seed):
    start_BT = visibility.document_start(jnp.asarray(_random_documents(60, seed)))
    for interval in (
        visibility.short_term(start_BT, window=7),
        visibility.long_term(start_BT, delay=5),
        visibility.causal(start_BT),
        visibility.causal(start_BT, window=7),
    ):
        for end_BT in interval:
            assert end_BT.dtype == jnp.int32
            assert end_BT.shape == start_BT.shape
            assert (np.diff(end_BT, axis=1) >= 0).all()
            assert np.min(end_BT) >= 0
            assert np.max(end_BT) <= 60


@pytest.mark.parametrize(("window", "delay"), [(7, 1), (7, 3), (7, 6), (7, 7), (2, 2), (100, 64)])
def test_short_and_long_term_together_see_all_of_the_past(window, delay):
    """With m <= h: each earlier pair of the document is seen, and those in [t-h+1, t-m] twice."""
    document_BT = _random_documents(60, seed=9)
    start_BT = visibility.document_start(jnp.asarray(document_BT))
    position_T = np.arange(60)
    t_1T1, s_11S = position_T[None, :, None], position_T[None, None, :]
    past_BTS = (document_BT[:, :, None] == document_BT[:, None, :]) & (s_11S < t_1T1)
    twice_BTS = past_BTS & (t_1T1 - window + 1 <= s_11S) & (s_11S <= t_1T1 - delay)
    seen_BTS = _table(visibility.short_term(start_BT, window)) + _table(visibility.long_term(start_BT, delay))
    np.testing.assert_array_equal(seen_BTS, past_BTS.astype(int) + twice_BTS)
