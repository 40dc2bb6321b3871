"""No damage of a small file is silent: rows, plan and tokenizer are what was written, or an error names the file."""

import contextlib
import hashlib
import json
import pathlib
import random
import shutil
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from mosaics_jax import lock, whole
from mosaics_jax.data import packing
from mosaics_jax.data import prepare as prepare_lib
from mosaics_jax.data.check import problems
from mosaics_jax.data.corpus import Manifest, document_ends
from mosaics_jax.data.packing import BestFitRows, plan_folder, plan_rows
from mosaics_jax.data.prepare import prepare
from mosaics_jax.data.source import ConcatRows
from mosaics_jax.data.tokenizer import load_tokenizer

CONTEXT = 32
FLIPS = 40  # of a file, or all bits of one that has no more
TEXT = "Plain things are said of cats, dogs and 7 other animals. "


def _write_input(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT[i % 20 :] * (i % 3 + 1)}) + "\n" for i in range(24)))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two shards of training documents, one held out, a BPE and a plan; a test puts back what it spoils."""
    folder = tmp_path_factory.mktemp("damaged")
    made = prepare([str(_write_input(folder))], str(folder / "out"), "bpe:264", valid_fraction=0.3, shard_tokens=600)
    plan_rows(made, CONTEXT)
    assert len(made.splits["train"].shards) > 1
    return made.directory


def _all_of(directory: pathlib.Path) -> str:
    """A digest of all that is ever read of a corpus."""
    manifest = Manifest.load(directory)
    found = hashlib.sha256(repr((manifest, manifest.fingerprint)).encode())
    tokenizer = load_tokenizer(manifest.tokenizer_directory)
    found.update(repr((tokenizer.fingerprint, tokenizer.begin, tokenizer.end, tokenizer.vocabulary)).encode())
    found.update(tokenizer.encode(TEXT).tobytes())
    for split in manifest.splits:
        found.update(document_ends(manifest, split).tobytes())
        for rows in (ConcatRows(manifest, split, CONTEXT), BestFitRows(manifest, split, CONTEXT)):
            found.update(np.stack([rows[index] for index in range(len(rows))]).tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def _damaged(path: pathlib.Path) -> Iterator[None]:
    """Puts the file back, whatever has become of it."""
    content = path.read_bytes()
    try:
        yield
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(content)


def _is_told(directory: pathlib.Path, expected: str, *paths: pathlib.Path) -> bool:
    """Whether a ValueError that names one of the files is raised; else all must be as before."""
    try:
        assert _all_of(directory) == expected, paths
    except ValueError as error:
        message = str(error)
        names = {name for path in paths for name in (path.name, f"{path.parent.name}'")}
        assert any(name in message for name in names) or "has no best-fit plan" in message, message
        assert message.splitlines() == [message]
        return True
    return False


def _files(corpus: pathlib.Path) -> list[pathlib.Path]:
    lists = ("files.jsonl", "skipped.jsonl")  # which no row depends on
    return sorted(path for path in corpus.rglob("*") if path.is_file() and path.name not in lists)


def test_a_flipped_bit_is_never_silent(corpus: pathlib.Path) -> None:
    expected = _all_of(corpus)
    silent: dict[str, int] = {}
    for path in _files(corpus):
        content = path.read_bytes()
        every = range(8 * len(content))
        bits = random.Random(path.name).sample(every, min(FLIPS, len(every)))
        with _damaged(path):
            for bit in bits:
                flipped = bytearray(content)
                flipped[bit // 8] ^= 1 << bit % 8
                path.write_bytes(flipped)
                silent[path.suffix] = silent.get(path.suffix, 0) + (not _is_told(corpus, expected, path))
    # Nothing may depend on a bit (a space in JSON, tokens that no row holds); of these files each one counts.
    assert silent.keys() == {".json", ".tiktoken", ".tokens", ".crc32", ".documents", ".rows", ".pieces"}
    assert not any(silent[kind] for kind in (".crc32", ".documents", ".pieces")), silent


DAMAGES: dict[str, Callable[[pathlib.Path], object]] = {
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\x01"),
    "deep": lambda path: path.write_bytes(b"[" * 100_000),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nothing")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_what_was_written_is_named(corpus: pathlib.Path, damage: str) -> None:
    expected = _all_of(corpus)
    for path in _files(corpus):
        with _damaged(path):
            DAMAGES[damage](path)
            told = _is_told(corpus, expected, path)
            assert told or damage == "longer", path
            # Whatever is read by nobody else is looked at by --verify; each problem is one line.
            try:
                found = list(problems(Manifest.load(corpus)))
            except ValueError as error:
                found = [str(error)]
            assert found, path
            assert all(line.splitlines() == [line] for line in found), found


def test_files_that_have_changed_places_are_told(corpus: pathlib.Path) -> None:
    expected = _all_of(corpus)
    pairs = 0
    for path in _files(corpus):
        for other in _files(corpus):
            if path.suffix != other.suffix or path >= other:
                continue
            pairs += 1
            with _damaged(path), _damaged(other):
                content = path.read_bytes()
                path.write_bytes(other.read_bytes())
                other.write_bytes(content)
                assert _is_told(corpus, expected, path, other)
    assert pairs > 12


def test_a_plan_of_another_corpus_or_context_is_told(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Its files fit each other, and not this corpus."""
    shutil.copytree(corpus, tmp_path / "other")
    other = Manifest.load(tmp_path / "other")
    plan_rows(other, CONTEXT * 2)
    for name in ("train-00000.rows", "train-00000.pieces"):
        shutil.copy(plan_folder(other, CONTEXT * 2) / name, plan_folder(other, CONTEXT) / name)
    with pytest.raises(ValueError, match=r"train-00000.rows' (has \d+ bytes|and .* does not match)"):
        BestFitRows(other, "train", CONTEXT)[0]


@pytest.mark.parametrize("name", ["skipped.jsonl", "files.jsonl"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"3\n", b"{}\n", b'{"path": 3, "read": "x"}\n', b"\xff\n", None])
def test_lists_that_hold_no_records_are_told(corpus: pathlib.Path, name: str, content: bytes | None) -> None:
    path = corpus / name
    with _damaged(path):
        if content is None:
            path.unlink()
            path.mkdir()
        else:
            path.write_bytes(content)
        (found,) = problems(Manifest.load(corpus))
        assert name in found
        assert len(found) < 500


def test_a_corpus_of_the_version_before_opens(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Its manifest has no digest and no checksums of .documents; its fingerprint, which runs compare, is the same."""
    shutil.copytree(corpus, tmp_path / "old")
    path = tmp_path / "old" / "manifest.json"
    body = whole.read_json(path) | {"version": 2}
    for split in body["splits"].values():
        for shard in split["shards"]:
            del shard["documents_sha256"]
    path.write_text(json.dumps(body))
    old, new = Manifest.load(path.parent), Manifest.load(corpus)
    assert old.fingerprint == new.fingerprint
    assert list(problems(old)) == []
    np.testing.assert_array_equal(ConcatRows(old, "train", CONTEXT)[0], ConcatRows(new, "train", CONTEXT)[0])
    # Without its digest a manifest of this version is damaged.
    path.write_text(json.dumps(body | {"version": 3}))
    with pytest.raises(ValueError, match="lacks the field 'digest'"):
        Manifest.load(path.parent)


class Stopped(BaseException):
    pass


def _stop(*_: object) -> None:
    raise Stopped


@pytest.mark.parametrize("after", ["the first pass", "the shards"])
def test_a_run_that_goes_on_believes_no_flipped_bit(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """Of what a stopped run has left: the corpus is the same in the end, or the file is named."""
    source = _write_input(tmp_path)

    def run(output: str) -> pathlib.Path:
        return prepare([str(source)], str(tmp_path / output), valid_fraction=0.3, shard_tokens=600).directory

    def bytes_of(directory: pathlib.Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}

    expected = bytes_of(run("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(prepare_lib, "write_splits" if after == "the first pass" else "_list_files", _stop)
        with pytest.raises(Stopped):
            run("out")
    shutil.copytree(tmp_path / "out.partial", tmp_path / "kept")
    kinds = ("*/*.stage", "settings.json") if after == "the first pass" else ("*.json",)
    files = sorted(path.relative_to(tmp_path / "kept") for kind in kinds for path in (tmp_path / "kept").glob(kind))
    told = same = 0
    for name in files:
        content = (tmp_path / "kept" / name).read_bytes()
        for bit in random.Random(str(name.suffix)).sample(range(8 * len(content)), FLIPS // 2):
            for left in ("out", "out.partial"):
                shutil.rmtree(tmp_path / left, ignore_errors=True)
            shutil.copytree(tmp_path / "kept", tmp_path / "out.partial")
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            (tmp_path / "out.partial" / name).write_bytes(flipped)
            try:
                assert bytes_of(run("out")) == expected
                same += 1
            except ValueError as error:
                assert name.name in str(error) or "other settings" in str(error), error  # noqa: PT017
                told += 1
    assert told + same == FLIPS // 2 * len(files)
    assert told if after == "the first pass" else same  # a description is made again, a stage is named


def test_two_plans_of_one_corpus_at_once(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(corpus, tmp_path / "mine")
    manifest = Manifest.load(tmp_path / "mine")
    folder = plan_folder(manifest, CONTEXT)
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    with lock.hold(folder / "lock", "the plan"), pytest.raises(ValueError, match="another process is writing the plan"):
        plan_rows(manifest, CONTEXT)
    (folder / "train-00000.rows.7.partial").write_bytes(b"left by a process that was killed")
    plan_rows(manifest, CONTEXT)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected


def test_a_plan_that_was_stopped_is_none(
    corpus: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(corpus, tmp_path / "mine")
    manifest = Manifest.load(tmp_path / "mine")
    with monkeypatch.context() as patch:
        patch.setattr(packing, "write_sealed", _stop)
        with pytest.raises(Stopped):
            plan_rows(manifest, 48)
    with pytest.raises(ValueError, match="has no best-fit plan for rows of 48"):
        BestFitRows(manifest, "train", 48)
    plan_rows(manifest, 48)
    assert BestFitRows(manifest, "train", 48).problem() is None


@pytest.mark.parametrize("taken", ["a file", "a foreign file", "a foreign folder", "a link to nothing"])
def test_a_plan_takes_the_place_of_nothing_else(corpus: pathlib.Path, tmp_path: pathlib.Path, taken: str) -> None:
    shutil.copytree(corpus, tmp_path / "mine")
    manifest = Manifest.load(tmp_path / "mine")
    folder = plan_folder(manifest, 48)
    match taken:
        case "a file":
            folder.write_text("mine")
        case "a foreign file":
            folder.mkdir()
            (folder / "notes.txt").write_text("mine")
        case "a foreign folder":
            (folder / "plan.json").mkdir(parents=True)
        case "a link to nothing":
            folder.symlink_to("nothing")
    before = sorted(manifest.directory.rglob("*"))
    with pytest.raises(ValueError, match=r"packing-48' .*; move it away"):
        plan_rows(manifest, 48)
    assert sorted(manifest.directory.rglob("*")) == before


PLACES = {
    "notes": (lambda out: (out.mkdir(), (out / "notes.txt").write_text("x")), r"out', which is a folder of something"),
    "a file": (lambda out: out.write_text("x"), r"out', which is a file"),
    "a run": (lambda out: (out / "checkpoints").mkdir(parents=True), r"out', which is a run of launch.train"),
    "a link": (lambda out: out.symlink_to("nothing"), r"out' is a link"),
    "a log": (lambda out: (out.mkdir(), (out / "a.log").write_text("x")), "is not an empty directory"),
    "partial: a file": (lambda out: _partial(out).write_text("x"), r"out.partial', where .* is no folder"),
    "partial: a link": (lambda out: _partial(out).symlink_to(out.parent), r"out.partial', where .* is no folder"),
    "partial: notes": (
        lambda out: (_partial(out).mkdir(), (_partial(out) / "notes.txt").write_text("x")),
        r"out.partial', where .* holds 'notes.txt', which is not its own; nothing was written",
    ),
    "partial: a corpus": (
        lambda out: (_partial(out).mkdir(), (_partial(out) / "manifest.json").write_text("{}")),
        r"out.partial', where .* holds 'manifest.json', which is not its own",
    ),
    "partial: settings of something": (
        lambda out: (_partial(out).mkdir(), (_partial(out) / "settings.json").write_text("[1]")),
        r"settings.json', of an unfinished run, cannot be read",
    ),
}


def _partial(out: pathlib.Path) -> pathlib.Path:
    return out.with_name("out.partial")


@pytest.mark.parametrize("place", PLACES)
def test_a_corpus_takes_the_place_of_nothing_else(tmp_path: pathlib.Path, place: str) -> None:
    source = _write_input(tmp_path)
    make, message = PLACES[place]
    make(tmp_path / "out")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=message):
        prepare([str(source)], str(tmp_path / "out"), valid_fraction=0.3)
    after = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert {path: found for path, found in after.items() if path.name != "lock"} == before
