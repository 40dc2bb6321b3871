"""What Slurm, Open MPI and Kubernetes tell a process of its run. One process a GPU and one a node both work."""

import os
import re
from typing import NamedTuple

from jax._src.clusters import ompi_cluster, slurm_cluster


class Place(NamedTuple):
    """Where a process stands in a run."""

    coordinator: str  # host:port of process 0
    processes: int
    process: int
    local_devices: list[int]  # the GPUs it takes, by number in its node; empty: all that it sees


def from_environment(wait: int) -> Place | None:
    """What Open MPI, Slurm, or the environment of launch/kubernetes/train.yaml says; None where none is there.

    Raises ValueError where one of them has told only a half.
    """
    if "MOSAICS_COORDINATOR" in os.environ:
        return _kubernetes()
    if "OMPI_COMM_WORLD_SIZE" in os.environ:  # before Slurm, within whose jobs mpirun starts processes of its own
        return _open_mpi(wait)
    if slurm_cluster.SlurmCluster.is_env_present():
        return _slurm(wait)
    return None


def _kubernetes() -> Place:
    remedy = "legal: HOST:PORT, with MOSAICS_PROCESSES and JOB_COMPLETION_INDEX, as in launch/kubernetes/train.yaml"
    coordinator = os.environ["MOSAICS_COORDINATOR"]
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"MOSAICS_COORDINATOR is {coordinator!r}; {remedy}")
    return Place(coordinator, _number("MOSAICS_PROCESSES", remedy), _number("JOB_COMPLETION_INDEX", remedy), [])


def _open_mpi(wait: int) -> Place:
    def number(name: str) -> int:
        return _number(name, "legal: a number (start it by mpirun, or unset the variables OMPI_*)")

    processes, here = number("OMPI_COMM_WORLD_SIZE"), number("OMPI_COMM_WORLD_LOCAL_SIZE")
    if processes == here:
        address = f"localhost:{_port() or 61711}"
    elif "OMPI_MCA_orte_hnp_uri" in os.environ:
        address = ompi_cluster.OmpiCluster.get_coordinator_address(wait, _port())
    else:
        raise ValueError(
            "Open MPI 5 does not tell where process 0 is; set --coordinator=HOST:PORT "
            "--processes=$OMPI_COMM_WORLD_SIZE --process=$OMPI_COMM_WORLD_RANK"
        )
    local = number("OMPI_COMM_WORLD_LOCAL_RANK")
    return Place(address, processes, number("OMPI_COMM_WORLD_RANK"), _own_gpu(here > 1, local))


def _slurm(wait: int) -> Place | None:
    remedy = "start it by srun, or unset the variables SLURM_* to train alone"

    def number(name: str) -> int:
        return _number(name, f"legal: a number ({remedy})")

    # Of the step: a shell within an allocation is a step of one task, and is told of the allocation's all the same.
    tasks = number("SLURM_STEP_NUM_TASKS" if os.environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS")
    if tasks == 1:
        return None
    nodes = number("SLURM_STEP_NUM_NODES") if os.environ.get("SLURM_STEP_NUM_NODES") else 1
    if not os.environ["SLURM_STEP_NODELIST"]:
        raise ValueError(f"SLURM_STEP_NODELIST is empty; {remedy}")
    number("SLURM_JOB_ID")  # of which the port is made
    address = slurm_cluster.SlurmCluster.get_coordinator_address(wait, _port())
    return Place(address, tasks, number("SLURM_PROCID"), _own_gpu(tasks > nodes, number("SLURM_LOCALID")))


def _number(name: str, remedy: str) -> int:
    """The number that a scheduler gave. ValueError, naming the variable, where it is none."""
    found = os.environ.get(name)
    if found is None or not found.isdecimal():
        raise ValueError(f"{name} is {'not set' if found is None else repr(found)}; {remedy}")
    return int(found)


def _port() -> str | None:
    """The port that the user sets; None leaves it to the scheduler's number of the job."""
    found = os.environ.get("MOSAICS_PORT") or None
    if found and not (found.isdecimal() and 0 < int(found) < 1 << 16):
        raise ValueError(f"MOSAICS_PORT is {found!r}; legal: a number from 1 to 65535")
    return found


def _own_gpu(shared: bool, local: int) -> list[int]:
    """One GPU each where processes share a node, unless the launcher already shows each only its own."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [local] if shared and (visible is None or visible.count(",")) else []
