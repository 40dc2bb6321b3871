"""What Slurm, Open MPI and Kubernetes tell a process of its run. One process a GPU and one a node both work."""

import os
import re
from typing import NamedTuple

from jax._src.clusters import ompi_cluster, slurm_cluster

from mosaics_jax import addresses

_MOST_PROCESSES = 1 << 20


class Place(NamedTuple):
    """Where a process stands in a run."""

    coordinator: str  # host:port of process 0
    processes: int
    process: int
    local_devices: list[int]  # the GPUs it takes, by number in its node; empty: all that it sees


def from_flags(coordinator: str | None, processes: int | None, process: int | None) -> Place | None:
    """What --coordinator, --processes and --process say; None where none is set. ValueError where only some are."""
    if coordinator is None and processes is None and process is None:
        return None
    if coordinator is None or processes is None or process is None:
        raise ValueError(
            f"--coordinator is {coordinator}, --processes {processes}, --process {process}; "
            "legal: HOST:PORT of process 0, the number of processes, and a number below it"
        )
    addresses.split(coordinator, "--coordinator")
    return _checked(Place(coordinator, processes, process, []), "--process", "--processes")


def from_environment(wait: int) -> Place | None:
    """What Open MPI, Slurm, or the environment of launch/kubernetes/train.yaml says; None where none is there.

    Raises ValueError where one of them has told only a half, or what cannot be.
    """
    if "MOSAICS_COORDINATOR" in os.environ or "MOSAICS_PROCESSES" in os.environ:
        return _kubernetes()
    if any(name.startswith("OMPI_COMM_WORLD_") for name in os.environ):  # before Slurm, within whose jobs mpirun starts
        return _open_mpi(wait)
    # A shell of a batch job is no step: it has a number, 0, and no list of nodes, and a run there is alone.
    if "SLURM_STEP_NODELIST" in os.environ or os.environ.get("SLURM_PROCID", "0") != "0":
        return _slurm(wait)
    return None


def _kubernetes() -> Place:
    remedy = "legal: HOST:PORT, with MOSAICS_PROCESSES and JOB_COMPLETION_INDEX, as in launch/kubernetes/train.yaml"
    coordinator = os.environ.get("MOSAICS_COORDINATOR")
    if not coordinator:
        raise ValueError(f"MOSAICS_COORDINATOR is {'not set' if coordinator is None else 'empty'}; {remedy}")
    addresses.split(coordinator, "MOSAICS_COORDINATOR")
    names = ("JOB_COMPLETION_INDEX", "MOSAICS_PROCESSES")
    process, processes = (_number(name, remedy) for name in names)
    return _checked(Place(coordinator, processes, process, []), *names)


def _open_mpi(wait: int) -> Place:
    def number(name: str) -> int:
        return _number(name, "legal: a number (start it by mpirun, or unset the variables OMPI_*)")

    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    process, processes = map(number, names)
    here, local = number("OMPI_COMM_WORLD_LOCAL_SIZE"), number("OMPI_COMM_WORLD_LOCAL_RANK")
    address = f"localhost:{_port() or 61711}" if processes == here else _open_mpi_address(wait)
    return _checked(Place(address, processes, process, _own_gpu(here > 1, local)), *names)


def _open_mpi_address(wait: int) -> str:
    by_hand = "set --coordinator=HOST:PORT --processes=$OMPI_COMM_WORLD_SIZE --process=$OMPI_COMM_WORLD_RANK"
    port = _port()
    if "OMPI_MCA_orte_hnp_uri" not in os.environ:
        raise ValueError(f"Open MPI 5 does not tell where process 0 is; {by_hand}")
    try:
        host, _, number = ompi_cluster.OmpiCluster.get_coordinator_address(wait, port).rpartition(":")
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"OMPI_MCA_orte_hnp_uri does not tell where process 0 is ({error}); {by_hand}") from error
    return addresses.join(host, int(number))


def _slurm(wait: int) -> Place | None:
    remedy = "start it by srun, or unset the variables SLURM_* to train alone"

    def number(name: str) -> int:
        return _number(name, f"legal: a number ({remedy})")

    # Of the step: a shell within an allocation is a step of one task, and is told of the allocation's all the same.
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS" if os.environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS")
    process, tasks = map(number, names)
    if tasks == 1 and process == 0:
        return None
    nodes = number("SLURM_STEP_NUM_NODES") if os.environ.get("SLURM_STEP_NUM_NODES") else 1
    if not os.environ.get("SLURM_STEP_NODELIST"):
        found = "not set" if "SLURM_STEP_NODELIST" not in os.environ else "empty"
        raise ValueError(f"SLURM_STEP_NODELIST is {found}; {remedy}")
    number("SLURM_JOB_ID")  # of which the port is made
    address = slurm_cluster.SlurmCluster.get_coordinator_address(wait, _port())
    addresses.split(address, "the first node of SLURM_STEP_NODELIST, with its port,")
    return _checked(Place(address, tasks, process, _own_gpu(tasks > nodes, number("SLURM_LOCALID"))), *names)


def _checked(place: Place, process: str, processes: str) -> Place:
    """`place`, whose numbers have these names. ValueError where it cannot be one."""
    if not 0 <= place.process < place.processes <= _MOST_PROCESSES:
        raise ValueError(
            f"{process} is {place.process} and {processes} is {place.processes}; legal: from 1 to {_MOST_PROCESSES} "
            "processes, numbered from 0 to one less"
        )
    return place


def _number(name: str, remedy: str) -> int:
    """The number that a scheduler gave. ValueError, naming the variable, where it is none."""
    found = os.environ.get(name)
    if found is None or not re.fullmatch("[0-9]{1,18}", found):
        raise ValueError(f"{name} is {'not set' if found is None else repr(found)}; {remedy}")
    return int(found)


def _port() -> str | None:
    """The port that the user sets; None leaves it to the scheduler's number of the job."""
    found = os.environ.get("MOSAICS_PORT") or None
    if found and not (re.fullmatch("[0-9]{1,5}", found) and 0 < int(found) < 1 << 16):
        raise ValueError(f"MOSAICS_PORT is {found!r}; legal: a number from 1 to 65535")
    return found


def _own_gpu(shared: bool, local: int) -> list[int]:
    """One GPU each where processes share a node, unless the launcher already shows each only its own."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [local] if shared and (visible is None or visible.count(",")) else []
