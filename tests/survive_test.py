"""What a run survives by itself: damaged checkpoints, spikes, hangs, full disks; and what it says of its time."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaics_jax import checkpoint, compilation, fingerprint, goodput, integrity, loop, step
from mosaics_jax.checkpoint import Checkpoints, SaveFailed
from mosaics_jax.config import CheckpointConfig, RunConfig
from mosaics_jax.train import train

ROOT = pathlib.Path(__file__).parent.parent


def _records(workdir: pathlib.Path, kind: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def _fingerprints(workdir: pathlib.Path, at: int) -> dict[str, dict[str, int]]:
    return json.loads((workdir / "checkpoints" / str(at) / "verified.json").read_text())["fingerprints"]


@pytest.fixture(scope="module")
def finished(corpus: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of 8 steps, saved at 3, 6 and 8."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(helpers.tiny_config(corpus), workdir)
    return workdir


# Fingerprints.


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [np.float32, np.int32, jnp.bfloat16])
def test_a_fingerprint_is_the_same_on_the_device_and_the_host(shape: tuple[int, ...], dtype: Any) -> None:
    array = np.asarray(np.random.default_rng(0).normal(size=shape) * 100, dtype)
    (found,) = jax.jit(fingerprint.of_tree)({"x": array}).values()
    assert int(found) == fingerprint.of_numpy(array)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(place=st.integers(0, 59), bit=st.integers(0, 31))
def test_any_single_bit_shows(place: int, bit: int) -> None:
    array = np.random.default_rng(1).normal(size=(3, 4, 5)).astype(np.float32)
    flipped = array.copy()
    flipped.view(np.uint32).reshape(-1)[place] ^= np.uint32(1 << bit)
    assert fingerprint.of_numpy(flipped) != fingerprint.of_numpy(array)


def test_two_numbers_that_change_places_show() -> None:
    array = np.arange(60, dtype=np.float32).reshape(3, 20)
    swapped = array.copy()
    swapped[[0, 2]] = swapped[[2, 0]]
    assert fingerprint.of_numpy(swapped) != fingerprint.of_numpy(array)


def test_what_was_saved_is_what_the_fingerprints_say(finished: pathlib.Path) -> None:
    prints = _fingerprints(finished, 8)
    assert prints.keys() == {"params", "optimizer", "counters"}
    item = finished / "checkpoints" / "8" / "params"
    assert integrity.read(item, slice(None)) == prints["params"]
    saves = _records(finished, "save")
    assert [save["step"] for save in saves] == [3, 6, 8]
    for save in saves:
        assert 0 < save["blocking"] <= save["seconds"]
        assert save["problem"] == ""


# Damage: every file of a checkpoint, in every way.


def _files(workdir: pathlib.Path) -> list[str]:
    folder = workdir / "checkpoints" / "8"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_any_file_that_is_damaged_is_found(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    files = [name for name in _files(finished) if name != "verified.json"]
    assert len(files) > 10
    shutil.copytree(finished, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.problem(8) == ""
    for name in files:
        path = tmp_path / "run" / "checkpoints" / "8" / name
        content = path.read_bytes()
        changed = bytearray(content or b"x")
        changed[len(changed) // 2] ^= 16
        for spoilt in (bytes(changed), content[: len(content) // 2] if content else b"more", None):
            path.unlink() if spoilt is None else path.write_bytes(spoilt)
            assert name in checkpoints.problem(8), (name, spoilt)
            path.write_bytes(content)
    assert checkpoints.problem(8) == ""
    checkpoints.close()


def test_a_checkpoint_that_nobody_verified_is_read_array_by_array(
    finished: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "8"
    (folder / "verified.json").unlink()
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.problem(8) == ""
    for path in (folder / "optimizer").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-9])
    assert checkpoints.problem(8) != ""
    checkpoints.close()


def test_where_all_are_damaged_the_run_begins_anew_and_ends_the_same(
    corpus: pathlib.Path, finished: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    for at in (3, 6, 8):
        (tmp_path / "run" / "checkpoints" / str(at) / "params" / "manifest.ocdbt").unlink()
    train(helpers.tiny_config(corpus), tmp_path / "run")
    assert capsys.readouterr().out.count("is damaged") == 3
    assert sorted(path.name for path in (tmp_path / "run" / "damaged").iterdir()) == ["3", "6", "8"]
    assert _fingerprints(tmp_path / "run", 8) == _fingerprints(finished, 8)


def test_what_goes_to_disk_wrong_is_never_kept_as_good(
    corpus: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A disk that writes something else: here what is read back after the commit of step 6 is not what was saved."""
    real = integrity.read
    monkeypatch.setattr(
        integrity,
        "read",
        lambda item, part: {name: value ^ (item.parent.name == "6") for name, value in real(item, part).items()},
    )
    train(helpers.tiny_config(corpus), tmp_path / "run")
    assert "checkpoint 6: it is not on the disk what it was, and set aside: " in capsys.readouterr().out
    assert [path.name.split("-")[0] for path in (tmp_path / "run" / "damaged").iterdir()] == ["6"]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["3", "8"]


# Which checkpoints go.


@pytest.mark.parametrize(
    ("steps", "verified", "settings", "gone"),
    [
        ([1, 2, 3, 4], {1: 0, 2: 0, 3: 0, 4: 0}, {"keep": 2}, [1, 2]),
        ([1, 2, 3, 4], {1: 0, 2: 0}, {"keep": 2}, []),  # the newest are not verified: nothing newer than good ones goes
        ([1, 2, 3, 4], {4: 0}, {"keep": 2}, []),  # fewer good ones than are to be kept
        ([1, 2, 3, 4], {1: 0, 3: 0, 4: 0}, {"keep": 2}, [1, 2]),
        ([10, 15, 20, 25, 30], dict.fromkeys([10, 15, 20, 25, 30], 0), {"keep": 1, "keep_every": 10}, [15, 25]),
        ([1, 2, 3, 4], dict.fromkeys([1, 2, 3, 4], 0), {"keep": 1, "steps": (2,)}, [1, 3]),
        ([1, 2, 3, 4], {1: 0, 2: 1800, 3: 3600, 4: 5400}, {"keep": 1, "keep_hours": 1.0}, [2]),
        ([1, 2, 3, 4], {1: 9e9, 2: 0, 3: 1800, 4: 5400}, {"keep": 1, "keep_hours": 1.0}, [3]),  # a clock set back
        ([], {}, {"keep": 1}, []),
    ],
)
def test_what_is_retired(steps: list[int], verified: dict[int, float], settings: dict, gone: list[int]) -> None:
    assert checkpoint.retired(steps, verified, CheckpointConfig(**settings)) == gone


def test_a_save_that_fails_ends_the_run_at_the_next_step(
    corpus: pathlib.Path, finished: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Checkpoints._wait_for_orbax

    def full(self: Checkpoints) -> float:
        when = real(self)
        if (tmp_path / "run" / "checkpoints" / "6").exists():
            raise OSError(28, "No space left on device")
        return when

    monkeypatch.setattr(Checkpoints, "_wait_for_orbax", full)
    with pytest.raises(SaveFailed, match=r"checkpoint 6 could not be saved in .*No space left .*goes on from step 3"):
        train(helpers.tiny_config(corpus), tmp_path / "run")
    monkeypatch.undo()
    assert [record["why"] for record in _records(tmp_path / "run", "end")] == ["failed"]
    train(helpers.tiny_config(corpus), tmp_path / "run")
    assert _fingerprints(tmp_path / "run", 8) == _fingerprints(finished, 8)


# The local tier.


def test_the_local_tier_is_gone_on_from_and_passed_over_where_it_is_damaged(
    corpus: pathlib.Path, finished: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    config = helpers.tiny_config(
        corpus, **{"checkpoint.local_dir": str(tmp_path / "disk"), "checkpoint.local_every": 1, "checkpoint.keep": 9}
    )
    workdir = tmp_path / "run"
    train(config, workdir)
    (folder,) = (tmp_path / "disk").glob("run-*/process-0-of-1")
    assert sorted(path.name for path in folder.iterdir()) == ["5.safetensors", "7.safetensors"]
    for at in ("6", "8"):
        shutil.rmtree(workdir / "checkpoints" / at)
    train(config, workdir)
    assert [(record["step"], record["tier"]) for record in _records(workdir, "resume")] == [(7, "local")]
    assert _fingerprints(workdir, 8) == _fingerprints(finished, 8)

    shutil.rmtree(workdir / "checkpoints" / "8")
    newest = folder / "7.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    capsys.readouterr()
    train(config, workdir)
    assert "local checkpoint 7 is damaged" in capsys.readouterr().out
    assert [(record["step"], record["tier"]) for record in _records(workdir, "resume")][1:] == [(5, "local")]
    assert _fingerprints(workdir, 8) == _fingerprints(finished, 8)


# Bad steps.


def test_a_spike_is_skipped_by_six_sigma_and_only_once_enough_is_known() -> None:
    recent = np.stack([2 + 0.1 * np.sin(np.arange(128)), 1 + 0.01 * np.cos(np.arange(128))]).astype(np.float32)
    limits = recent.mean(1) + 6 * recent.std(1)
    skip = jax.jit(step._skip, static_argnums=2)
    for measured, expected in [
        ((limits[0] - 0.01, limits[1] - 0.001), ""),
        ((limits[0] + 0.01, limits[1] - 0.001), "loss spike"),
        ((limits[0] - 0.01, limits[1] + 0.001), "gradient norm spike"),
        ((np.nan, 1), "not finite"),
        ((2, np.inf), "not finite"),
        ((-1e9, 0), ""),  # downwards nothing is a spike
    ]:
        reason, found = skip(jnp.asarray(measured, jnp.float32), recent, 6.0)
        assert step.SKIPPED[int(reason)] == expected
        np.testing.assert_allclose(found, limits, rtol=1e-5)
    few = recent.copy()
    few[:, -1] = np.nan  # the ring is not full
    assert int(skip(jnp.asarray([1e9, 1e9]), few, 6.0)[0]) == 0
    assert int(skip(jnp.asarray([1e9, 1e9]), recent, 0.0)[0]) == 0  # off


def test_a_skipped_step_is_told_with_its_rows(
    corpus: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.batches

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        for number, batch in enumerate(real(*args, **kwargs)):
            bad = "start_batch" in kwargs and number == 4
            yield batch._replace(weight=np.full_like(batch.weight, np.inf)) if bad else batch

    monkeypatch.setattr(loop, "batches", spoiled)
    train(helpers.tiny_config(corpus), tmp_path / "run")
    (skip,) = _records(tmp_path / "run", "skip")
    assert (skip["step"], skip["why"], skip["rows"]) == (5, "not finite", [16, 19])
    assert len(skip["places"]) == 4
    assert all(name == "" and index >= 0 for name, index in skip["places"])
    assert _records(tmp_path / "run", "train")[-1]["skipped"] == 1


# The watchdog.

_HANGS = """
import pathlib, sys, time
from mosaics_jax.config import RunConfig
from mosaics_jax.watchdog import Watchdog
def a_collective_that_never_ends():
    time.sleep(60)
config = RunConfig(watchdog_seconds=0.4, watchdog_factor=3, watchdog_phase_seconds=2)
dog = Watchdog(pathlib.Path(sys.argv[1]), config, 0, 1)
dog.start()
dog.begin(5)
with dog.phase("compile"):
    time.sleep(0.8)  # more than a step may take, less than a phase
for number in range(6, 9):
    time.sleep(0.05)
    dog.step(number)
if sys.argv[2] == "hang":
    a_collective_that_never_ends()
dog.stop()
"""


@pytest.mark.parametrize("ends", ["hang", "stop"])
def test_a_step_that_does_not_end_ends_the_process_with_its_stacks(ends: str, tmp_path: pathlib.Path) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _HANGS, str(tmp_path), ends], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert json.loads((tmp_path / "heartbeats" / "0.json").read_text())["pid"] > 0
    if ends == "stop":
        assert (done.returncode, done.stderr) == (0, "")
        return
    assert done.returncode == 70
    assert time.monotonic() - began < 30
    (dump,) = (tmp_path / "hangs").glob("*-step-8/process-0.txt")
    assert "step 9 is not done after" in dump.read_text()
    assert "a_collective_that_never_ends" in dump.read_text()
    assert str(dump.parent) in done.stderr


# Time.


def _line(kind: str, time: float, up: float, **rest: Any) -> str:
    return json.dumps({"kind": kind, "time": time, "up": up, **rest}) + "\n"


def test_goodput_adds_up(tmp_path: pathlib.Path) -> None:
    """Two lives by hand: the first is killed at step 25 and loses 5 steps, the second has a clock that jumps."""
    start = {"processes": 1, "devices": 1, "interval": 10}
    (tmp_path / "metrics.jsonl").write_text(
        _line("start", 1005.0, 5.0, **start)
        + _line("init", 1006.0, 6.0, step=0, tier="", seconds=1.0)
        + _line("compile", 1010.0, 10.0, step=0, seconds=4.0, cache="miss")
        + _line("train", 1021.0, 21.0, step=10, steps=10, seconds=10.0, data_wait=0.1)
        + _line("save", 1022.0, 22.0, step=10, tier="durable", blocking=1.0, seconds=2.0)
        + _line("train", 1032.0, 32.0, step=20, steps=10, seconds=10.0, data_wait=0.1)
        + _line("train", 1037.0, 37.0, step=25, steps=5, seconds=5.0, data_wait=0.0)
        + _line("start", 1052.0, 5.0, **start)
        + _line("resume", 1054.0, 7.0, step=20, tier="durable", seconds=2.0)
        + _line("compile", 1055.0, 8.0, step=20, seconds=1.0, cache="hit")
        + _line("train", 99999.0, 18.0, step=30, steps=10, seconds=10.0, data_wait=0.0)
        + _line("eval", 99999.0, 20.0, step=30, seconds=2.0)
        + _line("end", 99999.0, 20.0, why="finished")
        + '{"kind": "tr'
    )
    found = goodput.measure(tmp_path)
    assert found.seconds == pytest.approx(
        {
            "train": 9 + 9 + 10, "repeated": 5, "data wait": 2, "evaluate": 2, "save": 1, "start": 10, "restore": 3,
            "compile": 5, "rest": 1, "idle": 10,
        }
    )  # fmt: skip
    assert found.total == pytest.approx(37 + 10 + 20)
    assert (found.lost_steps, found.unavoidable_steps) == (5, 5)
    assert found.goodput == pytest.approx(28 / 67)
    assert found.best == pytest.approx(28 / 66)  # only the save could have been spared
    assert "2 lives (1 finished, 1 killed)" in goodput.table(found)
    goodput.draw(found, tmp_path / "goodput.png")
    assert (tmp_path / "goodput.png").stat().st_size > 10_000


def test_the_goodput_of_a_real_run_adds_up_to_its_wall_time(finished: pathlib.Path) -> None:
    found = goodput.measure(finished)
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    last = max(record["up"] for record in records)
    assert found.total == pytest.approx(last, rel=1e-3)
    assert found.seconds["compile"] > 0
    assert found.lost_steps == 0


def test_goodput_of_no_run(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"holds no metrics.jsonl"):
        goodput.measure(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "time": 1, "step": 1}\n')
    with pytest.raises(ValueError, match="tells of no start"):
        goodput.measure(tmp_path)


# The same twice, and compiled once.


def test_the_same_seed_gives_the_same_weights_twice(
    corpus: pathlib.Path, finished: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    train(helpers.tiny_config(corpus, **{"run.deterministic": True}), tmp_path / "again")
    assert _fingerprints(tmp_path / "again", 8) == _fingerprints(finished, 8)
    train(helpers.tiny_config(corpus, **{"run.seed": 1}), tmp_path / "other")
    assert _fingerprints(tmp_path / "other", 8)["params"] != _fingerprints(finished, 8)["params"]


def test_deterministic_sets_the_compilers_flags() -> None:
    assert compilation.compiler_options(RunConfig()) == {}
    options = compilation.compiler_options(RunConfig(deterministic=True))
    assert options == {"xla_gpu_deterministic_ops": True, "xla_gpu_autotune_level": 0}
    assert int(jax.jit(lambda x: x + 1, compiler_options=options)(1)) == 2  # the compiler knows them


def test_a_second_life_finds_the_step_compiled(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Real processes: what a process has compiled is in its memory."""
    config = helpers.tiny_config(
        corpus, **{"run.steps": 4, "run.compilation_cache": "auto", "checkpoint.every": 2, "run.log_every": 1}
    )
    command = [sys.executable, "-m", "launch.train", *helpers.command_line(config), f"--workdir={tmp_path / 'run'}"]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    for life in range(2):
        if life:
            shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=500)
    first, second = _records(tmp_path / "run", "compile")
    assert (first["cache"], second["cache"]) == ("miss", "hit")
    assert (tmp_path / "compilation_cache").is_dir()
