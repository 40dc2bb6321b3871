import dataclasses
import errno
import gc
import json
import os
import pickle

import made
import numpy as np
import pytest

from mosaics_jax import whole as whole_lib
from mosaics_jax.data import files
from mosaics_jax.data.corpus import BLOCK, Manifest
from mosaics_jax.data.source import ConcatRows, Tokens, fields, pack


def whole(manifest, split="train"):
    """The ids of a split as they lie on disk."""
    paths = [manifest.directory / shard.file for shard in manifest.splits[split].shards]
    return np.concatenate([np.fromfile(path, manifest.stored) for path in paths]).astype(np.int64)


@pytest.mark.parametrize(("dtype", "base"), [("uint16", 0), ("uint32", 70_000)])
def test_reads_cross_shards_and_blocks(tmp_path, dtype, base):
    shards = [
        [[base + i for i in range(n, n + 5000)] for n in range(3)],
        [[base + 7]],
        [[base + i for i in range(9000)]],
    ]
    manifest = made.write_corpus(tmp_path, shards, dtype=dtype, vocabulary=base + 10_000)
    expected, tokens = whole(manifest), Tokens(manifest, "train")
    assert len(tokens) == len(expected) > 3 * BLOCK // 4
    draw = np.random.default_rng(0)
    places = [(0, len(expected)), (0, 1), (len(expected) - 1, 1), (15_006, 3), (5, 0)]
    for start, count in [*places, *((int(a), 300) for a in draw.integers(0, len(expected) - 300, 50))]:
        found = tokens.read(start, count)
        np.testing.assert_array_equal(found, expected[start : start + count])
        assert found.dtype == np.int32


def test_rows_are_windows_of_the_concatenation(tmp_path):
    manifest = made.write_corpus(tmp_path, [made.random_documents(5), made.random_documents(7, seed=1)])
    ids, rows = whole(manifest), ConcatRows(manifest, "train", 16)
    assert len(rows) == (len(ids) - 1) // 16
    for i in (2, 0, len(rows) - 1):
        found, expected = fields(rows[i], made.BEGIN), pack(ids[16 * i : 16 * i + 17], made.BEGIN)
        for name, value, wanted in zip(found._fields, found, expected, strict=True):
            np.testing.assert_array_equal(value, wanted, err_msg=name)
    for bad in (-1, len(rows)):
        with pytest.raises(IndexError, match=f"row {bad}; legal: 0 to {len(rows) - 1}"):
            rows[bad]


def test_rows_can_be_pickled_after_use(tmp_path):
    rows = ConcatRows(made.write_corpus(tmp_path, [made.random_documents(3)]), "train", 4)
    rows[0]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(rows))[1], rows[1])


def test_more_shards_than_handles(tmp_path, monkeypatch):
    gc.collect()  # what other tests have open counts too
    limit = 2 * (files.Kept._count + 4)
    monkeypatch.setattr(files, "open_files_limit", lambda: limit)
    manifest = made.write_corpus(tmp_path, [[[i]] for i in range(10)])
    tokens, expected = Tokens(manifest, "train"), whole(manifest)
    before = len(os.listdir("/dev/fd"))
    for _ in range(2):
        np.testing.assert_array_equal([tokens.read(i, 1)[0] for i in range(30)], expected)
    assert len(os.listdir("/dev/fd")) == before + 4
    # The limit is the process's: another corpus keeps none.
    others = Tokens(made.write_corpus(tmp_path / "other", [[[i]] for i in range(10)]), "train")
    np.testing.assert_array_equal([others.read(i, 1)[0] for i in range(30)], expected)
    assert len(os.listdir("/dev/fd")) == before + 4
    del tokens
    gc.collect()
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOENT, ValueError, "restore it from a copy, or prepare the corpus again"),
        (errno.EMFILE, OSError, r"Too many open files: this process may have \d+; raise that .*ulimit -n"),
        (errno.EACCES, OSError, "Permission denied; let this user read"),
        (errno.EIO, OSError, "the disk or the file server failed, the file itself may be whole; try again"),
        (errno.ESTALE, OSError, "the disk or the file server failed, the file itself may be whole; try again"),
    ],
)
def test_an_error_of_the_system_is_not_the_shards(tmp_path, monkeypatch, number, kind, message):
    tokens = Tokens(made.write_corpus(tmp_path, [[[1]]]), "train")

    def refuse(path, *_):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(kind, match=message) as caught:
        tokens.read(0, 1)
    assert isinstance(caught.value, ValueError) == (number == errno.ENOENT)
    assert "train" in str(caught.value)


def test_a_split_shorter_than_a_row(tmp_path):
    manifest = made.write_corpus(tmp_path, [[[1] * 7]], valid=[[[1, 2]]])
    with pytest.raises(ValueError, match=r"'valid' of .* has 4 tokens, fewer than one row of context \+ 1 = 5"):
        ConcatRows(manifest, "valid", 4)
    assert len(ConcatRows(manifest, "valid", 3)) == 1
    with pytest.raises(ValueError, match="split is 'test'; legal: train, valid"):
        ConcatRows(manifest, "test", 4)
    with pytest.raises(ValueError, match="context is 0"):
        ConcatRows(manifest, "train", 0)


def test_short_and_missing_shards_are_named_with_the_byte(tmp_path):
    manifest = made.write_corpus(tmp_path, [[[1]], [[4, 5, 6]]])
    tokens = Tokens(manifest, "train")
    path = tmp_path / "train-00001.tokens"
    path.write_bytes(b"123")
    with pytest.raises(ValueError, match=r"train-00001.tokens' has 3 bytes, 10 expected; restore it from a copy"):
        Tokens(manifest, "train")
    with pytest.raises(ValueError, match=r"train-00001.tokens' ends at byte 3, 10 expected; restore it from a copy"):
        tokens.read(2, 4)
    path.unlink()
    for make in (lambda: Tokens(manifest, "train"), lambda: Tokens(manifest, "train")):
        with pytest.raises(ValueError, match=r"train-00001.tokens' is missing, 10 bytes expected"):
            make()
    with pytest.raises(ValueError, match=r"train-00001.tokens' cannot be read \(No such file"):
        pickle.loads(pickle.dumps(tokens)).read(4, 1)
    (tmp_path / "train-00000.crc32").unlink()
    with pytest.raises(ValueError, match=r"train-00000.crc32' is missing, 4 bytes expected"):
        Tokens(manifest, "train")


def test_a_changed_byte_is_found_when_it_is_read(tmp_path):
    manifest = made.write_corpus(tmp_path, [[list(range(20_000))]])
    path, tokens = tmp_path / "train-00000.tokens", Tokens(manifest, "train")
    content = bytearray(path.read_bytes())
    content[BLOCK + 9] ^= 1
    path.write_bytes(content)
    tokens.read(0, BLOCK // 2)  # the block before is whole
    with pytest.raises(ValueError, match=r"train-00000.tokens', bytes 16384 to 32767: they do not match their"):
        tokens.read(0, BLOCK // 2 + 1)
    tokens.read(BLOCK, 5)


def test_an_impossible_id_is_named(tmp_path):
    tokens = Tokens(made.write_corpus(tmp_path, [[[1, 2, 3]], [[4, 1000, 6, 7]]], vocabulary=1000), "train")
    tokens.read(0, 7)
    with pytest.raises(ValueError, match=r"train-00001.tokens', byte 4: token id 1000, but the vocabulary has 1000"):
        tokens.read(0, 8)


def test_manifest_round_trip_and_fingerprint(tmp_path):
    manifest = made.write_corpus(tmp_path / "a", [[[1, 2, 3]]])
    loaded = Manifest.load(tmp_path / "a")
    assert loaded == manifest
    same = made.write_corpus(tmp_path / "b", [[[1, 2, 3]]])
    assert same.fingerprint == manifest.fingerprint == loaded.fingerprint
    others = [
        made.write_corpus(tmp_path / "c", [[[1, 2, 4]]]),
        made.write_corpus(tmp_path / "d", [[[1, 2, 3]]], dtype="uint32"),
        dataclasses.replace(manifest, tokenizer_fingerprint="e" * 64),
        dataclasses.replace(manifest, begin=1),
    ]
    assert len({m.fingerprint for m in [manifest, *others]}) == 5


def test_load_says_what_is_wrong_and_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"is not a directory; run `python -m launch.prepare --output=DIR`"):
        Manifest.load(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no manifest.json; run `python -m launch.prepare --output=DIR`"):
        Manifest.load(tmp_path)
    made.write_corpus(tmp_path, [[[1, 2, 3]]])
    path = tmp_path / "manifest.json"
    good = whole_lib.read_json(path)
    bad = [good | {"version": 99}, good | {"extra": 1}, good | {"dtype": "float64"}]
    bad.append({name: value for name, value in good.items() if name != "dtype"})
    bad.append(json.loads(json.dumps(good).replace("train-00000", "../train-00000")))
    for content in ["{", "[]", "{}", json.dumps(good), *(json.dumps(whole_lib.sealed(body)) for body in bad)]:
        path.write_text(content)
        with pytest.raises(ValueError, match=r"is not a manifest .*; restore it from a copy, or prepare") as caught:
            Manifest.load(tmp_path)
        assert "\n" not in str(caught.value)


def test_documents_longer_than(tmp_path):
    # 3 documents of 3 or 4 tokens, 2 of 5 to 8, 1 of 9 to 16
    manifest = made.write_corpus(tmp_path, [[[1], [1, 1], [1, 1], [1] * 3, [1] * 6, [1] * 10]])
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
