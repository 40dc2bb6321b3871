import numpy as np
import pytest

from mosaics_jax.data.permutation import permutation_key, permute


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 11, 16, 17, 1000, 4096, 65_537])
def test_every_place_is_taken_once(length):
    places = permute(np.arange(length), length, permutation_key("a", length))
    np.testing.assert_array_equal(np.sort(places), np.arange(length))


def test_keys_give_unrelated_orders():
    orders = [permute(np.arange(1000), 1000, permutation_key(*parts)) for parts in [("a", 0), ("a", 1), ("b", 0)]]
    for first, second in [(0, 1), (0, 2), (1, 2)]:
        assert (orders[first] == orders[second]).mean() < 0.02
        assert abs(np.corrcoef(orders[first], orders[second])[0, 1]) < 0.1
    # neighbours do not stay neighbours
    assert (np.abs(np.diff(orders[0])) == 1).mean() < 0.02


def test_lengths_past_32_bits():
    length = 10**12 + 7
    index = np.random.default_rng(0).integers(0, length, 10_000)
    places = permute(index, length, permutation_key("a"))
    assert 0 <= places.min() < places.max() < length
    assert len(np.unique(places)) == len(np.unique(index))
    assert 0.4 < places.mean() / length < 0.6
    np.testing.assert_array_equal(permute(index[::-1], length, permutation_key("a")), places[::-1])


def test_the_order_is_pinned():
    # A change here means that runs no longer resume in the order they began with.
    assert permute(np.arange(11), 11, permutation_key("rows", 0)).tolist() == PINNED


PINNED = [7, 8, 5, 6, 2, 9, 1, 10, 0, 4, 3]
