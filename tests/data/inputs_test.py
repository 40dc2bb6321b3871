"""Every kind of input gives the same documents; large ones are read in parts and ranges."""

import gzip
import json
import lzma
import os
import pathlib
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import zstandard

from mosaics_jax.data import documents, inputs
from mosaics_jax.data.documents import Broken, read_parts
from mosaics_jax.data.inputs import find_units
from mosaics_jax.data.prepare import prepare
from mosaics_jax.data.stage import Stage

TEXTS = [f"Document {i}: naïve 你好\n" + "word " * (37 * i % 50) for i in range(200)]


def texts_of(*names, text_field="text", record_format="text", tfds_dir=None):
    """The documents of inputs, put together from their parts; broken records stand among them."""
    found, held = [], ""
    for unit in (unit for group in find_units(names, tfds_dir, text_field).units for unit in group):
        done = []
        for part in read_parts(unit, text_field, record_format, done.append):
            if isinstance(part, Broken):
                found.append(part)
                continue
            assert part.text.encode() == part.utf8
            held += part.text
            if part.last:
                found.append(held)
                held = ""
        assert 0.9 * unit.size <= sum(done) <= 1.1 * unit.size + (1 << 20)
    assert not held
    return found


def write_parquet(path, texts, column="text", rows=30):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": list(range(len(texts))), column: texts})
    parquet.write_table(table, path, row_group_size=rows)


def write_array_record(path, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    write_parquet(tmp_path / "a.parquet", TEXTS)
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    write_array_record(tmp_path / "a.array_record", [text.encode() for text in TEXTS])
    (tmp_path / "many").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "many" / f"{number:03d}.txt").write_text(text, encoding="utf-8", newline="")
    return tmp_path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet", "a.parquet.gz", "a.array_record",
             "many", "many/*.txt", "*/[0-9]*.txt"],
)  # fmt: skip
def test_every_format_gives_the_same_documents(folder, name):
    assert texts_of(str(folder / name)) == TEXTS


def test_a_folder_holds_all_that_is_read(folder):
    assert len(texts_of(str(folder))) == 8 * len(TEXTS)


def test_other_fields_and_json_records(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x", "text": 3}\n')
    write_parquet(tmp_path / "a.parquet", ["y"], column="content")
    write_array_record(tmp_path / "a.array_record", [b'{"content": "z"}'])
    assert texts_of(str(tmp_path), text_field="content", record_format="json") == ["z", "x", "y"]


def test_ranges_of_large_files_are_the_whole(folder, monkeypatch):
    """Whatever byte a range of lines begins at: in a line, at its end, at its beginning."""
    size = (folder / "a.jsonl").stat().st_size
    for unit_bytes in (100, 101, 307, 5000, size - 1, size):
        monkeypatch.setattr(inputs, "UNIT_BYTES", unit_bytes)
        (units,) = find_units([str(folder / "a.jsonl")]).units
        assert len(units) == -(-size // unit_bytes)
        assert sum(unit.size for unit in units) == size
        assert texts_of(str(folder / "a.jsonl")) == TEXTS
    monkeypatch.setattr(inputs, "UNIT_BYTES", 500)
    (units,) = find_units([str(folder / "a.parquet")]).units
    assert 3 < len(units) <= 7
    assert texts_of(str(folder / "a.parquet")) == TEXTS


def test_a_place_in_a_range_is_that_in_the_file(folder, monkeypatch):
    monkeypatch.setattr(inputs, "UNIT_BYTES", 1000)
    lines = (folder / "a.jsonl").read_bytes().splitlines(keepends=True)
    lines[77] = b'{"text": \n'
    (folder / "a.jsonl").write_bytes(b"".join(lines))
    (broken,) = [found for found in texts_of(str(folder / "a.jsonl")) if isinstance(found, Broken)]
    assert broken.where == f"'{folder / 'a.jsonl'}:78'"


@pytest.mark.parametrize("suffix", ["", ".xz"])
def test_a_long_text_is_read_in_parts_with_the_same_ids(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(documents, "PART_BYTES", 1000)
    draw = np.random.default_rng(0)
    words = ["the ", "naïve ", "你好", "\n", "x = 3\n", "  ", "don't "]
    text = "".join(words[i] for i in draw.integers(0, len(words), 4000))
    content = text.encode()
    path = tmp_path / f"long.txt{suffix}"
    path.write_bytes(lzma.compress(content) if suffix else content)
    (tmp_path / "other.txt").write_text("the other one")
    (unit,) = find_units([str(path)]).units[0]
    parts = list(read_parts(unit, "text", "text", lambda size: None))
    assert len(parts) > 10
    assert "".join(part.text for part in parts) == text
    made = {}
    for name, size in (("parts", 1000), ("whole", 1 << 20)):
        monkeypatch.setattr(documents, "PART_BYTES", size)
        made[name] = prepare([str(path), str(tmp_path / "other.txt")], str(tmp_path / name), "bpe:300",
                             valid_fraction=0.35)  # fmt: skip
    assert made["parts"].fingerprint == made["whole"].fingerprint
    assert made["parts"].splits == made["whole"].splits
    monkeypatch.setattr(documents, "PART_BYTES", 1000)
    path.write_bytes(content + b"\xff")
    if not suffix:
        (broken,) = texts_of(str(path))
        assert str(broken) == f"{str(path)!r} is not UTF-8 at byte {len(content)}"


def test_records_that_are_too_long_are_broken_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MOST_RECORD_BYTES", 100)
    monkeypatch.setattr("mosaics_jax.data.tables.MOST_RECORD_BYTES", 100)
    long = "x" * 300
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", long, "b")))
    write_parquet(tmp_path / "a.parquet", ["a", long, "b"])
    write_array_record(tmp_path / "a.array_record", [b"a", long.encode(), b"b"])
    for name, place in (("a.jsonl", "a.jsonl:2'"), ("a.parquet", "row 1"), ("a.array_record", "record 1")):
        first, broken, last = texts_of(str(tmp_path / name))
        assert (first, last) == ("a", "b")
        assert broken.where.endswith(place)
        assert broken.why == "is longer than 100 bytes"


def test_columns_and_rows_that_hold_no_text(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a", None, "b"])
    first, broken, last = texts_of(str(tmp_path / "a.parquet"))
    assert (first, last, str(broken)) == ("a", "b", f"'{tmp_path / 'a.parquet'}' row 1 is not a string in 'text'")
    with pytest.raises(ValueError, match=r"a.parquet' has no column 'body'; its columns are 'id', 'text'"):
        texts_of(str(tmp_path / "a.parquet"), text_field="body")


def test_inputs_that_are_not_there(tmp_path):
    for name, message in [
        ("absent.txt", "does not exist; an input is a file, a glob, a folder"),
        ("*.jsonl", r"matches no files; an input is"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_units([str(tmp_path / name)])
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"a.csv' is of a format that is not read"):
        find_units([str(tmp_path / "*")])


def test_a_changed_file_is_another_unit(folder):
    ((before,),) = find_units([str(folder / "a.jsonl")]).units
    assert find_units([str(folder / "a.jsonl")]).units == [[before]]
    with (folder / "a.jsonl").open("a") as stream:
        stream.write("\n")
    ((after,),) = find_units([str(folder / "a.jsonl")]).units
    assert before.identity != after.identity


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """A TFDS data set of two splits and several files, prepared without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")

    class Sentences(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": np.int64})
            )

        def _split_generators(self, dl_manager):
            return {"train": self._texts(TEXTS), "test": self._texts(TEXTS[:5])}

        def _texts(self, texts):
            for number, text in enumerate(texts):
                yield number, {"text": text, "label": number}

        def _generate_examples(self):
            raise NotImplementedError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        builder = Sentences(data_dir=str(folder), file_format="array_record")
        config = tfds.download.DownloadConfig(num_shards=3)
        builder.download_and_prepare(download_config=config)
    return pathlib.Path(builder.data_dir)


@pytest.mark.filterwarnings("ignore")
def test_tfds(data_set):
    assert sorted(texts_of(f"tfds:{data_set}@train")) == sorted(TEXTS)
    assert sorted(texts_of("tfds:sentences@test", tfds_dir=str(data_set.parent.parent))) == sorted(TEXTS[:5])
    for spec, message in [
        (f"tfds:{data_set}", rf"names no split; legal: tfds:{data_set}@"),
        (f"tfds:{data_set}@valid", r"names no split; legal"),
        ("tfds:absent_set@train", r"TFDS has no data set 'absent_set' .*--tfds_dir"),
        (str(data_set / "*record*"), r"is part of a TFDS data set; give that: --input=tfds:.*@SPLIT"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            find_units([spec])
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"has no feature 'body'; its features are 'label', 'text'|'text', 'label'"):
        texts_of(f"tfds:{data_set}@train", text_field="body")


@pytest.mark.filterwarnings("ignore")
def test_tfds_needs_no_tensorflow(data_set, tmp_path):
    code = (
        "import sys\n"
        "from mosaics_jax.data.prepare import prepare\n"
        f"made = prepare(['tfds:{data_set}@train'], {str(tmp_path / 'out')!r})\n"
        "print(sum(split.documents for split in made.splits.values()), 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{len(TEXTS)} False"


def test_a_stage_of_another_version_is_refused(tmp_path):
    body = json.dumps({"magic": "other"}).encode()
    (tmp_path / "a.stage").write_bytes(body + len(body).to_bytes(8, "little"))
    with pytest.raises(ValueError, match="was made by another version"):
        Stage.open(tmp_path / "a.stage")


# What a file is, by its name and by its content.


def _lines(count, **fields):
    return "".join(json.dumps({"id": number, **fields, "text": f"text {number}"}) + "\n" for number in range(count))


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.zst", "a.ndjson"])
def test_json_lines_are_records_whatever_they_are_called(tmp_path, name):
    content = _lines(40).encode()
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(pathlib.Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(content))
    assert texts_of(str(tmp_path)) == [f"text {number}" for number in range(40)]


@pytest.mark.parametrize(
    "content",
    ['{"text": "b"', "{}", "[]", '{\n  "name": "a"\n}\n', '{"a": 1}\n', "[1,\n 2]", "no JSON", '[{"name": "a"}]'],
)
def test_other_json_is_source(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert texts_of(str(tmp_path)) == [content]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.json", '[{"text": "a"}, {"text": "b"}]', "is one JSON array of records; write them as JSON Lines"),
        ("a.json", '{"body": "a"}\n{"body": "b"}\n', r"is JSON Lines without the field 'text' \(--text_field names"),
        ("a.csv", "text\na", "is of a format that is not read"),
    ],
)
def test_what_is_not_read_is_refused_alone_and_listed_in_a_folder(tmp_path, name, content, why):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}' {why}"):
        find_units([str(tmp_path / name)])
    (tmp_path / "b.txt").write_text("read")
    found = find_units([str(tmp_path)])
    assert [unit.path for unit in found.units[0]] == [str(tmp_path / "b.txt")]
    ((path, said),) = found.left_out
    assert path == str(tmp_path / name)
    assert re.match(why, said)


def test_json_lines_called_txt_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text(_lines(2))
    with pytest.raises(ValueError, match=r"a.txt' holds JSON Lines; name it .jsonl"):
        find_units([str(tmp_path)])
    (tmp_path / "a.txt").write_text("{'text': 'Python, and no JSON'}\n" * 2)
    assert len(texts_of(str(tmp_path))) == 1


def test_links_are_followed_once(tmp_path):
    for place in ("in/a", "disk/b"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "x.jsonl").write_text(_lines(5, place=place))
    (tmp_path / "in" / "b").symlink_to(tmp_path / "disk" / "b")
    (tmp_path / "in" / "c").symlink_to(tmp_path / "disk" / "b")  # again
    (tmp_path / "in" / "a" / "up").symlink_to(tmp_path / "in")  # a circle
    (tmp_path / "in" / "a" / "y.jsonl").symlink_to(tmp_path / "in" / "a" / "x.jsonl")
    (tmp_path / "in" / "gone.jsonl").symlink_to(tmp_path / "nothing")
    (tmp_path / "in" / ".git").mkdir()
    found = find_units([str(tmp_path / "in")])
    read = {os.path.relpath(unit.path, tmp_path / "in") for unit in found.units[0]}
    assert read == {"a/x.jsonl", "b/x.jsonl"}
    left = {os.path.relpath(path, tmp_path / "in"): why for path, why in found.left_out}
    assert left == {
        "c": "is a link to what is read already",
        "a/up": "is a link to what is read already",
        "a/y.jsonl": "is a link to what is read already",
        "gone.jsonl": "is no file, or a link to nothing",
        ".git": "is a folder that is hidden, or of caches and packages",
    }


def test_a_glob_with_brackets_says_how_to_write_one(tmp_path):
    (tmp_path / "[2026]").mkdir()
    (tmp_path / "[2026]" / "a.txt").write_text("text")
    assert texts_of(str(tmp_path / "[2026]")) == ["text"]
    with pytest.raises(ValueError, match=r"matches no files; .*in a glob, \[\[\] is a bracket itself"):
        find_units([str(tmp_path / "[2026]" / "*.txt")])
    assert texts_of(str(tmp_path / "[[]2026]" / "*.txt")) == ["text"]


def test_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    assert texts_of("~/a.txt") == texts_of("~/*.txt") == ["text"]


def test_a_frame_may_look_far_back(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=29, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(_lines(3).encode()) + compressor.flush())
    assert texts_of(str(tmp_path / "a.jsonl.zst")) == ["text 0", "text 1", "text 2"]


@pytest.mark.parametrize(
    "text", ["很久以前有一个小屋在河边，里面住着一只猫。\r\n" * 3000, "ACGT" * 20_000], ids=["CRLF", "a genome"]
)
def test_a_long_text_without_spaces_is_cut_and_not_refused(tmp_path, monkeypatch, text):
    monkeypatch.setattr(documents, "PART_BYTES", 1 << 12)
    monkeypatch.setattr(documents, "_MOST_HELD", 1 << 13)
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert texts_of(str(tmp_path / "a.txt")) == [text]
