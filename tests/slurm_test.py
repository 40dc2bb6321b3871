"""A real Slurm, of two nodes on this machine, runs launch/slurm/train.sbatch, preempts it, and lets it finish."""

import contextlib
import getpass
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import helpers
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scancel", "munged")
pytestmark = pytest.mark.slow


def _missing():
    if os.geteuid() != 0:
        return "needs root, to run slurmd and name nodes in /etc/hosts"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"{', '.join(absent)} not installed; apt-get install slurm-wlm munge" if absent else None


def _ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("localhost", 0))
        return [one.getsockname()[1] for one in sockets]


CONFIGURATION = """
ClusterName=mosaics
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={0}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=10
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
JobRequeue=1
MinJobAge=3600
NodeName=mosaics1 NodeHostname={host} NodeAddr=127.0.0.1 Port={1} CPUs=2 State=UNKNOWN
NodeName=mosaics2 NodeHostname={host} NodeAddr=127.0.0.1 Port={2} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


@pytest.fixture
def slurm():
    """The environment in which sbatch finds the cluster. Nothing of it is left behind."""
    if (reason := _missing()) is not None:
        pytest.skip(reason)
    # Not under tmp_path: slurmd's sockets lie here, and the name of a socket has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="slurm") as name:
        directory = pathlib.Path(name)
        directory.chmod(0o755)
        (directory / "state").mkdir()
        with _cluster(directory) as environment:
            yield environment, directory


@contextlib.contextmanager
def _cluster(directory):
    text = CONFIGURATION.format(*_ports(3), directory=directory, host=socket.gethostname(), user=getpass.getuser())
    (directory / "slurm.conf").write_text(text)
    environment = os.environ | {"SLURM_CONF": str(directory / "slurm.conf"), "JAX_PLATFORMS": "cpu"}
    hosts = pathlib.Path("/etc/hosts")
    hosts_before = hosts.read_text()
    hosts.write_text(hosts_before.rstrip("\n") + "\n127.0.0.1 mosaics1 mosaics2\n")
    key = directory / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    files = ("key-file", "munge.key"), ("socket", "munge.socket"), ("pid-file", "munge.pid"), ("log-file", "munge.log")
    munged = ["munged", "--foreground", "--force", *(f"--{option}={directory / name}" for option, name in files)]
    munged.append(f"--seed-file={directory / 'munge.seed'}")
    commands = [munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "mosaics1"], ["slurmd", "-D", "-N", "mosaics2"]]
    daemons = []
    try:
        with open(directory / "daemons.log", "w") as log:
            for command in commands:
                daemons.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
                )
                time.sleep(1)
        _await(lambda: _run(environment, "sinfo", "-h", "-o", "%t %D") == "idle 2", 60, lambda: _state(directory))
        yield environment
    finally:
        subprocess.run(["scancel", "--user", getpass.getuser()], env=environment, timeout=20, check=False)
        for daemon in reversed(daemons):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGTERM)
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()
        hosts.write_text(hosts_before)


def _run(environment, *command):
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30).stdout.strip()


def _state(directory):
    logs = [f"== {path.name}\n{path.read_text()[-1500:]}" for path in sorted(directory.glob("*.log"))]
    return "\n".join(logs)


def _await(condition, seconds, explain):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.3)


def _steps(workdir):
    path = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line["step"] for line in lines if line["kind"] == "train"]


def test_a_preempted_job_is_requeued_and_finishes(slurm, tmp_path):
    environment, directory = slurm
    helpers.make_corpus(tmp_path)
    # Long enough to be preempted in the middle.
    config = helpers.tiny_config(
        tmp_path / "corpus",
        **{"run.steps": 700, "run.log_every": 1, "checkpoint.every": 500, "run.eval_every": 700},
        **{"mesh.fsdp": 2, "mesh.processes": 2, "mesh.devices_per_process": 1},
    )
    workdir, output = tmp_path / "run", tmp_path / "job.log"
    submitted = subprocess.run(
        [
            "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1",
            "--time=10", f"--output={output}", "launch/slurm/train.sbatch", *helpers.command_line(config),
            f"--workdir={workdir}", "--wait=90",
        ],
        env=environment | {"PYTHON": sys.executable}, cwd=ROOT, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()

    def explain():
        logs = [path.read_text()[-2000:] for path in sorted((workdir / "logs").glob("*.log"))]
        return "\n".join([output.read_text() if output.exists() else "", *logs, _state(directory)])

    _await(lambda: len(_steps(workdir)) > 5, 120, explain)
    subprocess.run(["scancel", "--signal=TERM", job], env=environment, check=True, timeout=30)
    _await(lambda: output.exists() and "saved; back into the queue" in output.read_text(), 60, explain)
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert saved < 700
    _await(lambda: _run(environment, "squeue", "-h", "-j", job, "-o", "%t") in ("PD", "R", "CG"), 30, explain)
    _await(lambda: "finished" in output.read_text().splitlines(), 260, explain)
    steps = _steps(workdir)
    assert max(steps) == 700
    assert set(steps) == set(range(1, 701))  # none is missing
    assert [path.name for path in sorted((workdir / "logs").iterdir())] == [
        f"{job}.{restart}.{rank}.log" for restart in (0, 1) for rank in (0, 1)
    ]
    assert f"resuming {workdir} at step {saved} of 700" in (workdir / "logs" / f"{job}.1.0.log").read_text()
