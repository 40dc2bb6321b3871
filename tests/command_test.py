"""What the environment may not decide: numbers, and life."""

import json
import os
import pathlib
import subprocess
import sys

import helpers
import jax
import pytest

from mosaics_jax.history import read_metrics
from mosaics_jax.train import train

ROOT = pathlib.Path(__file__).parent.parent


def _run(body, tmp_path, stdout=subprocess.PIPE, **environment):
    path = tmp_path / "command.py"
    path.write_text(f"import sys\nfrom launch import command\n\n\ndef main():\n    {body}\n\n\ncommand.run(main)\n")
    return subprocess.run(
        [sys.executable, str(path)], env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, stdout=stdout,
        stderr=subprocess.PIPE, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_a_reader_that_goes_away_ends_nothing(tmp_path):
    reads, writes = os.pipe()
    os.close(reads)
    body = "[print('line', n, flush=True) for n in range(99)]; sys.stderr.write('reached the end')"
    try:
        done = _run(body, tmp_path, stdout=writes)
    finally:
        os.close(writes)
    assert (done.returncode, done.stderr) == (0, "reached the end")


def test_a_disk_that_is_full_is_not_a_reader_that_went(tmp_path):
    with open("/dev/full", "w") as full:
        done = _run("print('line', flush=True)", tmp_path, stdout=full)
    assert done.returncode != 0
    assert "failed: [Errno 28] No space left on device" in done.stderr


def test_names_that_the_terminal_cannot_show(tmp_path):
    done = _run(r"print('\\udcff ü')", tmp_path, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert (done.returncode, done.stdout) == (0, "\\udcff \\xfc\n")


@pytest.mark.parametrize(
    ("name", "value"),
    [("JAX_ENABLE_X64", "1"), ("JAX_DEFAULT_PRNG_IMPL", "rbg"), ("JAX_THREEFRY_PARTITIONABLE", "0")],
)
def test_the_environment_decides_no_number(name, value, tmp_path):
    body = "import jax; print(jax.random.normal(jax.random.key(1), (3,)), jax.numpy.arange(2.0).dtype)"
    plain, set_ = _run(body, tmp_path, JAX_PLATFORMS="cpu"), _run(body, tmp_path, JAX_PLATFORMS="cpu", **{name: value})
    assert plain.returncode == set_.returncode == 0, set_.stderr
    assert plain.stdout == set_.stdout
    assert set_.stderr == f"{name} is set, and not heeded: the numbers of a run depend on its config alone\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [("jax_enable_x64", True), ("jax_default_prng_impl", "rbg"), ("jax_threefry_partitionable", False)],
)
def test_a_program_that_sets_jax_otherwise_is_told(name, value, corpus, tmp_path):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        with pytest.raises(ValueError, match=f"JAX is set to {name}={value}; legal: {before}"):
            train(helpers.tiny_config(corpus), tmp_path / "run")
    finally:
        jax.config.update(name, before)
    assert not (tmp_path / "run").exists()


def _write(path, *records):
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "tr')


def test_each_step_is_read_once(tmp_path):
    def train(step, loss):
        return {"kind": "train", "step": step, "loss": loss}

    _write(
        tmp_path / "run",
        {"kind": "start"}, {"kind": "init", "step": 0}, train(1, 9.0), {"kind": "eval", "step": 1}, train(2, 8.0),
        {"kind": "start"}, {"kind": "init", "step": 0}, train(1, 5.0), train(2, 4.0), train(3, 3.5), train(4, 3.4),
        {"kind": "start"}, {"kind": "resume", "step": 2}, train(3, 3.0), {"kind": "end", "why": "finished"},
        {"kind": "start"}, {"kind": "finished", "step": 3},
    )  # fmt: skip
    assert [(one["step"], one["loss"]) for one in read_metrics(tmp_path / "run")] == [(1, 5.0), (2, 4.0), (3, 3.0)]
    assert read_metrics(tmp_path / "run", "eval") == []
    with pytest.raises(ValueError, match=r"nothing holds no metrics.jsonl; legal: the workdir of a run"):
        read_metrics(tmp_path / "nothing")


def test_a_resumed_run_has_each_step_once(corpus, tmp_path):
    """In TensorBoard as in `read_metrics`: its later life marks from where on it tells anew."""
    from tensorboardX.proto import event_pb2

    config = helpers.tiny_config(corpus, **{"run.log_every": 1})
    train(config, tmp_path / "run")
    for step in (6, 8):
        (tmp_path / "run" / "checkpoints" / str(step)).rename(tmp_path / f"{step}")
    train(config, tmp_path / "run")
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(1, 9))
    marks = []
    for path in sorted((tmp_path / "run" / "tensorboard").glob("events*"), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at + 12 <= len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16
            if event.HasField("session_log"):
                marks.append(event.step)
    assert marks == [0, 4]
