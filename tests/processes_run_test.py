"""Runs of several processes: they train as one does, resume as any number, stop together, and say who is missing."""

import errno
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import helpers
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PATIENCE = 500  # seconds until a process that does not end, or come so far, is given up: other tests run beside it


def _port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _start(config, workdir, count, only=None, wait=200, heartbeat=10, devices=1, port=None):
    """`count` training processes, or the ones named; their output goes to files beside the workdir."""
    port, started = port or _port(), []
    for process in range(count) if only is None else only:
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        command = [
            sys.executable, "-m", "launch.train", *helpers.command_line(config), f"--workdir={workdir}",
            f"--coordinator=localhost:{port}", f"--processes={count}", f"--process={process}", f"--wait={wait}",
            f"--heartbeat={heartbeat}",
        ]  # fmt: skip
        with open(workdir.parent / f"{workdir.name}.{process}.log", "a") as log:
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    return started


def _finish(started, timeout=PATIENCE):
    codes = [process.wait(timeout) for process in started]
    return codes


def _losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def _log(workdir, process):
    return (workdir.parent / f"{workdir.name}.{process}.log").read_text()


def _await_step(workdir, step, started, seconds=PATIENCE):
    deadline = time.monotonic() + seconds
    while not (workdir / "checkpoints" / str(step)).is_dir():
        assert all(process.poll() is None for process in started), _log(workdir, 0)
        assert time.monotonic() < deadline, _log(workdir, 0)
        time.sleep(0.05)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    helpers.make_corpus(directory)
    return directory / "corpus"


def _config(corpus, steps=12, **changes):
    return helpers.tiny_config(
        corpus, **{"run.steps": steps, "run.log_every": 1, "checkpoint.every": 4, "run.eval_every": steps} | changes
    )


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """The losses of one process."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    from mosaics_jax.train import train

    train(_config(corpus), workdir)
    return _losses(workdir)


MESHES = {
    "2 on data": (2, 1, {}),
    "4 on fsdp": (4, 1, {"mesh.fsdp": 4}),
    "2 on tensor": (2, 1, {"mesh.tensor": 2}),  # both read all rows
    "2 on sequence": (2, 1, {"mesh.sequence": 2}),  # both read all rows, and hold half of each
    "2 of 2 on fsdp x sequence": (2, 2, {"mesh.fsdp": 2, "mesh.sequence": 2}),
}


_QUICK = ("2 on data", "2 of 2 on fsdp x sequence")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", helpers.long_but(_QUICK, MESHES))
def test_several_processes_train_as_one_does(name, corpus, alone, tmp_path):
    count, devices, mesh = MESHES[name]
    workdir = tmp_path / "run"
    assert set(_finish(_start(_config(corpus, **mesh), workdir, count, devices=devices))) == {0}, _log(workdir, 0)
    losses = _losses(workdir)
    assert losses.keys() == alone.keys()
    assert losses == pytest.approx(alone, rel=2e-5)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_two_processes_evaluate_as_one_does(corpus, tmp_path):
    """Killed after some answers and gone on, two processes write what one does."""
    from mosaics_jax.train import train

    train(_config(corpus, steps=4), tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    flags = ["--count=3", "--batch_tokens=64", "--variants=single_1", f"--haystack={ROOT / 'README.md'}"]

    def run(workdir, count, suite, lengths):
        port, started = _port(), []
        for process in range(count):
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu", "MOSAICS_COORDINATOR": f"localhost:{port}", "MOSAICS_PROCESSES": str(count),
                "JOB_COMPLETION_INDEX": str(process),
            }  # fmt: skip
            command = [sys.executable, "-m", "launch.evaluate", *flags, f"--workdir={workdir}", f"--suite={suite}"]
            started.append(subprocess.Popen([*command, f"--lengths={lengths}"], cwd=ROOT, env=environment))
        assert _finish(started) == [0] * count
        return workdir / "evaluations" / "4"

    for suite, lengths in (("perplexity", "32,64"), ("needle", "600")):
        one, two = (run(tmp_path / name, count, suite, lengths) for name, count in (("run", 1), ("other", 2)))
        first, second = ((folder / f"{suite}.jsonl").read_text().splitlines() for folder in (one, two))
        assert [json.loads(line)["key"] for line in first] == [json.loads(line)["key"] for line in second]
        kept = second[: len(second) // 2]
        (two / f"{suite}.jsonl").write_text("\n".join(kept) + "\n")
        run(tmp_path / "other", 2, suite, lengths)
        again = (two / f"{suite}.jsonl").read_text().splitlines()
        assert again[: len(kept)] == kept
        assert sorted(again) == sorted(second)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun not installed; apt-get install openmpi-bin")
def test_open_mpi_tells_the_processes_who_they_are(corpus, alone, tmp_path):
    workdir = tmp_path / "run"
    config = _config(corpus, **{"mesh.fsdp": 2, "mesh.processes": 2})
    command = [
        "mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-m", "launch.train",
        *helpers.command_line(config), f"--workdir={workdir}", "--wait=200",
    ]  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "MOSAICS_PORT": str(_port())}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert _losses(workdir) == pytest.approx(alone, rel=2e-5)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_killed_as_four_it_goes_on_as_two_and_ends_as_one_does(corpus, tmp_path):
    """The data is that of one process: a row read twice, or not at all, would show in the losses."""
    from mosaics_jax.train import train

    # Rounding differs with the mesh, and grows with the steps as fast as the weights change. At this rate other rows
    # change the loss of every step by 1e-3 at least, at ten times the rate rounding alone made 2e-4.
    rate = {"optimizer.peak_learning_rate": 1e-3}
    train(_config(corpus, 60, **rate), tmp_path / "alone")
    alone = _losses(tmp_path / "alone")
    workdir = tmp_path / "run"
    started = _start(_config(corpus, 60, **rate, **{"mesh.fsdp": 2}), workdir, 4)
    _await_step(workdir, 12, started)
    for process in started:
        process.kill()
    _finish(started)
    reached = max(_losses(workdir))
    assert reached < 60
    (workdir / "metrics.jsonl").rename(workdir / "before.jsonl")
    assert set(_finish(_start(_config(corpus, 60, **rate, **{"mesh.tensor": 2}), workdir, 2))) == {0}, _log(workdir, 0)
    losses = _losses(workdir)
    assert 12 < min(losses) <= reached + 1
    assert max(losses) == 60
    assert losses == pytest.approx({step: alone[step] for step in losses}, rel=1e-4)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_sigterm_to_one_process_saves_and_stops_all(corpus, tmp_path):
    workdir = tmp_path / "run"
    config = _config(corpus, 5000, **{"checkpoint.every": 1000})
    started = _start(config, workdir, 2)
    deadline = time.monotonic() + PATIENCE
    while not (workdir / "metrics.jsonl").exists() or len(_losses(workdir)) < 3:
        assert time.monotonic() < deadline, _log(workdir, 0)
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    assert _finish(started) == [75, 75], _log(workdir, 0) + _log(workdir, 1)
    (saved,) = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    assert f"saved step {saved}" in _log(workdir, 0)


# The host's name is known to this process alone, as a name is that only the system's own directory service tells.
_MEET = """
import socket, sys
real = socket.getaddrinfo
socket.getaddrinfo = lambda host, *rest, **more: real("127.0.0.1" if host == "node" else host, *rest, **more)
from mosaics_jax import processes, schedulers
host, port, me = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
processes.connect(schedulers.Place(f"{host}:{port}", 2, me, []), 60, 100)
print(processes.exchange(f"I am {me}", "test"))
elsewhere = socket.socket()
print(elsewhere.connect_ex(("127.0.0.1", port)), socket.socket().connect_ex(("127.0.0.2", port)))
processes.same({"data.seed": "0"}, "test")
try:
    processes.same({"data.seed": str(me)}, "test")
except ValueError as error:
    print(error)
processes.barrier("end")
"""


def _meet(host, environment, port):
    started = []
    for me in ("0", "1"):
        command = [sys.executable, "-c", _MEET, host, str(port), me]
        more = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, **more))
    return [process.communicate(timeout=PATIENCE) for process in started]


@pytest.mark.slow
@pytest.mark.parametrize(("host", "secret"), [("node", None), ("localhost", "kumquat-7f3a9d51-zeppelin")])
def test_processes_meet_where_jax_alone_would_not(host, secret):
    """Behind a web proxy that answers nobody, at a name that gRPC cannot look up, told to listen at another address.

    jax's service is reached at the one address at which they met, and they say the same of what differs.
    """
    proxy = f"http://127.0.0.1:{_port()}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_BIND_ADDRESS": "192.0.2.1:1"}
    environment |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "grpc_proxy"), proxy)
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy", "MOSAICS_SECRET"):
        environment.pop(name, None)
    if secret:
        environment["MOSAICS_SECRET"] = secret
    for said, errors in _meet(host, environment, _port()):
        assert said.splitlines() == [
            "['I am 0', 'I am 1']", f"0 {errno.ECONNREFUSED}",
            "process 1 differs from process 0 in data.seed: 1, not 0; start all with the same command",
        ], errors  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_port_that_is_taken_is_one_line(corpus, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        (process,) = _start(_config(corpus), tmp_path / "run", 2, only=[0], port=other.getsockname()[1])
        assert _finish([process]) == [2]
    (line,) = _log(tmp_path / "run", 0).splitlines()
    assert re.match(r"error: process 0 cannot listen at port \d+ \(Address already in use\); set another", line)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_who_did_not_come_is_named(corpus, tmp_path):
    started = _start(_config(corpus), tmp_path / "run", 4, only=[0, 2], wait=6)
    assert _finish(started) == [2, 2]
    for process in (0, 2):
        error = _log(tmp_path / "run", process).strip().splitlines()[-1]
        assert error.startswith("error: processes 1, 3 did not come within 6 s"), error


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_coordinator_that_is_not_there_is_named(corpus, tmp_path):
    started = _start(_config(corpus), tmp_path / "run", 2, only=[1], wait=3)
    assert _finish(started) == [2]
    assert "error: process 0 was not at localhost:" in _log(tmp_path / "run", 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_when_one_dies_the_others_end_and_say_which(corpus, tmp_path):
    workdir = tmp_path / "run"
    started = _start(_config(corpus, 100000, **{"data.batch": 3}), workdir, 3, heartbeat=5)
    _await_step(workdir, 4, started)
    started[1].kill()
    begin = time.monotonic()
    codes = _finish(started)
    assert time.monotonic() - begin < 90  # and not the 100 s that a heartbeat has else
    assert 0 not in codes
    # By whichever notices first: the collective that broke, or the missed heartbeat.
    named = r"process(es)? ([\d, ]* )?1\b.* did not answer|ask 1 heartbeat timeout|stopped sending heartbeats\):\n1\n"
    first, last = _log(workdir, 0), _log(workdir, 2)
    assert re.search(named, first), first[-2000:]
    # A process that notices it only by the end of process 0 says where to look.
    ended = "process 0 has ended; look at its log first|Check earlier logs from .* the leader"
    assert re.search(f"{named}|{ended}", last), last[-2000:]
