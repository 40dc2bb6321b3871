"""A run that starts from another's weights: what it takes over, what is new, what is refused; a context of 32,768."""

import json
import pathlib
import re
import resource
import shutil
import subprocess
import sys

import helpers
import pytest

from mosaics_jax.config import Config, load_config
from mosaics_jax.data.prepare import prepare
from mosaics_jax.train import train

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = str(ROOT / "configs" / "extend_32k.py")


@pytest.fixture(scope="module")
def first(corpus, tmp_path_factory):
    """A run at context 32, and its last evaluation."""
    workdir = tmp_path_factory.mktemp("first") / "run"
    found = train(helpers.tiny_config(corpus, **{"run.steps": 4}), workdir)
    return workdir, found


def _records(workdir: pathlib.Path, kind: str) -> dict[int, dict]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if line["kind"] == kind}


def _extended(corpus, first, **changes):
    changes = {"run.eval_steps": (0, 1), "optimizer.warmup_steps": 0, "data.context": 32} | changes
    return helpers.tiny_config(corpus, init_from=str(first[0]), **changes)


@pytest.fixture(scope="module")
def extended(corpus, first, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("extended") / "run"
    changes = {"checkpoint.keep": 1, "checkpoint.every": 3, "checkpoint.steps": (1, 2)}
    return workdir, train(_extended(corpus, first, **changes), workdir)


def test_it_begins_where_the_other_ended(first, extended):
    evaluations = _records(extended[0], "eval")
    assert set(evaluations) == {0, 1, 4, 8}
    assert evaluations[0]["loss"] == first[1]["loss"]
    assert evaluations[1]["loss"] != first[1]["loss"]


def test_optimiser_and_schedule_are_new(extended):
    steps = _records(extended[0], "train")
    assert steps[2]["learning_rate"] == pytest.approx(1e-2, rel=0.1), "of the second step: the peak stood at the first"
    assert steps[8]["learning_rate"] < 2e-3


def test_chosen_steps_are_kept(extended):
    kept = {int(path.name) for path in (extended[0] / "checkpoints").iterdir() if path.name.isdecimal()}
    assert kept == {1, 2, 8}


def test_it_goes_on_without_the_other(corpus, first, extended, tmp_path):
    """Saved at step 3 and gone on without the run it began from, it ends as the undisturbed one."""
    other = tmp_path / "first"
    shutil.copytree(first[0], other)
    config = _extended(corpus, (other, None), **{"checkpoint.every": 3})
    values = config.to_dict()
    values["run"] |= {"steps": 8}
    workdir = tmp_path / "run"
    train(config, workdir)
    for step in (6, 8):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    shutil.rmtree(other)
    assert train(config, workdir)["loss"] == extended[1]["loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers": 3}, r"whose model is another; legal: --config.model.layers=2 \(not 3\)"),
        ({"init_from": "nowhere"}, "nowhere holds no run"),
    ],
)
def test_refused_before_anything_is_made(changes, message, corpus, first, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(_extended(corpus, first).from_dict(_with(_extended(corpus, first), changes)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _with(config: Config, changes: dict) -> dict:
    values = config.to_dict()
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        (values[section] if section else values)[field] = value
    return values


def test_another_tokenizer_is_refused(corpus, first, tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} a key and a value " * 9)
    prepare([str(tmp_path / "text")], str(tmp_path / "corpus"), tokenizer="bpe:258", valid_fraction=0.5)
    with pytest.raises(ValueError, match="whose tokenizer is not the corpus's; prepare the corpus with --tokenizer="):
        train(_extended(tmp_path / "corpus", first), tmp_path / "run")


def test_recipes():
    with pytest.raises(ValueError, match=r"no recipe 'large,8'; legal: tiny; small,8; .*large,1024"):
        _recipe("large,8")
    for which in ("small,64", "large,256", "large,1024"):
        config = Config.from_config_dict(_recipe(which))
        assert config.data.context == 32768
        assert config.data.batch * config.data.context == 1024 * 4096
        assert config.mesh.data * config.mesh.fsdp * config.mesh.sequence in (
            int(which.split(",")[1]),
            -64 * 4,
            -16 * 4,
        )


def _recipe(which: str):
    import importlib

    assert load_config(CONFIG)
    return importlib.import_module("configs.extend_32k").get_config(which)


@pytest.mark.long
def test_32k_on_a_cpu_needs_memory_that_grows_with_the_context_alone(tmp_path):
    """One head's T x T scores alone would be 4 GiB; the run trains two steps, and all of it stays below."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(12):
        (text / f"{number}.txt").write_text(f"{number} the memory reads a key. " * 1600)
    prepare([str(text)], str(tmp_path / "corpus"), valid_fraction=0.4)

    def run(workdir: str, *flags: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "launch.train", *flags, f"--workdir={tmp_path / workdir}",
             "--config.run.eval_batches=1", "--config.model.layers=1", f"--config.data.path={tmp_path / 'corpus'}"],
            cwd=ROOT, check=True, env=helpers.OPTIMISED,
        )  # fmt: skip

    run("short", "--config=configs/tiny.py", "--config.run.steps=2", "--config.optimizer.warmup_steps=0")
    run(
        "long", "--config=configs/extend_32k.py:tiny", f"--config.init_from={tmp_path / 'short'}",
        "--config.run.steps=2", "--config.run.eval_steps=(1,)",
    )  # fmt: skip
    assert set(_records(tmp_path / "long", "eval")) == {1, 2}
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak < 4 * 2**30, f"{peak / 2**30:.2f} GiB"
    assert re.search("32,768|32768", (tmp_path / "long" / "config.json").read_text())
