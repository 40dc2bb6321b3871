import dataclasses
import hashlib
import json
import pickle

import numpy as np
import pytest

from mosaics_jax.data.source import Manifest, Rows, Shard, Split, pack, verify


def make_corpus(directory, shards, dtype="uint16", vocabulary=1000, begin=998, end=999) -> Manifest:
    """A corpus whose train split is `shards`, lists of ids; its valid split is one short shard."""
    directory.mkdir(parents=True, exist_ok=True)
    splits = {}
    for name, contents in (("train", shards), ("valid", [[begin, 1, 2, end]])):
        made = []
        for number, ids in enumerate(contents):
            content = np.asarray(ids, np.dtype(dtype).newbyteorder("<")).tobytes()
            file = f"{name}-{number:05d}.tokens"
            (directory / file).write_bytes(content)
            made.append(Shard(file, len(ids), hashlib.sha256(content).hexdigest()))
        splits[name] = Split(1, sum(map(len, contents)), 10, 1.5, {4: 3, 8: 2, 16: 1}, tuple(made))
    manifest = Manifest(
        directory, dtype, vocabulary, begin, end, "bytes", "f" * 64, splits, {"empty": 0}, {"inputs": ["x"]}
    )
    manifest.save()
    return manifest


@pytest.mark.parametrize(("dtype", "base"), [("uint16", 0), ("uint32", 70_000)])
def test_windows_cross_shards(tmp_path, dtype, base):
    ids = [[0, 1, 2, 3, 4], [5], [6, 7], [8, 9, 10, 11, 12]]
    shards = [[base + i for i in shard] for shard in ids]
    manifest = make_corpus(tmp_path, shards, dtype, vocabulary=base + 15, begin=base + 13, end=base + 14)
    rows = Rows(manifest, "train", 4)
    expected = np.array([[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10, 11, 12]]) + base
    assert len(rows) == 3
    for i in (2, 0, 1, 2):
        np.testing.assert_array_equal(rows[i], expected[i])
        assert rows[i].dtype == np.int32
    assert len(Rows(manifest, "train", 5)) == 2  # 13 tokens: the last partial window is dropped
    for bad in (-1, 3):
        with pytest.raises(IndexError, match=f"row {bad}; legal: 0 to 2"):
            rows[bad]


def test_rows_can_be_pickled_after_use(tmp_path):
    rows = Rows(make_corpus(tmp_path, [list(range(9))]), "train", 4)
    rows[0]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(rows))[1], rows[1])


def test_more_shards_than_handles(tmp_path, monkeypatch):
    monkeypatch.setattr("mosaics_jax.data.source._MOST_HANDLES", 2)
    rows = Rows(make_corpus(tmp_path, [[i, i + 1] for i in range(0, 20, 2)]), "train", 1)
    for _ in range(2):
        np.testing.assert_array_equal([rows[i][0] for i in range(19)], np.arange(19))
    assert len(rows._handles) == 2


def test_a_split_shorter_than_a_row(tmp_path):
    manifest = make_corpus(tmp_path, [list(range(9))])
    with pytest.raises(ValueError, match=r"'valid' has 4 tokens, fewer than one row of context \+ 1 = 5; prepare more"):
        Rows(manifest, "valid", 4)
    assert len(Rows(manifest, "valid", 3)) == 1
    with pytest.raises(ValueError, match="split is 'test'; legal: train, valid"):
        Rows(manifest, "test", 4)
    with pytest.raises(ValueError, match="context is 0"):
        Rows(manifest, "train", 0)


def test_truncated_and_missing_shards_are_named(tmp_path):
    manifest = make_corpus(tmp_path, [[1, 2, 3], [4, 5, 6]])
    rows = Rows(manifest, "train", 2)
    path = tmp_path / "train-00001.tokens"
    path.write_bytes(b"123")
    with pytest.raises(ValueError, match=r"train-00001.tokens' has 3 bytes, 6 expected; prepare the corpus again"):
        Rows(manifest, "train", 2)
    with pytest.raises(ValueError, match=r"train-00001.tokens' was cut short while in use"):
        rows[1]
    path.unlink()
    with pytest.raises(ValueError, match=r"train-00001.tokens' is missing, 6 bytes expected"):
        Rows(manifest, "train", 2)
    with pytest.raises(ValueError, match=r"train-00001.tokens' is missing"):
        verify(manifest)


def test_an_impossible_id_is_named(tmp_path):
    rows = Rows(make_corpus(tmp_path, [[1, 2, 3], [4, 1000, 6, 7]]), "train", 2)
    np.testing.assert_array_equal(rows[0], [1, 2, 3])
    with pytest.raises(ValueError, match=r"train-00001.tokens', row 1: token id 1000, but the vocabulary has 1000"):
        rows[1]


def test_verify_finds_a_changed_byte(tmp_path):
    manifest = make_corpus(tmp_path, [[1, 2, 3], [4, 5, 6]])
    verify(manifest)
    path = tmp_path / "train-00001.tokens"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=r"train-00001.tokens' has sha256 .*prepare the corpus again"):
        verify(manifest)


def test_manifest_round_trip_and_fingerprint(tmp_path):
    manifest = make_corpus(tmp_path / "a", [[1, 2, 3]])
    loaded = Manifest.load(tmp_path / "a")
    assert loaded == manifest
    same = make_corpus(tmp_path / "b", [[1, 2, 3]])
    assert same.fingerprint == manifest.fingerprint == loaded.fingerprint
    others = [
        make_corpus(tmp_path / "c", [[1, 2, 4]]),
        make_corpus(tmp_path / "d", [[1, 2, 3]], "uint32"),
        dataclasses.replace(manifest, tokenizer_fingerprint="e" * 64),
        dataclasses.replace(manifest, begin=1),
    ]
    assert len({m.fingerprint for m in [manifest, *others]}) == 5


def test_load_says_what_is_wrong_and_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"is not a directory; run `python -m launch.prepare --output=DIR`"):
        Manifest.load(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no manifest.json; run `python -m launch.prepare --output=DIR`"):
        Manifest.load(tmp_path)
    make_corpus(tmp_path, [[1, 2, 3]])
    path = tmp_path / "manifest.json"
    good = json.loads(path.read_text())
    bad = ["{", "[]", "{}", json.dumps(good | {"version": 99}), json.dumps(good | {"extra": 1})]
    bad.append(json.dumps({name: value for name, value in good.items() if name != "dtype"}))
    for content in bad:
        path.write_text(content)
        with pytest.raises(ValueError, match=r"is not a manifest .*; prepare the corpus again") as caught:
            Manifest.load(tmp_path)
        assert "\n" not in str(caught.value)


def test_documents_longer_than(tmp_path):
    # 3 documents of 3 or 4 tokens, 2 of 5 to 8, 1 of 9 to 16
    manifest = make_corpus(tmp_path, [[1, 2, 3]])
    counts = {context: manifest.documents_longer_than("train", context) for context in (1, 2, 3, 4, 5, 7, 8, 9, 16)}
    assert counts == {
        1: (6, 6), 2: (6, 6), 3: (3, 6), 4: (3, 3), 5: (1, 3), 7: (1, 3), 8: (1, 1), 9: (0, 1), 16: (0, 0),
    }  # fmt: skip


# Two documents end and three begin; 8 is begin, 9 is end.
PACKED = {
    "window": [5, 6, 9, 8, 7, 9, 8, 4, 4],
    "tokens": [5, 6, 9, 8, 7, 9, 8, 4],
    "targets": [6, 9, 8, 7, 9, 8, 4, 4],
    "document": [0, 0, 0, 1, 1, 1, 2, 2],
    "position": [0, 1, 2, 0, 1, 2, 0, 1],
    "weight": [1, 1, 0, 1, 1, 0, 1, 1],
}
# The row opens a document, an empty document follows, and the next begin is the last target.
PACKED_AT_BEGIN = {
    "window": [8, 7, 7, 9, 8, 9, 8, 9, 8],
    "tokens": [8, 7, 7, 9, 8, 9, 8, 9],
    "targets": [7, 7, 9, 8, 9, 8, 9, 8],
    "document": [1, 1, 1, 1, 2, 2, 3, 3],
    "position": [0, 1, 2, 3, 0, 1, 0, 1],
    "weight": [1, 1, 1, 0, 1, 0, 1, 0],
}


@pytest.mark.parametrize("expected", [PACKED, PACKED_AT_BEGIN])
def test_pack_of_a_row(expected):
    batch = pack(np.array(expected["window"], np.int32), begin=8)
    for name, value in batch._asdict().items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
        assert value.dtype == (np.float32 if name == "weight" else np.int32)


def test_pack_of_a_batch_is_that_of_its_rows():
    windows = np.array([PACKED["window"], PACKED_AT_BEGIN["window"], [1] * 9])
    batch = pack(windows, begin=8)
    for i, window in enumerate(windows):
        for whole, row in zip(batch, pack(window, begin=8), strict=True):
            np.testing.assert_array_equal(whole[i], row)
    np.testing.assert_array_equal(batch.position[2], np.arange(8))
