"""The loop: files it leaves, exact resumption, refusals, signals, and SIGKILL at arbitrary moments."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import helpers
import numpy as np
import pytest
from safetensors.numpy import load_file

import mosaics_jax
from mosaics_jax import loop
from mosaics_jax import train as train_lib
from mosaics_jax.data.corpus import Manifest
from mosaics_jax.data.mixture import Mixture
from mosaics_jax.data.packing import plan_rows
from mosaics_jax.data.source import Batch

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(corpus: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of 8 steps without any trouble."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train_lib.train(helpers.tiny_config(corpus), workdir)
    return workdir


def _records(workdir: pathlib.Path, kind: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def _weights(workdir: pathlib.Path, out: pathlib.Path) -> dict[str, np.ndarray]:
    mosaics_jax.save_safetensors(mosaics_jax.load(workdir)[0], out)
    return load_file(out / "model.safetensors")


def _assert_same_weights(a: pathlib.Path, b: pathlib.Path, tmp_path: pathlib.Path) -> None:
    first, second = _weights(a, tmp_path / "a"), _weights(b, tmp_path / "b")
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_what_a_run_leaves(finished: pathlib.Path) -> None:
    assert sorted(path.name for path in (finished / "checkpoints").iterdir() if path.is_dir()) == ["3", "6", "8"]
    assert (finished / "config.json").is_file()
    assert list((finished / "tensorboard").glob("events*"))
    steps = _records(finished, "train")
    assert [record["step"] for record in steps] == [1, 2, 4, 6, 8]
    last = steps[-1]
    assert last["mfu"] == "unknown"  # a CPU has no published peak
    assert {"loss", "bits_per_byte", "grad_norm", "learning_rate", "tokens_per_second", "delay"} <= last.keys()
    assert 0 <= last["data_wait"] < 1
    for memory in ("short", "long"):
        for name in ("bandwidth", "decay", "log_gate"):
            values = [last[f"health/{memory}/{name}_{which}"] for which in ("min", "mean", "max")]
            assert values == sorted(values)
        assert 0 < last[f"health/{memory}/decay_min"] <= last[f"health/{memory}/decay_max"] <= 1
    evaluations = _records(finished, "eval")
    assert [record["step"] for record in evaluations] == [4, 8]
    assert evaluations[-1]["bits_per_byte"] < evaluations[0]["bits_per_byte"]


def test_a_finished_run_trains_no_more(corpus: pathlib.Path, finished: pathlib.Path) -> None:
    before = len(_records(finished, "train"))
    evaluation = train_lib.train(helpers.tiny_config(corpus), finished)
    assert evaluation["bits_per_byte"] == _records(finished, "eval")[1]["bits_per_byte"]
    assert len(_records(finished, "train")) == before
    assert _records(finished, "resume") == []


def test_resuming_is_exact(corpus: pathlib.Path, finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Everything after step 3 is lost; the same command makes the same weights, reading in another thread or not."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for step in ("6", "8"):
        shutil.rmtree(workdir / "checkpoints" / step)
    (workdir / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()  # what a save that was killed leaves
    train_lib.train(helpers.tiny_config(corpus, **{"data.prefetch": 1, "run.log_every": 1}), workdir)
    assert [record["step"] for record in _records(workdir, "resume")] == [3]
    _assert_same_weights(workdir, finished, tmp_path)
    old = {record["step"]: record["loss"] for record in _records(finished, "train")}
    new = {record["step"]: record["loss"] for record in _records(workdir, "train")[5:]}
    assert new[6] == old[6]
    assert new[8] == old[8]


def test_a_changed_config_is_refused_by_name(corpus: pathlib.Path, finished: pathlib.Path) -> None:
    changed = helpers.tiny_config(corpus, **{"optimizer.peak_learning_rate": 0.5, "model.layers": 3})
    with pytest.raises(ValueError, match=r"model.layers: 2 -> 3; optimizer.peak_learning_rate: 0.01 -> 0.5"):
        train_lib.train(changed, finished)


def test_a_changed_corpus_is_refused(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    helpers.make_corpus(tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"was trained on another corpus .*--config.data.path"):
        train_lib.train(helpers.tiny_config(tmp_path / "corpus"), finished)


def test_a_changed_corpus_that_is_accepted_is_recorded(
    corpus: pathlib.Path, finished: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    helpers.make_corpus(tmp_path, seed=1)
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for step in ("6", "8"):
        shutil.rmtree(workdir / "checkpoints" / step)
    other = helpers.tiny_config(tmp_path / "corpus", **{"data.seed": 7})
    with pytest.raises(ValueError, match=r"data.seed: 0 -> 7"):
        train_lib.train(other, workdir)
    train_lib.train(other, workdir, accept_new_data=True)
    (change,) = _records(workdir, "data_change")
    assert change["step"] == 3
    assert change["changes"][0] == "data.seed: 0 -> 7"
    assert change["changes"][1].startswith("manifest: ")
    record = json.loads((workdir / "config.json").read_text())
    assert record["data_changes"] == [{"step": 3, "changes": change["changes"]}]
    # from now on the new data is the run's own; the old is refused, also where only the old checkpoint is left
    for step in ("6", "8"):
        shutil.rmtree(workdir / "checkpoints" / step)
    train_lib.train(other, workdir)
    with pytest.raises(ValueError, match=r"data.seed: 7 -> 0"):
        train_lib.train(helpers.tiny_config(corpus), workdir)
    assert json.loads((workdir / "config.json").read_text())["data_changes"] == record["data_changes"]


def test_a_mixture_is_trained_evaluated_and_reported(tmp_path: pathlib.Path) -> None:
    for seed, name in enumerate(("stories", "books")):
        helpers.make_corpus(tmp_path / name, seed=seed)
        (tmp_path / name / "corpus").rename(tmp_path / f"{name}_")
        shutil.rmtree(tmp_path / name)
        (tmp_path / f"{name}_").rename(tmp_path / name)
        plan_rows(Manifest.load(tmp_path / name), 32)
    mixture = {"data.mixture": {"stories": 3, "books": 1}, "data.mixture_changes": {"4": {"books": 1}}}
    config = helpers.tiny_config(tmp_path, **mixture, **{"data.packing": "best_fit"})
    train_lib.train(config, tmp_path / "run")
    shares = {record["step"]: record["mixture/stories"] for record in _records(tmp_path / "run", "train")}
    assert shares == {1: 0.75, 2: 0.75, 4: 0.75, 6: 0.5, 8: 0.375}
    evaluation = _records(tmp_path / "run", "eval")[-1]
    parts = [evaluation[f"{name}/loss"] for name in ("stories", "books")]
    assert evaluation["loss"] == pytest.approx(0.75 * parts[0] + 0.25 * parts[1])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["data"]["mixture"] == {
        "stories": 3, "books": 1,
    }  # fmt: skip
    assert mosaics_jax.load(tmp_path / "run")[0] is not None


def test_a_damaged_checkpoint_is_passed_over(
    corpus: pathlib.Path, finished: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "checkpoints" / "8" / "params")
    with pytest.raises(ValueError, match=r"checkpoints/8 cannot be read .*move that directory away"):
        mosaics_jax.load(workdir)
    train_lib.train(helpers.tiny_config(corpus), workdir)
    assert "durable checkpoint 8 is damaged (params/" in capsys.readouterr().out
    assert (workdir / "damaged" / "8" / "optimizer").is_dir()
    assert [record["step"] for record in _records(workdir, "resume")] == [6]
    _assert_same_weights(workdir, finished, tmp_path)


def test_a_vocabulary_too_small_is_refused(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"model.vocabulary is 100, .* --config.model.vocabulary=258 or more"):
        train_lib.train(helpers.tiny_config(corpus, **{"model.vocabulary": 100}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_workdirs_without_a_run(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        mosaics_jax.load(tmp_path)


def test_too_many_bad_steps_stop_the_run(
    corpus: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.batches

    def spoiled(*args: Any, **kwargs: Any):
        for number, batch in enumerate(real(*args, **kwargs)):
            bad = isinstance(args[0], Mixture) and number >= 2
            yield Batch(*batch[:-1], np.full_like(batch.weight, np.nan)) if bad else batch

    monkeypatch.setattr(loop, "batches", spoiled)
    with pytest.raises(
        train_lib.TrainingStopped, match=r"steps 3 to 5 were all skipped, the last for this: not finite"
    ):
        train_lib.train(helpers.tiny_config(corpus, **{"run.max_skipped": 3, "run.log_every": 1}), tmp_path / "run")
    assert [record["skipped"] for record in _records(tmp_path / "run", "train")] == [0, 0, 1, 2]


def _start(config: Any, workdir: pathlib.Path) -> subprocess.Popen:
    """The command in a process group of its own; what it prints goes to `workdir`.log."""
    command = [sys.executable, "-m", "launch.train", f"--workdir={workdir}", *helpers.command_line(config)]
    with open(workdir.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def _finish(process: subprocess.Popen, workdir: pathlib.Path, expected: int = 0) -> str:
    """Waits for the end; returns what all its lives printed."""
    code = process.wait(timeout=300)
    log = workdir.with_suffix(".log").read_text()
    assert code == expected, log
    return log


def _wait_for_step(workdir: pathlib.Path, step: int, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if process.poll() is not None:
            raise AssertionError(f"ended early: {workdir.with_suffix('.log').read_text()}")
        if (workdir / "metrics.jsonl").exists() and any(r.get("step", 0) >= step for r in _complete_records(workdir)):
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} within a minute")


def _complete_records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    lines = (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = helpers.tiny_config(corpus, **{"run.steps": 100000, "run.log_every": 1, "checkpoint.every": 100000})
    process = _start(config, tmp_path / "run")
    _wait_for_step(tmp_path / "run", 5, process)
    process.send_signal(signal.SIGTERM)
    log = _finish(process, tmp_path / "run", 75)  # a scheduler can tell it from a run that is done
    assert "SIGTERM: saved step" in log
    assert "Traceback" not in log
    assert [path.name.isdigit() for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir()] == [True]


@pytest.mark.slow
def test_killed_three_times_the_weights_are_bit_identical(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """SIGKILL of the whole process group at random moments, with data workers, in steps, saves and start-up alike."""
    config = helpers.tiny_config(
        corpus, **{"run.steps": 400, "checkpoint.every": 20, "data.workers": 2, "run.eval_every": 400}
    )
    _finish(_start(config, tmp_path / "calm"), tmp_path / "calm")
    draw = random.Random(0)
    for kill in range(3):
        process = _start(config, tmp_path / "killed")
        # After some progress beyond the last life's, plus a random moment: not aligned with steps or saves. By step 42
        # the save of step 40 has begun, which waits for that of step 20: there is something to resume from.
        _wait_for_step(tmp_path / "killed", 100 * kill + 42, process)
        time.sleep(draw.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    _finish(_start(config, tmp_path / "killed"), tmp_path / "killed")
    assert len(_records(tmp_path / "killed", "resume")) == 3
    _assert_same_weights(tmp_path / "calm", tmp_path / "killed", tmp_path)
