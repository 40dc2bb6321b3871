import gzip
import hashlib
import itertools
import json
import lzma
import os
import pathlib
import re
import sysconfig

import numpy as np
import pytest
import zstandard

from mosaics_jax.data import documents
from mosaics_jax.data.check import files_read, problems
from mosaics_jax.data.corpus import Manifest
from mosaics_jax.data.prepare import prepare
from mosaics_jax.data.tokenizer import ByteTokenizer, load_tokenizer, make_tokenizer

TEXTS = [f"Document {i}: naïve 你好 <|begin_of_text|> " + "word " * i for i in range(40)]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)), encoding="utf-8"
    )
    return str(path)


def one_held_out(*texts: bytes) -> float:
    """The valid_fraction at which exactly one of `texts` is held out, by the rule that decides it."""
    draws = sorted(int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64 for text in texts)
    return (draws[0] + draws[1]) / 2


def read_tokens(manifest: Manifest, split: str) -> np.ndarray:
    kind = {"uint16": "<u2", "uint32": "<u4"}[manifest.dtype]
    files = [manifest.directory / shard.file for shard in manifest.splits[split].shards]
    return np.concatenate([np.frombuffer(file.read_bytes(), kind) for file in files])


def read_documents(manifest: Manifest, split: str) -> list[str]:
    """The split's texts, taken back from its shards."""
    tokenizer = load_tokenizer(manifest.tokenizer_directory)
    tokens = read_tokens(manifest, split)
    starts, ends = np.flatnonzero(tokens == manifest.begin), np.flatnonzero(tokens == manifest.end)
    np.testing.assert_array_equal(starts, [0, *(ends[:-1] + 1)])
    assert ends[-1] == tokens.size - 1
    return [tokenizer.decode(tokens[a + 1 : b]) for a, b in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_the_texts_come_back_and_the_manifest_counts_them(corpus, tmp_path, tokenizer):
    made = prepare([corpus], str(tmp_path / "out"), tokenizer, valid_fraction=0.3, shard_tokens=1000)
    manifest = Manifest.load(tmp_path / "out")
    assert manifest == made
    assert manifest.fingerprint == made.fingerprint
    assert list(problems(manifest)) == []
    parts = {split: read_documents(manifest, split) for split in ("train", "valid")}
    assert sorted(parts["train"] + parts["valid"]) == sorted(TEXTS)
    assert parts["train"] != [text for text in TEXTS if text in parts["train"]]  # not in the order of the input
    for name, texts in parts.items():
        split = manifest.splits[name]
        assert split.documents == len(texts) > 3
        assert split.bytes == sum(len(text.encode()) for text in texts)
        assert split.tokens == read_tokens(manifest, name).size == sum(shard.tokens for shard in split.shards)
        assert len(split.shards) == -(-split.tokens // 1000)
        assert max(shard.documents for shard in split.shards) - min(shard.documents for shard in split.shards) <= 1
        assert sum(split.document_lengths.values()) == split.documents
    assert len(manifest.splits["train"].shards) > 1
    assert manifest.vocabulary == load_tokenizer(manifest.tokenizer_directory).vocabulary
    assert manifest.arguments["tokenizer"] == tokenizer
    assert sorted(os.listdir(tmp_path)) == ["out", "texts.jsonl"]


def test_document_lengths_and_bigram_entropy_by_hand(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    texts = {"a": "x", "b": "ab", "c": "aab", "d": "abababab"}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    fraction = one_held_out(*(text.encode() for text in texts.values()))
    manifest = prepare([str(folder)], str(tmp_path / "out"), valid_fraction=fraction)
    assert manifest.splits["valid"].documents == 1
    lengths = {3: 4, 4: 4, 5: 8, 10: 16}  # with both ends -> the power of two that holds it
    for name in ("train", "valid"):
        split = manifest.splits[name]
        expected: dict[int, int] = {}
        pairs: dict[str, dict[str, int]] = {}
        for text in read_documents(manifest, name):
            power = lengths[len(text) + 2]
            expected[power] = expected.get(power, 0) + 1
            for previous, following in itertools.pairwise(text):
                pairs.setdefault(previous, {}).setdefault(following, 0)
                pairs[previous][following] += 1
        assert split.document_lengths == expected
        total = sum(sum(nexts.values()) for nexts in pairs.values())
        entropy = -sum(n * np.log2(n / sum(nexts.values())) for nexts in pairs.values() for n in nexts.values())
        assert split.bigram_entropy == pytest.approx(entropy / max(total, 1), abs=1e-12)


def test_held_out_documents_do_not_depend_on_company_or_tokenizer(corpus, tmp_path):
    extra = tmp_path / "extra.txt"
    extra.write_text("one more document")
    alone = prepare([corpus], str(tmp_path / "a"), valid_fraction=0.3)
    joined = prepare([str(extra), corpus, corpus], str(tmp_path / "b"), "bpe:290", valid_fraction=0.3)
    assert set(read_documents(alone, "valid")) == set(read_documents(joined, "valid")) - {"one more document"}
    assert not set(read_documents(joined, "train")) & set(read_documents(joined, "valid"))


def test_the_same_input_gives_the_same_corpus(corpus, tmp_path):
    first = prepare([corpus], str(tmp_path / "a"), "bpe:300", valid_fraction=0.3)
    again = prepare([corpus], str(tmp_path / "b"), "bpe:300", valid_fraction=0.3)
    other = prepare([corpus], str(tmp_path / "c"), "bpe:301", valid_fraction=0.3)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_the_trained_vocabulary_does_not_see_held_out_text(tmp_path):
    path = tmp_path / "texts.jsonl"
    texts = [f"train and valid {i}" for i in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    manifest = prepare([str(path)], str(tmp_path / "a"), "bpe:270", valid_fraction=0.3, shuffle_seed=None)
    same = make_tokenizer("bpe:270", read_documents(manifest, "train"))
    assert same.fingerprint == manifest.tokenizer_fingerprint


def test_wide_ids_take_four_bytes(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "vocabulary", 2**16 + 1)
    monkeypatch.setattr(ByteTokenizer, "end", 2**16)
    manifest = prepare([corpus], str(tmp_path / "out"), valid_fraction=0.3)
    assert manifest.dtype == "uint32"
    tokens = read_tokens(manifest, "train")
    assert (tokens == 2**16).sum() == manifest.splits["train"].documents
    size = sum((manifest.directory / shard.file).stat().st_size for shard in manifest.splits["train"].shards)
    assert size == 4 * manifest.splits["train"].tokens


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst"])
def test_compressed_lines(corpus, tmp_path, suffix):
    content = pathlib.Path(corpus).read_bytes()
    path = tmp_path / f"packed{suffix}"
    path.write_bytes(_compress(content, suffix))
    assert len(content) > 1000
    expected = prepare([corpus], str(tmp_path / "a"), valid_fraction=0.3)
    assert prepare([str(path)], str(tmp_path / "b"), valid_fraction=0.3).fingerprint == expected.fingerprint


def _compress(content: bytes, suffix: str) -> bytes:
    if suffix.endswith(".gz"):
        return gzip.compress(content)
    if suffix.endswith(".xz"):
        return lzma.compress(content)
    if suffix.endswith(".zst"):  # two frames, as appending tools write them
        return zstandard.compress(content[:1000]) + zstandard.compress(content[1000:])
    return content


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_damaged_compressed_files_are_named(tmp_path, suffix):
    content = np.random.default_rng(0).integers(97, 123, 50_000).astype(np.uint8).tobytes()
    path = tmp_path / f"text.txt{suffix}"
    whole = _compress(content, suffix)
    for damaged in (whole[: len(whole) // 2], b"not compressed at all"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))}' cannot be read .*the file is damaged"):
            prepare([str(path)], str(tmp_path / "out"))
    path.write_bytes(whole)
    other = tmp_path / "other.md"
    other.write_text("x")
    manifest = prepare([str(path), str(other)], str(tmp_path / "out"), valid_fraction=one_held_out(content, b"x"))
    assert sum(split.bytes for split in manifest.splits.values()) == len(content) + 1


def test_a_folder_is_its_text_source_files_sorted(tmp_path):
    folder = tmp_path / "in"
    for name in ("b/two.py", "a/one.md", "c.txt", "d.bin", ".hidden.py", ".git/x.py", "__pycache__/y.py", "e.bin"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"I am {name}\r\n", newline="")
    (folder / "empty.py").write_text("")
    expected = [f"I am {name}\r\n" for name in ("a/one.md", "b/two.py", "c.txt")]
    fraction = one_held_out(*(text.encode() for text in expected))
    manifest = prepare([str(folder)], str(tmp_path / "out"), valid_fraction=fraction)
    both = read_documents(manifest, "train") + read_documents(manifest, "valid")
    assert sorted(both) == expected
    assert manifest.skipped == {"empty": 1, "not_utf8": 0, "broken": 0}
    assert oct(manifest.directory.stat().st_mode) == oct(folder.stat().st_mode)


def test_the_default_corpus_is_the_standard_library(tmp_path, monkeypatch):
    manifest = prepare(["python"], str(tmp_path / "real"), max_bytes=500_000, valid_fraction=0.1)
    size = sum(split.bytes for split in manifest.splits.values())
    assert 500_000 <= size < 700_000

    stdlib = tmp_path / "lib"
    (stdlib / "site-packages").mkdir(parents=True)
    for name in ("a.py", "b.py", "c.py", "site-packages/d.py", "e.md"):
        (stdlib / name).write_text(f"# {name}")
    (stdlib / "latin.py").write_bytes(b"# \xe9")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(stdlib)})
    manifest = prepare(["python"], str(tmp_path / "out"), valid_fraction=one_held_out(b"# a.py", b"# b.py", b"# c.py"))
    assert sorted(read_documents(manifest, "train") + read_documents(manifest, "valid")) == [
        "# a.py",
        "# b.py",
        "# c.py",
    ]
    assert manifest.skipped == {"empty": 0, "not_utf8": 1, "broken": 0}


def test_max_bytes_takes_whole_documents(corpus, tmp_path):
    sizes = np.cumsum([len(text.encode()) for text in TEXTS])
    for limit, count in ((int(sizes[20]), 21), (int(sizes[20]) + 1, 22), (int(sizes[20]) - 1, 21)):
        manifest = prepare([corpus], str(tmp_path / str(limit)), valid_fraction=0.3, max_bytes=limit)
        assert sum(split.documents for split in manifest.splits.values()) == count
    # over several files, whatever the number of workers takes ahead
    folder = tmp_path / "files"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    for workers in (0, 2):
        made = prepare([str(folder)], str(tmp_path / f"files{workers}"), valid_fraction=0.3,
                       max_bytes=int(sizes[20]) - 1, workers=workers)  # fmt: skip
        assert {split: sorted(read_documents(made, split)) for split in made.splits} == {
            split: sorted(read_documents(manifest, split)) for split in manifest.splits
        }


def test_progress_reaches_the_end(corpus, tmp_path):
    calls = []
    manifest = prepare([corpus], str(tmp_path / "out"), valid_fraction=0.3, progress=lambda *call: calls.append(call))
    passes = {
        name: [call for (call,) in calls if call.pass_ == name]
        for name in ("tokenizing", "writing train", "writing valid")
    }
    tokens = sum(split.tokens for split in manifest.splits.values())
    last = passes["tokenizing"][-1]
    assert (last.done, last.total, last.tokens) == (os.path.getsize(corpus), os.path.getsize(corpus), tokens)
    for name, split in manifest.splits.items():
        assert passes[f"writing {name}"][-1].done == passes[f"writing {name}"][-1].total == split.tokens


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xff", r"a.txt' is not UTF-8 at byte 3"),
        ("a.txt", b"", r"a.txt' holds no documents with text"),
        ("a.jsonl", b"", r"a.jsonl' holds no documents with text"),
        ("a.jsonl", b'{"text": ""}\n', r"a.jsonl' holds no documents with text"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a.jsonl:3' is not JSON"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"content": "b"}\n',
            r"a.jsonl:2' is not an object with a string \"text\"; its fields are 'content' \(--text_field names",
        ),
        ("a.jsonl", b'{"text": 7}\n', r"a.jsonl:1' is not an object with a string \"text\""),
        ("a.jsonl", b'["text"]\n', r"a.jsonl:1' is not an object with a string \"text\""),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a.jsonl:1' is not UTF-8 at byte 10 of the line"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a.jsonl:1' holds half of a surrogate pair"),
        ("a.parquet", b"x", r"a.parquet' cannot be read .*the file is damaged"),
        ("a.array_record", b"x", r"a.array_record' cannot be read .*the file is damaged"),
        ("a.csv", b"x", r"a.csv' is of a format that is not read; read are .txt, .jsonl, .json and .parquet"),
        ("a.py.gz", b"x", r"a.py.gz' is of a format that is not read"),
        ("a", b"x", r"a' is of a format that is not read"),
    ],
)
def test_a_bad_input_is_named_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        prepare([str(tmp_path / name)], str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == [name]  # neither output nor leftovers


def test_bad_folders_and_lists(tmp_path):
    (tmp_path / "in").mkdir()
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"in' holds no files that are read"):
        prepare([str(tmp_path / "in")], out)
    (tmp_path / "in" / "a.c").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match=r"a.c' is not UTF-8 at byte 0"):
        prepare([str(tmp_path / "in")], out)
    with pytest.raises(ValueError, match=r"no inputs; an input is a file, a glob"):
        prepare([], out)
    for tokenizer in ("bytes", "bpe:300"):
        with pytest.raises(ValueError, match=r"absent' does not exist"):
            prepare([str(tmp_path / "absent")], out, tokenizer)


@pytest.mark.parametrize(("share", "count", "note"), [(1e-9, 1, "no document is"), (1 - 1e-9, 39, "all documents are")])
def test_no_split_is_empty(corpus, tmp_path, share, count, note):
    manifest = prepare([corpus], str(tmp_path / "out"), "bpe:260" if count == 1 else "bytes", valid_fraction=share)
    assert {name: split.documents for name, split in manifest.splits.items()} == {"train": 40 - count, "valid": count}
    assert manifest.note.startswith(f"{note} held out by their hash")
    texts = [text for name in ("train", "valid") for text in read_documents(manifest, name)]
    assert sorted(texts) == sorted(TEXTS)
    assert Manifest.load(tmp_path / "out").note == manifest.note


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:262"])
@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("".join(f"line {n}\n" for n in range(100)), "".join(f"line {n}\n" for n in range(81, 100))),
        ("a" * 100, "a" * 20),
        ("é" * 50, "é" * 10),
        ("\n\n", "\n"),
        ("ab", "b"),
    ],
    ids=["lines", "one line", "two bytes a character", "line ends", "two characters"],
)
def test_one_document_is_cut_in_two(tmp_path, text, valid, tokenizer):
    (tmp_path / "a.txt").write_bytes(text.encode())
    if tokenizer != "bytes" and "line 9" not in text:
        pytest.skip("too little text to learn a tokenizer from")
    manifest = prepare([str(tmp_path / "a.txt")], str(tmp_path / "out"), tokenizer, valid_fraction=0.2)
    (train,), (held,) = (read_documents(manifest, name) for name in ("train", "valid"))
    assert train + held == text
    assert held == valid
    assert "there is one document: it is cut in two, at a line end if it has one" in manifest.note


def test_a_long_document_is_cut_in_whichever_part(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PART_BYTES", 1 << 8)
    text = "".join(f"line {n} of many\n" for n in range(2000))
    (tmp_path / "a.txt").write_text(text)
    for share in (0.02, 0.5, 0.98):
        manifest = prepare([str(tmp_path / "a.txt")], str(tmp_path / f"{share}"), valid_fraction=share)
        (train,), (held,) = (read_documents(manifest, name) for name in ("train", "valid"))
        assert train + held == text
        assert train.endswith("\n")
        assert len(held) == pytest.approx(share * len(text), abs=300)


@pytest.mark.parametrize("texts", [["a"], ["same", "same", "same"]], ids=["one character", "equal ones"])
def test_what_cannot_be_divided_is_refused(tmp_path, texts):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.raises(ValueError, match=f"{len(texts)} documents cannot be divided into train and valid"):
        prepare([str(tmp_path / "a.jsonl")], str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_what_was_read_and_what_was_not_is_listed(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.json").write_text("".join(json.dumps({"text": f"{number} {n}"}) + "\n" for n in range(9)))
        (folder / f"{number}.csv").write_text("a,b")
    (folder / "a.md").write_text("# text")
    manifest = prepare([str(folder)], str(tmp_path / "out"), valid_fraction=0.3)
    assert sum(split.documents for split in manifest.splits.values()) == 28
    lines = [json.loads(line) for line in (tmp_path / "out" / "files.jsonl").read_text().splitlines()]
    assert {os.path.basename(line["path"]): line.get("read") for line in lines} == {
        **dict.fromkeys(("0.json", "1.json", "2.json"), "jsonl"), "a.md": "text",
        **dict.fromkeys(("0.csv", "1.csv", "2.csv")),
    }  # fmt: skip
    assert files_read(manifest) == [
        "read 4 files: 3 .json as records, 1 .md",
        "left out: 3 .csv, because each is of a format that is not read",
        f"{tmp_path / 'out' / 'files.jsonl'} lists each file",
    ]
    assert not list(problems(manifest))


def test_bad_arguments_of_prepare(corpus, tmp_path):
    for bad in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match=rf"valid_fraction is {bad}; legal"):
            prepare([corpus], str(tmp_path / "out"), valid_fraction=bad)
    for name in ("shard_tokens", "max_bytes"):
        with pytest.raises(ValueError, match=f"{name} is 0; legal"):
            prepare([corpus], str(tmp_path / "out"), **{name: 0})
    assert os.listdir(tmp_path) == ["texts.jsonl"]


def test_what_is_already_written_is_never_lost(corpus, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    prepare([corpus], str(out), valid_fraction=0.3)  # an empty directory may be there
    before = {file: (out / file).stat().st_mtime_ns for file in os.listdir(out)}
    with pytest.raises(ValueError, match=r"out' already holds a prepared corpus; remove it or name another"):
        prepare([corpus], str(out), valid_fraction=0.3)
    assert {file: (out / file).stat().st_mtime_ns for file in os.listdir(out)} == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    for taken in ("full", "texts.jsonl"):
        with pytest.raises(
            ValueError,
            match=r"output is .*(full|texts.jsonl).*, which is a f(older of something else|ile); nothing was written",
        ):
            prepare([corpus], str(tmp_path / taken), valid_fraction=0.3)
