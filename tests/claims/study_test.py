"""Questions are scored as they must be; a study trains and asks once, and is refused in one line."""

import dataclasses
import json
import pathlib
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from oracles import TOKENIZER, Scripted

from mosaics_jax.claims import episodes, extension, study, tables
from mosaics_jax.claims.episodes import TASKS
from mosaics_jax.claims.questions import Questions, accuracy
from mosaics_jax.evaluate import suite
from mosaics_jax.lock import HeldError

ROOT = pathlib.Path(__file__).parents[2]


def _answered(name: str, loss) -> dict[int, list[float]]:
    questions = Questions(TASKS[name], TOKENIZER)
    examples = list(questions.examples())
    assert len(examples) == len(questions) == len({example.key for example in examples})
    records = []
    for example in examples:
        records += questions.answer(Scripted(loss=lambda row, e=example: loss(e)), [example])
    return accuracy(records)


@pytest.mark.parametrize("name", TASKS)
def test_scores_of_scripted_models(name: str) -> None:
    def at_answers(example: suite.Example, right: float, rest: float, spare_the_last: bool = False) -> np.ndarray:
        ids, answers = example.payload
        loss_T = np.full(len(ids) - 1, rest)
        for answer in answers:
            assert TOKENIZER.decode(ids[1:][answer.start : answer.stop]) not in "\n "
            loss_T[answer.start : answer.stop - spare_the_last] = right
        return loss_T

    all_x = set(TASKS[name].asked) if name != "classification" else set(TASKS[name].scored)
    for loss, score in [
        (lambda example: at_answers(example, 0.0, 9.0), 1.0),  # knows the answers and nothing else
        (lambda example: at_answers(example, 9.0, 0.0), 0.0),  # knows all but them
        (lambda example: at_answers(example, 0.0, 9.0, spare_the_last=True), 0.0),  # never the whole answer
    ]:
        found = _answered(name, loss)
        assert set(found) == all_x
        assert {value for values in found.values() for value in values} == {score}


SMALL = {
    "run.steps": 6, "run.eval_every": 6, "run.eval_batches": 4, "optimizer.warmup_steps": 1, "model.width": 32,
    "model.ffn_width": 64, "data.batch": 2, "checkpoint.steps": (1, 2),
}  # fmt: skip


@pytest.mark.slow
def test_a_study_trains_and_asks_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    one = study.Study(
        "recall_one_layer", tmp_path, seeds=2, variants=("mosaic", "transformer"), rates=(1e-3, 1e-2), changes=SMALL,
        say=said.append,
    )  # fmt: skip
    made = tables.make(one, one.run())
    assert sum("bits per byte" in line for line in said) == 2 * (2 + 1)  # a run a rate, and the other seed at the best
    sizes, whole, removed = made.tables
    assert [row[0] for row in sizes.rows] == [row[0] for row in whole.rows] == ["mosaic", "transformer"]
    assert [row[0] for row in removed.rows] == ["mosaic"]
    assert len(whole.columns) == 1 + len(TASKS["recall"].asked)
    assert [series["label"] for series in made.figures[0].data["series"]] == ["mosaic", "transformer"]

    monkeypatch.setattr(study, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(Questions, "answer", lambda *_: pytest.fail("asked again"))
    assert tables.make(one, one.run()).tables == made.tables

    best = next(iter(one.run().values())).runs[0].run
    checkpoints = one.folder(best) / "checkpoints"
    shutil.rmtree(checkpoints / "6")
    shutil.copytree(checkpoints / "2", checkpoints / "6")  # as if it were trained anew
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        one.run()


def test_a_workdir_has_one_writer_and_is_nothing_else(tmp_path: pathlib.Path) -> None:
    with study.writing(tmp_path / "new"), pytest.raises(HeldError), study.writing(tmp_path / "new"):
        pass
    study.Study("recall", tmp_path / "new", changes=SMALL, say=lambda _: None)._claim()
    with study.writing(tmp_path / "new"):
        pass
    for mark in ("manifest.json", "metrics.jsonl", "thesis.tex"):
        (tmp_path / mark).mkdir()
        (tmp_path / mark / mark).touch()
        with pytest.raises(ValueError, match="nothing was written"), study.writing(tmp_path / mark):
            pass
        assert [path.name for path in (tmp_path / mark).iterdir()] == [mark]


@pytest.mark.parametrize("content", [b"", b"{", b"3", b"[" * 100_000, b"\xff", b"{}", b'{"budget": "cpu"}'])
def test_a_damaged_claims_file_is_one_line(content: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / "claims.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"claims.json' is damaged \(.*\); take another --workdir"):
        study.Study("recall", tmp_path, changes=SMALL, say=lambda _: None)._claim()


def test_a_claims_file_of_an_older_version_is_read(tmp_path: pathlib.Path) -> None:
    (tmp_path / "claims.json").write_text('{"budget": "cpu", "times": "1", "text": "python"}\n')
    study.Study("recall", tmp_path, changes=SMALL, say=lambda _: None)._claim()


def test_a_workdir_is_of_one_size_and_text(tmp_path: pathlib.Path) -> None:
    one = study.Study("recall", tmp_path, changes=SMALL, say=lambda _: None)
    one.prepare()
    one.prepare()
    for change in ({"budget": "gpu"}, {"text": ("books.jsonl",)}, {"times": 2}):
        with pytest.raises(ValueError, match="is of --budget=cpu --times=1 --text=python; legal: the same here, or"):
            dataclasses.replace(one, **change).prepare()


@pytest.mark.long
def test_an_extension_goes_on_from_what_was_trained_short(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After no mini-batch it answers what its parent does; text is read at eight times the training length."""
    monkeypatch.setattr(episodes.Facts, "episodes", 2)
    draw = random.Random(0)
    with open(tmp_path / "text.jsonl", "w", encoding="ascii") as file:
        for _ in range(60):
            file.write(json.dumps({"text": "".join(draw.choices("abcdefgh \n", k=4200))}) + "\n")
    said: list[str] = []
    one = extension.Extension(
        "extension", tmp_path, seeds=1, variants=("mosaic",), rates=(1e-2,), changes=SMALL, say=said.append,
        text=(str(tmp_path / "text.jsonl"),),
    )  # fmt: skip
    (trained,) = one.run().values()
    answers = trained.runs[0].whole
    assert [set(by_step) for by_step in answers.values()] == [{0, 1, 2, 6}] * len(TASKS["long_facts"].asked)
    assert (tmp_path / "runs/extension/mosaic/0.001-seed0/answers/0/long_facts.jsonl").is_file()
    run = json.loads((tmp_path / "runs/extension/mosaic/0.001-seed0/config.json").read_text())["config"]
    assert run["init_from"] == str(tmp_path / "runs/language/mosaic/0.01-seed0")

    parents = one.parents
    made = tables.make(parents, parents.run())
    assert {figure.name for figure in made.figures} == {
        "language_facts", "language_text_by_context", "language_text_by_position", "language_weight_by_distance",
    }  # fmt: skip
    by_context = next(table for table in made.tables if "same last" in table.title)
    assert by_context.columns[1:] == [f"{512 * times:,} bytes of context" for times in (1, 2, 4, 8)]
    assert sum("bits per byte" in line for line in said) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: --workdir is not set; legal: a directory"),
        (
            ["--workdir=w", "--suite=recal"],
            "error: --suite has 'recal'; legal: language, classification",
        ),
        (["--workdir=w", "--variants=v1"], "error: --variants has 'v1'; legal: mosaic, transformer"),
        (["--workdir=w", "--variants="], "error: --variants is empty; legal: one or more of mosaic"),
        (["--workdir=w", "--times=0"], "error: --times is 0; legal: 1 to 999"),
        (["--workdir=w", "--seeds=0"], "error: --seeds is 0; legal: 1 or more"),
        (["--workdir=w", "--budget=tpu"], "error: flag --budget=tpu: value should be one of <cpu|gpu>"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "launch.claims", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(message)
