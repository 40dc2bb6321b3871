"""What the environment may not decide: numbers, and life."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

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


def test_a_disk_that_is_full_takes_nothing_of_what_a_run_tells_and_ends_nothing(tmp_path):
    path = tmp_path / "command.py"
    path.write_text(
        "import sys\nfrom launch import command\n\n\ndef main():\n    [print('line', flush=True) for _ in range(9)]\n"
        "    print('error', file=sys.stderr)\n    sys.exit(75)\n\n\ncommand.run(main, goes_on='it goes on')\n"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(path)], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=full, stderr=full,
            timeout=300, check=False,
        )  # fmt: skip
    assert done.returncode == 75


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_outputs_that_are_closed_end_nothing(closed, tmp_path):
    body = f"print('out'); print('err', file=sys.stderr); open({str(tmp_path / 'written')!r}, 'w').write('whole')"
    path = tmp_path / "command.py"
    path.write_text(f"import sys\nfrom launch import command\n\n\ndef main():\n    {body}\n\n\ncommand.run(main)\n")
    shell = f"exec {sys.executable} {path} " + " ".join(f"{number}>&-" for number in closed)
    done = subprocess.run(
        ["sh", "-c", shell], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert (done.stdout, done.stderr) == ("out\n" * (1 not in closed), "err\n" * (2 not in closed))
    assert (tmp_path / "written").read_text() == "whole"


def _pressed(body, tmp_path, times=1, goes_on="", ignored=False):
    """Runs a command that says "ready" on stdout, and presses Ctrl-C; its exit code and what it says."""
    path = tmp_path / "command.py"
    path.write_text(
        "import sys, time, threading\nfrom launch import command\n\n\ndef main():\n"
        + "".join(f"    {line}\n" for line in body.splitlines())
        + f"\n\ncommand.run(main, goes_on={goes_on!r})\n"
    )
    # A shell that starts these tests in the background has them ignore Ctrl-C, and so their children.
    how = "SIG_IGN" if ignored else "SIG_DFL"
    heard = f"import os, signal, sys; signal.signal(signal.SIGINT, signal.{how}); os.execv(sys.argv[1], sys.argv[1:])"
    running = subprocess.Popen(
        [sys.executable, "-c", heard, sys.executable, str(path)], env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert running.stdout.readline() == "ready\n"
    began = time.monotonic()
    for _ in range(times):
        os.killpg(running.pid, signal.SIGINT)
        time.sleep(0.3)
    _, said = running.communicate(timeout=300)
    return running.returncode, said, time.monotonic() - began


@pytest.mark.parametrize(
    "body",
    [
        "time.sleep(60)",
        "try:\n    time.sleep(60)\nfinally:\n    raise ValueError('of the cleaning up')",
        "try:\n    time.sleep(60)\nexcept BaseException:\n    raise ImportError('as an extension does')",
        "class Callback:\n    def __del__(self): time.sleep(60)\nCallback()",
    ],
)
@pytest.mark.parametrize("goes_on", ["", "the same command goes on"])
def test_ctrl_c_is_one_line(body, goes_on, tmp_path):
    expected = f"interrupted{'; ' * bool(goes_on)}{goes_on}\n"
    assert _pressed(f"print('ready', flush=True)\n{body}", tmp_path, goes_on=goes_on)[:2] == (130, expected)


@pytest.mark.parametrize("goes_on", ["", "the same command goes on"])
def test_ctrl_c_that_is_pressed_again_ends_what_does_not_end(goes_on, tmp_path):
    body = "print('ready', flush=True)\ntry:\n    time.sleep(60)\nfinally:\n    time.sleep(60)"
    code, said, seconds = _pressed(body, tmp_path, times=2, goes_on=goes_on)
    assert (code, said.count("\n"), said[:11]) == (130, 1, "interrupted")
    assert seconds < 10


def test_a_run_ends_at_once_whatever_it_waits_for(tmp_path):
    """Here a lock, which Python's own Ctrl-C is kept from while a signal is blocked, as in a library's call."""
    body = (
        "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})\n"
        "print('ready', flush=True)\nthreading.Lock().acquire() and threading.Event().wait(60)"
    )
    code, said, seconds = _pressed(body, tmp_path, goes_on="the same command goes on")
    assert (code, said) == (130, "interrupted; the same command goes on\n")
    assert seconds < 10


def test_ctrl_c_that_is_ignored_stays_so(tmp_path):
    body = "print('ready', flush=True)\ntime.sleep(1.5)"
    for goes_on in ("", "the same command goes on"):
        assert _pressed(body, tmp_path, goes_on=goes_on, ignored=True)[:2] == (0, "")


def _alive(group):
    """The processes of a group, without those that have ended and that nobody has asked for."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, number = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(number) == group and state != "Z":
            found.append(path.parent.name)
    return found


@pytest.mark.slow
def test_ctrl_c_ends_a_run_with_its_workers(corpus, tmp_path):
    config = helpers.tiny_config(corpus, **{"run.steps": 100_000, "run.log_every": 1, "data.workers": 2})
    command = [sys.executable, "-m", "launch.train", f"--workdir={tmp_path}/run", *helpers.command_line(config)]
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    running = subprocess.Popen(
        [sys.executable, "-c", heard, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    while "step 3/" not in running.stdout.readline():
        assert running.poll() is None
    began = time.monotonic()
    for _ in range(2):
        os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=300)
    lines = [line for line in said.splitlines() if "choice.py" not in line]  # which kernels are taken
    assert (running.returncode, lines) == (
        130, ["interrupted; the same command goes on from the newest checkpoint"],
    )  # fmt: skip
    assert time.monotonic() - began < 10
    deadline = time.monotonic() + 20
    while _alive(running.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _alive(running.pid) == []


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
