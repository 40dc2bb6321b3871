import hashlib
import itertools

import numpy as np
import pytest

from mosaics_jax.data.pipeline import batches
from mosaics_jax.data.source import Manifest, Rows, Shard, Split, pack

CONTEXT, BATCH, ROWS = 8, 4, 11
# Rows of the first two epochs at seed 0.
PINNED = [7, 4, 3, 8, 10, 2, 9, 6, 0, 5, 1, 3, 2, 0, 6, 5, 10, 7, 8, 1, 4, 9]


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    """11 rows of 8 + 1 tokens over three shards; token n has id n, save for a begin (500) at every 13th place."""
    ids = np.arange(ROWS * CONTEXT + 4, dtype="<u2")
    ids[::13] = 500
    shards = []
    for number, part in enumerate(np.split(ids, [30, 37])):
        file = f"train-{number:05d}.tokens"
        (tmp_path / file).write_bytes(part.tobytes())
        shards.append(Shard(file, part.size, hashlib.sha256(part.tobytes()).hexdigest()))
    split = Split(1, ids.size, 10, 1.5, {16: 7}, tuple(shards))
    return Manifest(tmp_path, "uint16", 502, 500, 501, "bytes", "f" * 64, {"train": split}, {}, {})


def take(manifest, count, **settings):
    """The first `count` batches."""
    settings = {"context": CONTEXT, "batch": BATCH, "seed": 3} | settings
    iterator = batches(manifest, "train", **settings)
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


def digest(batch) -> str:
    sha = hashlib.sha256()
    for name, field in batch._asdict().items():
        sha.update(f"{name} {field.dtype} {field.shape}".encode() + np.ascontiguousarray(field).tobytes())
    return sha.hexdigest()


def digests(*arguments, **settings):
    return [digest(batch) for batch in take(*arguments, **settings)]


def row_numbers(made):
    """Which row of the split each row of the batches is (by its second token, no begin in these rows' second place)."""
    return [identify(row) for batch in made for row in batch.tokens]


def identify(tokens):
    place = int(np.flatnonzero(tokens != 500)[0])
    return (int(tokens[place]) - place) // CONTEXT


def test_unshuffled_batches_are_the_packed_rows_in_order(manifest):
    rows = Rows(manifest, "train", CONTEXT)
    made = take(manifest, 5, shuffle=False)
    assert row_numbers(made) == [k % ROWS for k in range(20)]
    expected = pack(np.stack([rows[k % ROWS] for k in range(4, 8)]), 500)
    for name, value, wanted in zip(expected._fields, made[1], expected, strict=True):
        np.testing.assert_array_equal(value, wanted, err_msg=name)
        assert type(value) is np.ndarray
        assert value.shape == (BATCH, CONTEXT)


def test_every_epoch_is_a_permutation_of_its_own(manifest):
    order = np.array(row_numbers(take(manifest, 3 * ROWS, batch=1))).reshape(3, ROWS)
    for epoch in order:
        assert sorted(epoch) == list(range(ROWS))
    assert len({tuple(epoch) for epoch in order}) == 3


def test_neighbouring_seeds_do_not_share_epochs(manifest):
    orders = [row_numbers(take(manifest, 2 * ROWS, batch=1, seed=seed)) for seed in range(4)]
    epochs = [tuple(order[start : start + ROWS]) for order in orders for start in (0, ROWS)]
    assert len(set(epochs)) == len(epochs)


def test_the_order_is_pinned(manifest):
    # A change here means that runs no longer resume in the order they began with: a new Grain, or a new seed rule.
    assert row_numbers(take(manifest, 2 * ROWS, batch=1, seed=0)) == PINNED


def test_resuming_at_any_batch_gives_the_same_batches(manifest):
    whole = digests(manifest, 12)
    assert len(set(whole)) == 12
    for start in (0, 1, 2, 3, 7, 11):
        assert digests(manifest, 12 - start, start_batch=start) == whole[start:]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_the_global_batch(manifest, count):
    whole = take(manifest, 6)
    shares = [take(manifest, 6, share=range(4 * i // count, 4 * (i + 1) // count)) for i in range(count)]
    for step, batch in enumerate(whole):
        assert shares[0][step].tokens.shape == (BATCH // count, CONTEXT)
        joined = type(batch)(*(np.concatenate(fields) for fields in zip(*(s[step] for s in shares), strict=True)))
        assert digest(joined) == digest(batch)


def test_workers_change_nothing_and_their_errors_arrive(manifest):
    assert digests(manifest, 7, workers=2, start_batch=2) == digests(manifest, 7, start_batch=2)
    # an odd number of batches over two workers, to the end
    assert digests(manifest, 99, workers=2, batch=3, repeat=False) == digests(manifest, 99, batch=3, repeat=False)
    path = manifest.directory / "train-00001.tokens"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ValueError, match=r"train-00001.tokens', row \d+: token id 65535") as caught:
        take(manifest, 9, workers=2)
    assert "\n" not in str(caught.value)


def test_an_error_while_reading_arrives(manifest):
    path = manifest.directory / "train-00001.tokens"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ValueError, match=r"train-00001.tokens', row \d+: token id 65535"):
        take(manifest, 9)


def test_one_pass_drops_the_last_partial_batch(manifest):
    made = take(manifest, 99, repeat=False, shuffle=False)
    assert row_numbers(made) == list(range(8))
    assert take(manifest, 99, repeat=False, shuffle=False, start_batch=2) == []
    assert take(manifest, 99, repeat=False, shuffle=False, start_batch=5) == []
    assert len(take(manifest, 99, repeat=False, batch=ROWS)) == 1
    assert sorted(row_numbers(take(manifest, 99, repeat=False, batch=ROWS))) == list(range(ROWS))


def test_a_batch_may_be_larger_than_an_epoch(manifest):
    (made,) = take(manifest, 1, batch=2 * ROWS)
    assert sorted(row_numbers([made])) == sorted([*range(ROWS), *range(ROWS)])


def test_resuming_late_costs_nothing(manifest):
    assert len(take(manifest, 2, start_batch=10**12)) == 2


def test_damage_is_found_before_the_first_batch(manifest):
    (manifest.directory / "train-00001.tokens").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train-00001.tokens' has 0 bytes, 14 expected"):
        batches(manifest, "train", context=CONTEXT, batch=BATCH, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 12, "repeat": False}, "11 rows of context 8, fewer than one batch of 12"),
        ({"share": range(2, 5)}, r"share is range\(2, 5\); legal: one or more rows of a batch, 0 to 3"),
        ({"share": range(-1, 2)}, r"share is range\(-1, 2\)"),
        ({"share": range(2, 2)}, r"share is range\(2, 2\)"),
        ({"batch": 0}, "batch is 0"),
        ({"start_batch": -1}, "start_batch is -1"),
        ({"workers": -1}, "workers is -1"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"context": 92}, "92 tokens, fewer than one row of context"),
    ],
)
def test_bad_settings_are_named_at_once(manifest, settings, message):
    with pytest.raises(ValueError, match=message):
        batches(manifest, "train", **{"context": CONTEXT, "batch": BATCH, "seed": 0} | settings)


def test_more_rows_than_the_permutation_can_tell_apart(manifest, monkeypatch):
    monkeypatch.setattr("mosaics_jax.data.pipeline._MOST_ROWS", 10)
    with pytest.raises(ValueError, match="has 11 rows; legal: at most 10; take a longer context"):
        batches(manifest, "train", context=CONTEXT, batch=BATCH, seed=0)
