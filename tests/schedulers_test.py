"""Who a process is, from what a scheduler tells it, and what is refused."""

import os

import pytest

from mosaics_jax.schedulers import Place, from_environment

_SLURM = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_NODELIST": "gpu[07-08,11]", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
}  # fmt: skip
_OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
}  # fmt: skip
_KUBERNETES = {"MOSAICS_COORDINATOR": "run-0-0.run:3333", "MOSAICS_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"}


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
        (_KUBERNETES | {"MOSAICS_COORDINATOR": ""}, "MOSAICS_COORDINATOR is ''; legal: HOST:PORT, with"),
        (_KUBERNETES | {"MOSAICS_COORDINATOR": "run"}, "MOSAICS_COORDINATOR is 'run'; legal: HOST:PORT, with"),
        ({"MOSAICS_COORDINATOR": "host:1"}, "MOSAICS_PROCESSES is not set; legal: HOST:PORT, with"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, r"OMPI_COMM_WORLD_LOCAL_SIZE is not set; legal: a number \(start it by mpirun"),
    ],
)
def test_what_a_scheduler_half_tells_is_refused_by_name(environment, message, monkeypatch):
    _set(environment, monkeypatch)
    with pytest.raises(ValueError, match=message):
        from_environment(1)
