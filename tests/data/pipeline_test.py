"""Rule 2: the row at global step k depends on (manifests, weights, seed, context, k) alone."""

import dataclasses
import hashlib
import itertools
import pathlib

import made
import numpy as np
import pytest

from mosaics_jax.config import DataConfig
from mosaics_jax.data.corpora import Corpora
from mosaics_jax.data.corpus import Manifest
from mosaics_jax.data.packing import plan_rows
from mosaics_jax.data.pipeline import batches
from mosaics_jax.data.source import ConcatRows, fields

CONTEXT, BATCH, STEPS = 16, 8, 12
MIXED = {
    "mixture": {"a": 0.7, "b": 0.3},
    "mixture_changes": {"5": {"a": 0.2, "c": 0.5, "b": 0.3}, "9": {"c": 1}},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Three corpora, of several shards each, planned for best-fit rows."""
    folder = tmp_path_factory.mktemp("corpora")
    for number, name in enumerate("abc"):
        first = 1000 + 18_000 * number
        shards = [made.random_documents(60, seed=number, first=first), made.random_documents(90, 9, first=first + 5000)]
        valid = made.random_documents(40, seed=20 + number, first=first + 12_000)
        plan_rows(made.write_corpus(folder / name, shards, [valid]), CONTEXT)
    return folder


def corpora(root, **settings) -> Corpora:
    values = {"path": str(root), "context": CONTEXT, "batch": BATCH, "seed": 3} | settings
    return Corpora(DataConfig(**values))


def take(opened, count=STEPS, start=0, share=None, workers=0):
    iterator = batches(opened.training(), opened.begin, batch=BATCH, start_batch=start, workers=workers, share=share)
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


def digest(batch) -> str:
    sha = hashlib.sha256()
    for name, field in batch._asdict().items():
        sha.update(f"{name} {field.dtype} {field.shape}".encode() + np.ascontiguousarray(field).tobytes())
    return sha.hexdigest()


def joined(shares):
    return [
        type(parts[0])(*(np.concatenate(field) for field in zip(*parts, strict=True)))
        for parts in zip(*shares, strict=True)
    ]


def on_processes(opened, processes, count, start=0, workers=0):
    """The global batches, put together from what `processes` processes read of them."""
    share = BATCH // processes
    ranges = [range(share * p, share * (p + 1)) for p in range(processes)]
    return [digest(batch) for batch in joined([take(opened, count, start, r, workers) for r in ranges])]


SETTINGS = {
    "one": {},
    "mixed": MIXED,
    "best_fit": {"packing": "best_fit"},
    "mixed_best_fit": MIXED | {"packing": "best_fit"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_processes_and_resumes_give_the_same_batches(root, name):
    settings = SETTINGS[name]
    opened = corpora(root if "mixture" in settings else root / "a", **settings)
    whole = [digest(batch) for batch in take(opened)]
    assert len(set(whole)) == STEPS
    for processes in (1, 2, 4, 8):
        assert on_processes(opened, processes, STEPS) == whole
    # resumed on another number of processes, and resumed again on a third
    assert on_processes(opened, 4, 5) + on_processes(opened, 2, 4, start=5) + on_processes(opened, 8, 3, 9) == whole
    # opened anew
    again = corpora(root if "mixture" in settings else root / "a", **settings)
    assert [digest(batch) for batch in take(again, STEPS - 7, start=7)] == whole[7:]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_workers_give_the_same_batches(root, name):
    settings = SETTINGS[name]
    opened = corpora(root if "mixture" in settings else root / "a", **settings)
    whole = [digest(batch) for batch in take(opened)]
    assert on_processes(opened, 1, STEPS, workers=4) == whole
    resumed = on_processes(opened, 2, 3, workers=4) + on_processes(opened, 1, 2, 3) + on_processes(opened, 2, 7, 5, 1)
    assert resumed == whole


def test_the_order_that_weights_are_written_in_changes_nothing(root):
    turned = {"mixture": dict(reversed(MIXED["mixture"].items())), "mixture_changes": MIXED["mixture_changes"]}
    assert [digest(b) for b in take(corpora(root, **turned))] == [digest(b) for b in take(corpora(root, **MIXED))]


def test_everything_else_changes_the_rows(root):
    """Each of the things that rows depend on does change them."""
    base = MIXED | {"packing": "best_fit"}
    whole = [digest(batch) for batch in take(corpora(root, **base), 8)]
    others = [
        base | {"seed": 4},
        base | {"mixture": {"a": 0.6, "b": 0.4}},
        base | {"mixture_changes": {"5": {"a": 0.2, "c": 0.5, "b": 0.9}}},
        base | {"packing": "concat"},
    ]
    found = [[digest(batch) for batch in take(corpora(root, **other), 8)] for other in others]
    assert len({tuple(rows) for rows in [whole, *found]}) == 5
    assert found[2][:5] == whole[:5]  # weights that change later change nothing before


def test_shares_of_the_mixture(root):
    opened = corpora(root, **MIXED)
    sources = np.concatenate([
        [int(np.max(row[row < made.VOCABULARY])) for row in batch.tokens] for batch in take(opened)
    ])  # fmt: skip
    names = ["abc"[(int(token) - 1000) // 18_000] for token in sources]
    for steps in (5, 9, STEPS):
        counts = {name: names[: steps * BATCH].count(name) / (steps * BATCH) for name in "abc"}
        assert opened.realised(steps) == pytest.approx(counts)
    assert opened.realised(5) == pytest.approx({"a": 0.7, "b": 0.3, "c": 0}, abs=2 / 40)
    assert opened.shares == {"a": 0.7, "b": 0.3, "c": 0.0}


def test_an_epoch_is_every_row_once(root):
    opened = corpora(root / "a")
    rows = ConcatRows(Manifest.load(root / "a"), "train", CONTEXT)
    made_rows = np.concatenate([batch.targets for batch in take(opened, len(rows) // BATCH + 1)])[: len(rows)]
    expected = np.stack([fields(rows[i], made.BEGIN).targets for i in range(len(rows))])
    assert sorted(map(tuple, made_rows.tolist())) == sorted(map(tuple, expected.tolist()))
    assert not np.array_equal(made_rows, expected)


def test_one_pass_in_order_drops_the_last_partial_batch(root):
    opened = corpora(root / "a")
    rows = opened.validation("")
    found = list(batches(rows, opened.begin, batch=BATCH, count=len(rows)))
    assert len(found) == len(rows) // BATCH
    for number, batch in enumerate(found):
        for field, expected in zip(batch, fields(np.stack([rows[number * BATCH + i] for i in range(BATCH)]),
                                                 made.BEGIN), strict=True):  # fmt: skip
            np.testing.assert_array_equal(field, expected)
            assert type(field) is np.ndarray
    assert list(batches(rows, opened.begin, batch=BATCH, count=len(rows), start_batch=10**6)) == []


def test_resuming_late_costs_nothing(root):
    assert len(take(corpora(root, **MIXED), 2, start=10**11)) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_while_reading_arrives(tmp_path, workers):
    made.write_corpus(tmp_path, [made.random_documents(60)], [made.random_documents(40)])
    opened = corpora(tmp_path)
    path = tmp_path / "train-00000.tokens"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ValueError, match=r"train-00000.tokens', bytes 0 to .* do not match their checksum") as caught:
        take(opened, 9, workers=workers)
    assert "\n" not in str(caught.value)


def test_damage_is_found_before_the_first_batch(tmp_path):
    made.write_corpus(tmp_path, [made.random_documents(60)])
    (tmp_path / "train-00000.tokens").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train-00000.tokens' has 0 bytes, \d+ expected"):
        corpora(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": range(2, 9)}, r"share is range\(2, 9\); legal: one or more rows of a batch, 0 to 7"),
        ({"share": range(-1, 2)}, r"share is range\(-1, 2\)"),
        ({"share": range(2, 2)}, r"share is range\(2, 2\)"),
        ({"batch": 0}, "batch is 0"),
        ({"start_batch": -1}, "start_batch is -1"),
        ({"workers": -1}, "workers is -1"),
        ({"prefetch": 0}, "prefetch is 0"),
    ],
)
def test_bad_settings_are_named_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        batches([], 0, **{"batch": BATCH} | settings)


def test_bad_mixtures(root, tmp_path):
    for weights, message in [
        ({"a": 0}, r"data.mixture.a is 0; legal: a positive number"),
        ({"a": 1, "b": -0.5}, r"data.mixture.b is -0.5; legal: a positive number"),
        ({"a": 1, "b": "1"}, r"data.mixture.b is '1'"),
        ({"a": 1, "b": float("nan")}, r"data.mixture.b is nan"),
        ({"a": 1, "b": 1e-6}, r"data.mixture.b is 1e-06, less than 1e-5 of their sum"),
        ({"../a": 1}, r"has the name '../a'; legal: the name of a folder in data.path"),
        ({"absent": 1}, r"no prepared corpus: .*absent' is not a directory"),
    ]:
        with pytest.raises(ValueError, match=message):
            corpora(root, mixture=weights)
    for changes, message in [
        ({"0": {"a": 1}}, "steps being integers of 1 or more"),
        ({"soon": {"a": 1}}, "steps being integers of 1 or more"),
        ({"5": {}}, r"data.mixture_changes.5 is \{\}; legal: \{name: weight\}"),
        ({"5": {"a": -1}}, r"data.mixture_changes.5.a is -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            corpora(root, mixture={"a": 1}, mixture_changes=changes)
    with pytest.raises(ValueError, match=r"mixture_changes is .*; legal: \{\} where data.mixture is \{\}"):
        corpora(root / "a", mixture_changes={"5": {"a": 1}})
    with pytest.raises(ValueError, match="packing is 'tight'; legal: concat, best_fit"):
        corpora(root / "a", packing="tight")
    with pytest.raises(ValueError, match=r"'valid' of .* has \d+ rows of context 16, fewer than one batch of 5000"):
        corpora(root / "a", batch=5000)


def test_mixed_tokenizers_are_refused(root, tmp_path):
    for name in "ab":
        (tmp_path / name).symlink_to(root / name)
    changed = made.write_corpus(tmp_path / "c", [made.random_documents(60)], [made.random_documents(40)])
    dataclasses.replace(changed, tokenizer_fingerprint="f" * 64, tokenizer_kind="bpe").save()
    with pytest.raises(ValueError, match=r"different tokenizers: .*a' \(bytes\) and 'c' \(bpe\); prepare them"):
        corpora(tmp_path, mixture={"a": 1, "c": 1})
