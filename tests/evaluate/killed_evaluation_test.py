"""launch.evaluate, killed at any moment, ends with the same bytes; of other weights it asks all again."""

import pathlib
import shutil
import subprocess
import sys
import time

import helpers
import pytest

from mosaics_jax.train import train

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = ["--suite=perplexity", "--lengths=16,32,48,64", "--count=4", "--batch_tokens=32"]


@pytest.fixture(scope="module")
def workdir(corpus: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("killed") / "run"
    train(helpers.tiny_config(corpus, **{"run.steps": 4, "checkpoint.every": 2}), folder)
    return folder


def _start(workdir: pathlib.Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.evaluate", f"--workdir={workdir}", *FLAGS]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _evaluate(workdir: pathlib.Path) -> dict[str, bytes]:
    """What lies there afterwards, by name."""
    process = _start(workdir)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    folder = workdir / "evaluations" / "4"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_killed_it_goes_on_and_ends_alike(workdir: pathlib.Path) -> None:
    expected = _evaluate(workdir)
    assert {"perplexity.jsonl", "perplexity.json", "perplexity.md", "perplexity_context.png"} <= expected.keys()
    shutil.rmtree(workdir / "evaluations")
    answers = workdir / "evaluations" / "4" / "perplexity.jsonl"
    for moment in (1, 6, 11, 16, "json"):
        process = _start(workdir)
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            done = answers.read_bytes().count(b"\n") if answers.exists() else 0
            if done >= moment if isinstance(moment, int) else answers.with_suffix(".json").exists():
                break
            time.sleep(0.002)
        process.kill()
        process.communicate()
    (answers.parent / "perplexity.json.1.partial").touch()  # as of a life that was killed as it wrote
    found = _evaluate(workdir)
    assert sorted(found.pop("perplexity.jsonl").splitlines()) == sorted(expected.pop("perplexity.jsonl").splitlines())
    assert found == expected


@pytest.mark.slow
def test_other_weights_of_the_same_step_are_asked_again(workdir: pathlib.Path) -> None:
    before = _evaluate(workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    shutil.copytree(workdir / "checkpoints" / "2", workdir / "checkpoints" / "4")  # as if it were trained anew
    after = _evaluate(workdir)
    lines = after["perplexity.jsonl"].splitlines()
    count = len(before["perplexity.jsonl"].splitlines())
    assert lines[:count] == before["perplexity.jsonl"].splitlines(), "what was answered stays"
    assert len(lines) == 2 * count
    assert after["perplexity.json"] != before["perplexity.json"]
