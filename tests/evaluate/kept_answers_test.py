"""Answers on the disk are of the model that gave them, and what is damaged is told and asked again."""

import json
import pathlib
import random

import pytest
from oracles import Scripted

from mosaics_jax import place
from mosaics_jax.evaluate import suite
from mosaics_jax.evaluate.answers import Answers
from mosaics_jax.lock import HeldError

DEEP = "[" * 100_000


class Squares:
    """Is asked for squares, two at a time."""

    name = "squares"

    def __init__(self, count: int = 6):
        self._count, self.asked = count, []

    def __len__(self) -> int:
        return self._count

    def examples(self):
        for number in range(self._count):
            yield suite.Example(str(number), 1, number)

    def answer(self, model, batch):
        self.asked += [example.payload for example in batch]
        return [{"square": example.payload**2, "by": model.identity} for example in batch]


def _model(identity: str = "one") -> Scripted:
    model = Scripted()
    model.identity = identity
    return model


def _ask(directory: pathlib.Path, identity: str = "one") -> tuple[list, list[int]]:
    """The records, and what had to be asked for them."""
    squares = Squares()
    return suite.answers(squares, _model(identity), directory), squares.asked


def _lines(directory: pathlib.Path) -> list[bytes]:
    return (directory / "squares.jsonl").read_bytes().splitlines(keepends=True)


def test_answers_are_of_the_model_that_gave_them(tmp_path):
    first, asked = _ask(tmp_path)
    assert asked == [*range(6)]
    before = _lines(tmp_path)
    other, asked = _ask(tmp_path, "other")
    assert asked == [*range(6)]
    assert {record["by"] for record in other} == {"other"}
    assert _lines(tmp_path)[:6] == before, "what was answered stays"
    assert _ask(tmp_path) == (first, [])
    assert _ask(tmp_path, "other") == (other, [])
    assert suite.answered(Squares(), "one", tmp_path) == first
    assert suite.answered(Squares(), "third", tmp_path) is None


def test_lines_that_do_not_say_whose_they_are_stay_and_are_not_used(tmp_path, capsys):
    older = json.dumps({"key": "2", "record": {"square": 5, "by": "nobody"}}) + "\n"
    (tmp_path / "squares.jsonl").write_text(older)
    found, asked = _ask(tmp_path)
    assert found[2]["square"] == 4
    assert asked == [*range(6)]
    assert _lines(tmp_path)[0] == older.encode()
    assert not capsys.readouterr().err


def test_every_flipped_bit_is_found(tmp_path):
    whole, _ = _ask(tmp_path)
    path = tmp_path / "squares.jsonl"
    content = path.read_bytes()
    place = content.index(b"\n") + 1
    second = range(8 * place, 8 * content.index(b"\n", place) + 8)
    for bit in second:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        known = Answers(path, "one").known
        assert known.items() <= {str(n): record for n, record in enumerate(whole)}.items(), bit
        assert len(known) >= 4, "the lines around it are used"
        assert "1" not in known


@pytest.mark.parametrize(
    "line",
    [b"{}", b"3", b"\x80\xff", DEEP.encode(), b'{"key": "1", "of": "one", "record": {"square": 7}}',
     b'{"key": "1", "of": "one", "record": {"square": 7}, "digest": "0"}'],
    ids=["empty", "number", "binary", "deep", "no digest", "another digest"],
)  # fmt: skip
def test_a_damaged_line_is_told_and_asked_again(line, tmp_path, capsys):
    whole, _ = _ask(tmp_path)
    lines = _lines(tmp_path)
    (tmp_path / "squares.jsonl").write_bytes(b"".join([lines[0], line, b"\n", *lines[2:]]))
    capsys.readouterr()
    assert _ask(tmp_path) == (whole, [1])
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith("squares.jsonl': 1 damaged line is not used, and asked again")
    assert _lines(tmp_path)[1] == line + b"\n", "nothing is removed"
    assert _ask(tmp_path) == (whole, [])


def test_a_folder_in_its_place_is_no_answer(tmp_path):
    (tmp_path / "squares.jsonl").mkdir()
    with pytest.raises(IsADirectoryError, match=r"squares.jsonl"):
        _ask(tmp_path)


def test_a_disk_that_refuses_is_named_and_the_rest_goes_on(tmp_path, monkeypatch):
    whole, _ = _ask(tmp_path / "whole")
    squares = Squares()
    real = Answers._append

    def full(self, records):
        if "4" in records:
            raise OSError(28, "No space left on device", str(self._path))
        real(self, records)

    with monkeypatch.context() as patch:
        patch.setattr(Answers, "_append", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*squares.jsonl'"):
            suite.answers(squares, _model(), tmp_path / "full")
    found, asked = _ask(tmp_path / "full")
    assert found == whole
    assert asked == [3, 4, 5], "in batches of three"


def test_half_a_line_is_taken_away_and_no_more(tmp_path):
    whole, _ = _ask(tmp_path)
    lines = _lines(tmp_path)
    for size in random.Random(0).sample(range(len(lines[3])), 8):
        (tmp_path / "squares.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:size])
        assert _ask(tmp_path) == (whole, [3, 4, 5])
        assert _lines(tmp_path) == lines


def test_what_a_record_says_beside_the_answer_is_in_its_key():
    assert suite.digest("prompt") == suite.digest("prompt")
    assert len({suite.digest("prompt"), suite.digest("prompt", "red"), suite.digest("prompt", ["red"])}) == 3


def test_evaluations_have_one_writer_and_a_place_of_their_own(tmp_path):
    from mosaics_jax.evaluate import run

    run_, other = tmp_path / "run", tmp_path / "other"
    (run_ / "checkpoints").mkdir(parents=True)
    with run.writing(run_), pytest.raises(HeldError, match="another process is writing"), run.writing(run_):
        pass
    assert place.kind_of(run_ / "evaluations") == place.EMPTY
    (run_ / "evaluations" / "4").mkdir()
    with run.writing(run_):
        pass
    (run_ / "evaluations" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="which is a folder of something else; nothing was written"), run.writing(run_):
        pass
    other.mkdir()
    (other / "checkpoints").mkdir()
    (other / "evaluations").touch()
    with pytest.raises(ValueError, match="evaluations', which is a file; nothing was written"), run.writing(other):
        pass
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "manifest.json").touch()
    with pytest.raises(ValueError, match="which is a corpus of"), run.writing(tmp_path / "corpus"):
        pass
    assert not (tmp_path / "corpus" / "evaluations").exists()
