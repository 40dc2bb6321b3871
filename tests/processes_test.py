"""Who a process is, from what a scheduler tells it; what is refused; and the roll that names who is missing."""

import os

import jax
import pytest

from mosaics_jax import processes
from mosaics_jax.config import MeshConfig

_SLURM = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_NODELIST": "gpu[07-08,11]", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
}  # fmt: skip
_OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
}  # fmt: skip
_KUBERNETES = {"MOSAICS_COORDINATOR": "run-0-0.run:3333", "MOSAICS_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (_SLURM, processes.Place("gpu07:61452", 16, 9, [1])),
        (_SLURM | {"MOSAICS_PORT": "4000"}, processes.Place("gpu07:4000", 16, 9, [1])),
        (_SLURM | {"CUDA_VISIBLE_DEVICES": "1"}, processes.Place("gpu07:61452", 16, 9, [])),  # the only one it sees
        (_SLURM | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, processes.Place("gpu07:61452", 2, 1, [])),  # a node's
        (_SLURM | {"SLURM_STEP_NUM_TASKS": "16"}, processes.Place("gpu07:61452", 16, 9, [1])),
        (_SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),  # a shell within an allocation
        (_SLURM | {"SLURM_STEP_NUM_TASKS": ""}, processes.Place("gpu07:61452", 16, 9, [1])),
        (_OMPI, processes.Place("localhost:61711", 4, 2, [2])),
        (_KUBERNETES, processes.Place("run-0-0.run:3333", 4, 3, [])),
    ],
)
def test_the_environment_tells_who_a_process_is(environment, expected, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "MOSAICS_", "JOB_COMPLETION", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.from_environment(1) == expected


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("MOSAICS_COORDINATOR", "host:1")
    monkeypatch.delenv("MOSAICS_PROCESSES", raising=False)
    with pytest.raises(ValueError, match="MOSAICS_PROCESSES' is not a number in the environment"):
        processes.from_environment(1)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (_SLURM | {"SLURM_NTASKS": ""}, r"SLURM_NTASKS is ''; legal: a number \(start it by srun, or unset"),
        (_SLURM | {"SLURM_PROCID": "x"}, r"SLURM_PROCID is 'x'; legal: a number \(start it by srun, or unset"),
        (_SLURM | {"SLURM_LOCALID": ""}, r"SLURM_LOCALID is ''; legal: a number \(start it by srun, or unset"),
        (_SLURM | {"SLURM_STEP_NODELIST": ""}, r"SLURM_STEP_NODELIST is empty; start it by srun, or unset"),
        (_OMPI | {"OMPI_COMM_WORLD_SIZE": ""}, r"OMPI_COMM_WORLD_SIZE is ''; legal: a number \(start it by mpirun"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, r"OMPI_COMM_WORLD_LOCAL_SIZE is not set; legal: a number \(start it by mpirun"),
    ],
)
def test_what_a_scheduler_half_tells_is_refused_by_name(environment, message, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "MOSAICS_", "JOB_COMPLETION", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        processes.from_environment(1)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"no_proxy": "gpu07"}),
        ({"no_proxy": "a,b"}, {"no_proxy": "a,b,gpu07"}),
        ({"NO_PROXY": "a"}, {"no_proxy": "a,gpu07"}),
        ({"no_grpc_proxy": "c", "no_proxy": "a"}, {"no_grpc_proxy": "c,gpu07", "no_proxy": "a,gpu07"}),
    ],
)
def test_process_0_is_not_asked_of_a_proxy(before, after, monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy", *processes._PROXIES):
        monkeypatch.setenv(name, before.get(name, ""))
    processes._pass_proxies("gpu07:61452")
    assert all(os.environ[name] == before.get(name, "") for name in after)  # there is none
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    processes._pass_proxies("gpu07:61452")
    assert {name: os.environ[name] for name in after} == after


def test_other_processes_or_devices_than_the_config_says_are_refused():
    processes.check_devices(MeshConfig(processes=1, devices_per_process=1))
    with pytest.raises(ValueError, match=r"mesh.processes is 4, but 1 came; start 4 .*mesh.processes=0"):
        processes.check_devices(MeshConfig(processes=4))
    with pytest.raises(ValueError, match=r"mesh.devices_per_process is 8, but process 0 has 1 .*CUDA_VISIBLE_DEVICES"):
        processes.check_devices(MeshConfig(devices_per_process=8))


# The roll, which is called after a failure.


class _Roll:
    """The service that holds the roll: who has answered at each look; it ends with process 0 when there is no more."""

    def __init__(self, *looks):
        self.looks, self.said = iter(looks), []

    def key_value_set(self, key, _):
        self.said.append(key)

    def key_value_dir_get(self, folder):
        for look in self.looks:
            return [(f"{folder}{process}", "here") for process in look]
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses")


def _as_process(me, roll, monkeypatch):
    monkeypatch.setattr(processes.distributed.global_state, "client", roll)
    monkeypatch.setattr(processes.jax, "process_count", lambda: 4)
    monkeypatch.setattr(processes.jax, "process_index", lambda: me)


@pytest.mark.parametrize(
    ("looks", "said"),
    [
        ([[0, 1, 2, 3]], ""),
        ([[2], [2, 0], [3, 2, 0], *[[3, 2, 0]] * 20], "process 1 did not answer within 1 s; look at their logs first"),
        ([[2, 0]] * 20, "processes 1, 3 did not answer within 1 s; look at their logs first"),
        ([[2]], "process 0 has ended; look at its log first: if another process ended before it, it is named there"),
        ([], "process 0 has ended; look at its log first: if another process ended before it, it is named there"),
    ],
)
def test_the_roll_names_who_is_missing(looks, said, monkeypatch):
    roll = _Roll(*looks)
    _as_process(2, roll, monkeypatch)
    assert processes.roll_call(1) == said
    assert roll.said == ["mosaics/roll/2"] + ["mosaics/looked/2"] * ("ended" not in said)


def test_process_0_stays_until_all_have_looked_at_the_roll(monkeypatch):
    roll = _Roll([2], [2, 3], [1, 2, 3], [])
    _as_process(0, roll, monkeypatch)
    processes.stay_for_the_roll(60)
    assert next(roll.looks) == []  # the third look was the last
    processes.stay_for_the_roll(0)  # nor longer than it may
    _as_process(1, roll, monkeypatch)
    processes.stay_for_the_roll(60)
