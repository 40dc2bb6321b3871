"""`--verify` finds everything; `--inspect` says what a row really holds; the page on the format is true."""

import itertools
import json
import pathlib
import re
import shutil

import made
import numpy as np
import pytest

from mosaics_jax import whole
from mosaics_jax.data.check import describe_row, problems, summary
from mosaics_jax.data.corpora import PACKINGS
from mosaics_jax.data.corpus import Manifest
from mosaics_jax.data.packing import plan_rows
from mosaics_jax.data.prepare import prepare
from mosaics_jax.data.tokenizer import load_tokenizer

ROOT = pathlib.Path(__file__).parent.parent.parent
TEXTS = [f"Document {i} says plain things. " * (i % 9 + 1) for i in range(60)]


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    made_ = prepare([str(tmp_path / "in.jsonl")], str(tmp_path / "out"), valid_fraction=0.3, shard_tokens=2000)
    plan_rows(made_, 64)
    return made_


def test_a_whole_corpus_has_no_problems(manifest, tmp_path):
    assert list(problems(manifest)) == []
    made.write_corpus(tmp_path / "by_hand", [made.random_documents(60)])
    assert list(problems(Manifest.load(tmp_path / "by_hand"))) == []


def _flip(path: pathlib.Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 3
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: _flip(d / "train-00001.tokens", 100), "train-00001.tokens' has sha256"),
        (lambda d: _flip(d / "train-00001.crc32", 0), "train-00001.crc32' does not match its shard"),
        (
            lambda d: _flip(d / "train-00001.documents", 0),
            "train-00001.documents' is not what was written",
        ),
        (lambda d: (d / "train-00001.tokens").write_bytes(b"12"), r"train-00001.tokens' has 2 bytes, \d+ expected"),
        (lambda d: (d / "valid-00000.tokens").unlink(), "valid-00000.tokens' cannot be read"),
        (lambda d: (d / "valid-00000.crc32").unlink(), "valid-00000.crc32' cannot be read"),
        (lambda d: shutil.rmtree(d / "tokenizer"), "tokenizer_config.json' is missing"),
        (lambda d: _flip(d / "packing-64" / "train-00000.rows", 16), "row [01] of .*does not match its checksum"),
        (lambda d: (d / "packing-64" / "plan.json").unlink(), "has no best-fit plan for rows of 64"),
    ],
)
def test_every_damage_is_found(manifest, damage, message):
    damage(manifest.directory)
    found = list(problems(Manifest.load(manifest.directory)))
    assert any(re.search(message, line) for line in found), found
    assert not any("\n" in line for line in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda body: body["splits"]["train"].update(documents=1),
            r"'train' has \d+ documents in its shards",
        ),
        (lambda body: body["splits"]["train"].update(document_lengths={"2": 1}), "'train' has other document lengths"),
        (
            lambda body: body.update(tokenizer_fingerprint="0" * 64),
            "is not the tokenizer that the shards were made with",
        ),
        (lambda body: body.update(vocabulary=200), r"train-0000\d.tokens', byte \d+: token id 257 of 200"),
        (lambda body: body.update(begin=65), "its begin tokens are not where its documents begin"),
    ],
)
def test_a_manifest_that_lies_is_found(manifest, change, message):
    path = manifest.directory / "manifest.json"
    body = whole.read_json(path)
    change(body)
    whole.write_json(path, body)
    found = list(problems(Manifest.load(manifest.directory)))
    assert any(re.search(message, line) for line in found), found


def test_summary(manifest):
    text = summary(manifest)
    for expected in (
        "bytes tokenizer of 258 ids, uint16", "--valid_fraction=0.3", f"train: {manifest.splits['train'].documents} ",
        "valid: ", "tokens ", "####",
    ):  # fmt: skip
        assert expected in text


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_row_is_described_as_it_is(manifest, packing):
    """The texts that are printed, of all rows, are the documents."""
    ids = np.concatenate([np.fromfile(manifest.directory / s.file, "<u2") for s in manifest.splits["train"].shards])
    expected = load_tokenizer(manifest.tokenizer_directory).decode(ids)
    count = len(PACKINGS[packing](manifest, "train", 64))
    shown = ""
    for row in range(count):
        head, *pieces = describe_row(manifest, "train", row, 64, packing).split("\n--- ")
        assert head.startswith(f"row {row} of {count}, split train, context 64, {packing}: ")
        edges = [tuple(map(int, re.match(r"\[(\d+), (\d+)\)", piece).groups())) for piece in pieces]
        assert (edges[0][0], edges[-1][1]) == (0, 64)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(edges))
        shown += "".join(piece.partition("\n")[2].removesuffix("\n") for piece in pieces)
    if packing == "concat":
        assert expected.startswith(shown)
    assert 0 <= len(expected) - len(shown) < (64 if packing == "concat" else 1)
    assert packing == "concat" or sorted(shown) == sorted(expected)
    with pytest.raises(ValueError, match=rf"row is {count}; legal: 0 to {count - 1} of split 'train' at context 64"):
        describe_row(manifest, "train", count, 64, packing)


def test_pieces_are_named(manifest):
    rows = [describe_row(manifest, "train", row, 64, "best_fit") for row in range(20)]
    assert any("padding, " in row for row in rows)
    assert any("its document begins, and ends" in row for row in rows)
    assert any("goes on from another row, and ends" in row for row in rows)
    assert any("begins, and goes on in another row" in row for row in rows)
    long = describe_row(manifest, "train", 0, 1800, "concat")
    assert "targets in the loss" in long


def test_questions_that_cannot_be_answered(manifest):
    for arguments, message in [
        (("train", -1, 64, "concat"), "row is -1; legal"),
        (("test", 0, 64, "concat"), "split is 'test'; legal: train, valid"),
        (("train", 0, 64, "tight"), "packing is 'tight'; legal: concat, best_fit"),
        (("train", 0, 65, "best_fit"), "no best-fit plan for rows of 65"),
    ]:
        with pytest.raises(ValueError, match=message):
            describe_row(manifest, *arguments)


def test_the_reader_on_the_page_reads(manifest):
    """docs/data_format.md: its ten lines of numpy give every document of every split back."""
    page = (ROOT / "docs" / "data_format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    scope: dict = {}
    exec(code, scope)
    tokenizer = load_tokenizer(manifest.tokenizer_directory)
    for split in ("train", "valid"):
        texts = [tokenizer.decode(ids) for ids in scope["documents"](str(manifest.directory), split)]
        assert len(texts) == manifest.splits[split].documents
        assert set(texts) <= set(TEXTS)
