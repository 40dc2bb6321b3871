"""Who a process is, from what a scheduler or a command line tells it, and what is refused."""

import os
import pathlib
import subprocess
import sys

import pytest

from mosaics_jax.schedulers import Place, from_environment, from_flags

ROOT = pathlib.Path(__file__).parent.parent

_SLURM = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_NODELIST": "gpu[07-08,11]", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
}  # fmt: skip
_OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
}  # fmt: skip
_FAR = _OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "3"}  # on several nodes
_URI = "OMPI_MCA_orte_hnp_uri"
_KUBERNETES = {"MOSAICS_COORDINATOR": "run-0-0.run:3333", "MOSAICS_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"}


def _without(environment, name):
    return {other: value for other, value in environment.items() if other != name}


def _set(environment, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "MOSAICS_", "JOB_COMPLETION", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (_SLURM, Place("gpu07:61452", 16, 9, [1])),
        (_SLURM | {"MOSAICS_PORT": "4000"}, Place("gpu07:4000", 16, 9, [1])),
        (_SLURM | {"CUDA_VISIBLE_DEVICES": "1"}, Place("gpu07:61452", 16, 9, [])),  # the only one it sees
        (_SLURM | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, Place("gpu07:61452", 2, 1, [])),  # a node's
        (_SLURM | {"SLURM_STEP_NUM_TASKS": "16"}, Place("gpu07:61452", 16, 9, [1])),
        (_SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),  # a shell within an allocation
        (_SLURM | {"SLURM_STEP_NUM_TASKS": ""}, Place("gpu07:61452", 16, 9, [1])),
        (_OMPI, Place("localhost:61711", 4, 2, [2])),
        (_OMPI | {"MOSAICS_PORT": "4000"}, Place("localhost:4000", 4, 2, [2])),
        (_OMPI | {"MOSAICS_PORT": ""}, Place("localhost:61711", 4, 2, [2])),
        (_SLURM | _OMPI, Place("localhost:61711", 4, 2, [2])),  # mpirun within a job of Slurm
        (_KUBERNETES, Place("run-0-0.run:3333", 4, 3, [])),
        # The shell of a batch job, which is no step; srun within it would be.
        ({"SLURM_JOB_ID": "12", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, None),
        ({"JOB_COMPLETION_INDEX": "3"}, None),  # of any indexed job
        ({"MOSAICS_PORT": "4000"}, None),
        (_FAR | {_URI: "42.0;tcp://10.0.0.7,10.1.0.7:34911"}, Place("10.0.0.7:61440", 4, 2, [2])),
        (_FAR | {_URI: "42.0;tcp6://[fd00::7,fe80::1]:34911"}, Place("[fd00::7]:61440", 4, 2, [2])),
    ],
)
def test_the_environment_tells_who_a_process_is(environment, expected, monkeypatch):
    _set(environment, monkeypatch)
    assert from_environment(1) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (_SLURM | {"SLURM_NTASKS": ""}, r"SLURM_NTASKS is ''; legal: a number \(start it by srun, or unset"),
        (_SLURM | {"SLURM_PROCID": "x"}, r"SLURM_PROCID is 'x'; legal: a number \(start it by srun, or unset"),
        (_SLURM | {"SLURM_LOCALID": ""}, r"SLURM_LOCALID is ''; legal: a number \(start it by srun, or unset"),
        (_SLURM | {"SLURM_STEP_NODELIST": ""}, r"SLURM_STEP_NODELIST is empty; start it by srun, or unset"),
        (_OMPI | {"OMPI_COMM_WORLD_SIZE": ""}, r"OMPI_COMM_WORLD_SIZE is ''; legal: a number \(start it by mpirun"),
        (_SLURM | {"SLURM_JOB_ID": ""}, r"SLURM_JOB_ID is ''; legal: a number \(start it by srun, or unset"),
        (_SLURM | {"MOSAICS_PORT": "x"}, "MOSAICS_PORT is 'x'; legal: a number from 1 to 65535"),
        (_OMPI | {"MOSAICS_PORT": "70000"}, "MOSAICS_PORT is '70000'; legal: a number from 1 to 65535"),
        (_KUBERNETES | {"MOSAICS_PROCESSES": ""}, "MOSAICS_PROCESSES is ''; legal: HOST:PORT, with MOSAICS_PROCESSES"),
        (_KUBERNETES | {"MOSAICS_COORDINATOR": ""}, "MOSAICS_COORDINATOR is empty; legal: HOST:PORT, with"),
        (_KUBERNETES | {"MOSAICS_COORDINATOR": "run"}, "MOSAICS_COORDINATOR is 'run'; legal: HOST:PORT of process 0"),
        (_KUBERNETES | {"MOSAICS_COORDINATOR": "run:0"}, "MOSAICS_COORDINATOR is 'run:0'; legal: HOST:PORT of"),
        (_KUBERNETES | {"MOSAICS_COORDINATOR": "run:65536"}, "MOSAICS_COORDINATOR is 'run:65536'; legal: HOST:PORT of"),
        (
            _KUBERNETES | {"JOB_COMPLETION_INDEX": "4"},
            "JOB_COMPLETION_INDEX is 4 and MOSAICS_PROCESSES is 4; legal: from",
        ),
        (_KUBERNETES | {"JOB_COMPLETION_INDEX": "-1"}, "JOB_COMPLETION_INDEX is '-1'; legal: HOST:PORT, with"),
        (_KUBERNETES | {"MOSAICS_PROCESSES": "0"}, "MOSAICS_PROCESSES is 0; legal: from 1 to 1048576 processes"),
        (_KUBERNETES | {"MOSAICS_PROCESSES": "9999999"}, "MOSAICS_PROCESSES is 9999999; legal: from 1 to 1048576 proc"),
        (_KUBERNETES | {"MOSAICS_PROCESSES": "\u0664"}, "MOSAICS_PROCESSES is '\u0664'; legal: HOST:PORT, with"),
        ({"MOSAICS_COORDINATOR": "host:1"}, "JOB_COMPLETION_INDEX is not set; legal: HOST:PORT, with"),
        ({"MOSAICS_COORDINATOR": "host:1", "JOB_COMPLETION_INDEX": "0"}, "MOSAICS_PROCESSES is not set; legal: HOST"),
        ({"MOSAICS_PROCESSES": "4"}, "MOSAICS_COORDINATOR is not set; legal: HOST:PORT, with"),
        (_SLURM | {"SLURM_PROCID": "16"}, "SLURM_PROCID is 16 and SLURM_NTASKS is 16; legal: from 1 to 1048576"),
        (_SLURM | {"SLURM_STEP_NUM_TASKS": "9"}, "SLURM_PROCID is 9 and SLURM_STEP_NUM_TASKS is 9; legal: from 1"),
        (_SLURM | {"SLURM_NTASKS": "1"}, "SLURM_PROCID is 9 and SLURM_NTASKS is 1; legal: from 1"),
        (_SLURM | {"SLURM_NTASKS": "0", "SLURM_PROCID": "0"}, "SLURM_PROCID is 0 and SLURM_NTASKS is 0; legal: from 1"),
        (_SLURM | {"SLURM_STEP_NODELIST": "[]"}, r"the first node of SLURM_STEP_NODELIST, .*; legal: HOST:PORT of"),
        (_SLURM | {"MOSAICS_PORT": "0"}, "MOSAICS_PORT is '0'; legal: a number from 1 to 65535"),
        (_without(_SLURM, "SLURM_STEP_NODELIST"), "SLURM_STEP_NODELIST is not set; start it by srun, or unset"),
        (_without(_SLURM, "SLURM_NTASKS"), r"SLURM_NTASKS is not set; legal: a number \(start it by srun"),
        (_without(_SLURM, "SLURM_PROCID"), r"SLURM_PROCID is not set; legal: a number \(start it by srun"),
        (_without(_SLURM, "SLURM_LOCALID"), r"SLURM_LOCALID is not set; legal: a number \(start it by srun"),
        (_without(_SLURM, "SLURM_JOB_ID"), r"SLURM_JOB_ID is not set; legal: a number \(start it by srun"),
        (_without(_OMPI, "OMPI_COMM_WORLD_SIZE"), r"OMPI_COMM_WORLD_SIZE is not set; legal: a number \(start it by"),
        (_without(_OMPI, "OMPI_COMM_WORLD_RANK"), r"OMPI_COMM_WORLD_RANK is not set; legal: a number \(start it by"),
        (_OMPI | {"OMPI_COMM_WORLD_RANK": "4"}, "OMPI_COMM_WORLD_RANK is 4 and OMPI_COMM_WORLD_SIZE is 4; legal: from"),
        (_FAR, "Open MPI 5 does not tell where process 0 is; set --coordinator=HOST:PORT --processes="),
        (_FAR | {_URI: "x"}, r"OMPI_MCA_orte_hnp_uri does not tell where process 0 is \(.*; set --coordinator=HOST"),
        (_FAR | {_URI: "42.0;udp://10.0.0.7"}, r"OMPI_MCA_orte_hnp_uri does not tell where process 0 is \(.*; set --"),
        (_without(_OMPI, "OMPI_COMM_WORLD_LOCAL_SIZE"), "OMPI_COMM_WORLD_LOCAL_SIZE is not set; legal: a number"),
    ],
)
def test_what_a_scheduler_half_tells_is_refused_by_name(environment, message, monkeypatch):
    _set(environment, monkeypatch)
    with pytest.raises(ValueError, match=message):
        from_environment(1)


def test_the_flags_tell_who_a_process_is():
    assert from_flags(None, None, None) is None
    assert from_flags("node7:4000", 4, 3) == Place("node7:4000", 4, 3, [])
    assert from_flags("[::1]:4000", 4, 0) == Place("[::1]:4000", 4, 0, [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, 4, 3), "--coordinator is None, --processes 4, --process 3; legal: HOST:PORT of process 0, the number"),
        (("node7:4000", None, 3), "--coordinator is node7:4000, --processes None, --process 3; legal: HOST:PORT"),
        (("node7:4000", 4, None), "--coordinator is node7:4000, --processes 4, --process None; legal: HOST:PORT"),
        (("", 4, 3), "--coordinator is ''; legal: HOST:PORT of process 0, the port from 1 to 65535"),
        (("nocolon", 4, 3), "--coordinator is 'nocolon'; legal: HOST:PORT of process 0, the port from 1 to 65535"),
        (("host:99999", 4, 3), "--coordinator is 'host:99999'; legal: HOST:PORT of process 0"),
        (
            ("host:4000", 4, 4),
            "--process is 4 and --processes is 4; legal: from 1 to 1048576 processes, numbered from 0",
        ),
        (("host:4000", 4, -1), "--process is -1 and --processes is 4; legal: from 1 to 1048576 processes"),
        (("host:4000", 0, 0), "--process is 0 and --processes is 0; legal: from 1 to 1048576 processes"),
        (("host:4000", -5, -6), "--process is -6 and --processes is -5; legal: from 1 to 1048576 processes"),
    ],
)
def test_flags_that_cannot_be_are_refused_by_name(given, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        from_flags(*given)


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (["--wait=0"], {}, "flag --wait=0: 0 is not an integer in the range [1, 86400]; --help lists the flags"),
        (["--wait=-3"], {}, "flag --wait=-3: -3 is not an integer in the range [1, 86400]; --help lists the flags"),
        (["--heartbeat=0"], {}, "flag --heartbeat=0: 0 is not an integer in the range [1, 86400]; --help"),
        (["--heartbeat=99999999999"], {}, "flag --heartbeat=99999999999: 99999999999 is not an integer in the range"),
        (["--coordinator=host:", "--processes=2", "--process=1"], {}, "--coordinator is 'host:'; legal: HOST:PORT of"),
        ([], _SLURM | {"SLURM_PROCID": "16"}, "SLURM_PROCID is 16 and SLURM_NTASKS is 16; legal: from 1 to 1048576"),
        ([], _KUBERNETES | {"MOSAICS_SECRET": "short"}, "MOSAICS_SECRET has 5 letters; legal: 16 letters or more"),
    ],
)  # fmt: skip
def test_the_command_answers_in_one_line(flags, environment, message, monkeypatch, tmp_path):
    _set(environment, monkeypatch)
    command = [sys.executable, "-m", "launch.train", "--config=configs/tiny.py", f"--workdir={tmp_path}/run", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
