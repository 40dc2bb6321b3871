import re

import made
import numpy as np
import pytest

from mosaics_jax import whole
from mosaics_jax.data.packing import BestFitRows, best_fit, plan_folder, plan_rows
from mosaics_jax.data.source import fields

CONTEXT = 16


@pytest.fixture
def manifest(tmp_path):
    shards = [made.random_documents(20), [[5000]], made.random_documents(30, seed=1, first=10_000)]
    made_ = made.write_corpus(tmp_path, shards)
    plan_rows(made_, CONTEXT)
    return made_


def slow_best_fit(lengths, context):
    """The definition: longest first, into the fullest row that still has room (of equals the newest)."""
    rows, spaces = [], []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [row for row, space in enumerate(spaces) if space >= lengths[index]]
        if not fitting:
            rows.append([])
            spaces.append(context)
            fitting = [len(rows) - 1]
        row = min(fitting, key=lambda row: spaces[row])
        rows[row].append(index)
        spaces[row] -= lengths[index]
    return sorted(context - space for space in spaces)


@pytest.mark.parametrize("context", [7, 16, 100])
def test_best_fit_is_its_definition(context):
    for seed in range(20):
        lengths = np.random.default_rng(seed).integers(1, context + 1, 60)
        rows = best_fit(lengths, context)
        assert sorted(index for row in rows for index in row) == list(range(60))
        sums = [int(lengths[row].sum()) for row in rows]
        assert max(sums) <= context
        assert sorted(sums) == slow_best_fit(lengths.tolist(), context)
    assert best_fit(np.array([], np.int64), 4) == []


def test_every_token_is_read_and_predicted_once(manifest):
    """All inputs of all rows are the split; all targets in the loss are its tokens that begin no document."""
    rows = BestFitRows(manifest, "train", CONTEXT)
    batches = [fields(rows[i], made.BEGIN) for i in range(len(rows))]
    pieces = []
    for batch in batches:
        for document in np.unique(batch.document):
            mine = batch.document == document
            np.testing.assert_array_equal(batch.position[mine], np.arange(mine.sum()))
            pieces.append((batch.tokens[mine], batch.targets[mine], batch.weight[mine]))
    whole = np.concatenate([np.fromfile(manifest.directory / s.file, "<u2") for s in manifest.splits["train"].shards])
    following = dict(zip(whole[:-1].tolist(), whole[1:].tolist(), strict=True))
    inputs, targets = [], []
    for tokens, aims, weight in pieces:
        if not weight.any():
            assert (tokens == made.END).all()
            assert (aims == made.BEGIN).all()
            continue
        inputs += tokens.tolist()
        targets += aims[weight > 0].tolist()
        np.testing.assert_array_equal(weight == 0, tokens == made.END)
        for token, aim, counted in zip(tokens.tolist(), aims.tolist(), weight, strict=True):
            assert not counted or token == made.BEGIN or following[token] == aim
    assert sorted(inputs) == sorted(whole[whole != made.END].tolist())
    assert sorted(targets) == sorted(whole[whole != made.BEGIN].tolist())


def test_only_what_is_longer_than_a_row_is_cut(manifest):
    rows = BestFitRows(manifest, "train", CONTEXT)
    cut = 0
    for index in range(len(rows)):
        batch = fields(rows[index], made.BEGIN)
        for document in np.unique(batch.document):
            tokens, targets = (field[batch.document == document] for field in (batch.tokens, batch.targets))
            if tokens[0] != made.END and targets[-1] != made.END:  # it goes on in another row, so it fills this one
                assert len(tokens) == CONTEXT
                cut += 1
    lengths = [np.diff(np.fromfile(manifest.directory / s.documents_file, "<u8"), prepend=np.uint64(0))
               for s in manifest.splits["train"].shards]  # fmt: skip
    assert cut == sum(int(((size.astype(int) - 2) // CONTEXT).sum()) for size in lengths)


def test_rows_without_a_plan_and_bad_plans(manifest):
    with pytest.raises(ValueError, match=r"has no best-fit plan for rows of 17; `python -m launch.prepare .*17`"):
        BestFitRows(manifest, "train", 17)
    rows = BestFitRows(manifest, "train", CONTEXT)
    for bad in (-1, len(rows)):
        with pytest.raises(IndexError, match=f"row {bad}; legal: 0 to {len(rows) - 1}"):
            rows[bad]
    assert rows.problem() is None
    folder = plan_folder(manifest, CONTEXT)
    pieces = folder / "train-00000.pieces"
    content = pieces.read_bytes()
    table = np.frombuffer(content, "<u8").copy()
    table[1] += 1
    pieces.write_bytes(table.tobytes())
    message = r"row 0 of .*train-00000.rows' and .*train-00000.pieces' does not match its checksum; plan the rows again"
    assert re.fullmatch(message, rows.problem())
    with pytest.raises(ValueError, match=message):
        rows[0]
    pieces.write_bytes(content[:16])
    with pytest.raises(ValueError, match="does not match its checksum; plan the rows again"):
        [rows[index] for index in range(len(rows))]
    body = whole.read_json(folder / "plan.json")
    for change in ({"corpus": "other"}, {"context": CONTEXT + 1}, {"format": "mosaics_jax packing 1"}):
        whole.write_json(folder / "plan.json", body | change)
        with pytest.raises(ValueError, match=r"plan.json' is of another corpus or version; .* makes it anew"):
            BestFitRows(manifest, "train", CONTEXT)
    (folder / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan.json' is damaged"):
        BestFitRows(manifest, "train", CONTEXT)
