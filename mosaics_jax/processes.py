"""Several processes as one run: that all of them came, that they have the devices they should, and what they say.

After `connect`, jax sees the devices of all processes.
"""

import contextlib
import itertools
import json
import os
import socket
import time
from typing import Any

import jax
from jax._src import distributed

from mosaics_jax.config import MeshConfig
from mosaics_jax.schedulers import Place, from_environment

_PROXIES = ("grpc_proxy", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
_GRACE = 20  # seconds that process 0 may have started later, and so wait longer for the rest

_patience = 300  # seconds in which all must come to a meeting; `connect` sets it
_meetings = itertools.count()  # all processes hold the same ones in the same order


class Missing(RuntimeError):
    """Processes that did not come to a meeting in time, by number."""


def connect(given: Place | None, wait: int, heartbeat: int) -> None:
    """Joins the run that the environment or `given` describes; alone, does nothing.

    Args:
      wait: seconds in which all processes must have come.
      heartbeat: seconds after which a silent process is taken for dead, and every other ends, naming it.

    Raises:
      ValueError: processes are missing, and which; or they disagree on their number.
    """
    place = given or from_environment(wait)
    if place is None or place.processes == 1:
        return
    deadline = time.monotonic() + wait
    host = _report(place, deadline, wait) if place.process else _gather(place, deadline, wait)
    _pass_proxies(host)
    global _patience
    _patience = wait
    # The numeric address at which process 0 was met: gRPC, by which jax speaks with it, looks names up by other means.
    port = place.coordinator.rpartition(":")[2]
    jax.distributed.initialize(
        f"[{host}]:{port}" if ":" in host else f"{host}:{port}", place.processes, place.process, place.local_devices,
        coordinator_bind_address=f"[::]:{port}", initialization_timeout=wait, heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=wait,
    )  # fmt: skip


def _pass_proxies(host: str) -> None:
    """Keeps gRPC from asking a web proxy of the cluster for process 0."""
    if not any(os.environ.get(name) for name in _PROXIES):
        return
    for name in ("no_proxy", "no_grpc_proxy"):
        if name == "no_proxy" or os.environ.get(name):  # the second, where it is set, is read instead of the first
            os.environ[name] = ",".join(filter(None, [os.environ.get(name) or os.environ.get(name.upper()), host]))


def alone() -> bool:
    """Whether this run has one process."""
    return jax.process_count() == 1


def check_devices(mesh: MeshConfig) -> None:
    """Raises ValueError where there are other processes or devices than the config says."""
    if mesh.processes not in (0, jax.process_count()):
        raise ValueError(
            f"mesh.processes is {mesh.processes}, but {jax.process_count()} came; start {mesh.processes} (srun "
            "--ntasks, or --processes), or set --config.mesh.processes=0 to take any number"
        )
    here = jax.local_device_count()
    if mesh.devices_per_process not in (0, here):
        raise ValueError(
            f"mesh.devices_per_process is {mesh.devices_per_process}, but process {jax.process_index()} has {here} "
            f"({jax.local_devices()[0].device_kind}); check CUDA_VISIBLE_DEVICES and the GPUs asked of the scheduler, "
            "or set --config.mesh.devices_per_process=0 to take any number"
        )


def exchange(text: str, what: str) -> list[str]:
    """What every process says, in their order: a meeting that all must come to. Alone, [text].

    Process 0 collects and tells all, so the messages grow with the number of processes and not with its square.

    Raises:
      Missing: who did not come; `what` names the meeting.
    """
    count, me = jax.process_count(), jax.process_index()
    if count == 1:
        return [text]
    client: Any = distributed.global_state.client
    key = f"mosaics/{next(_meetings)}/{what}"
    deadline = time.monotonic() + _patience
    if me:
        client.key_value_set(f"{key}/{me}", json.dumps(text))
        answer = _told(client, f"{key}/all", deadline + _GRACE)
    else:
        said = [json.dumps(text)] + [_told(client, f"{key}/{process}", deadline) for process in range(1, count)]
        missing = [process for process, one in enumerate(said) if one is None]
        answer = json.dumps(missing) if missing else json.dumps({"said": said})
        client.key_value_set(f"{key}/all", answer)
    found = [0] if answer is None else json.loads(answer)
    if isinstance(found, list):
        raise Missing(f"{_numbers(found)} did not come to {what!r} within {_patience} s; look at their logs")
    return [json.loads(one) for one in found["said"]]


def barrier(what: str) -> None:
    """Waits for all processes. Raises Missing, which names those that do not come."""
    exchange("", what)


def agree(problem: str, what: str) -> str:
    """The first problem that any process has, the same for all; "" where none has one."""
    return next(filter(None, exchange(problem, what)), "")


def roll_call(seconds: float = 5.0) -> str:
    """After a failure: which processes do not answer within so many seconds, as text; "" where all do."""
    if alone():
        return ""
    client: Any = distributed.global_state.client
    missing = list(range(jax.process_count()))
    try:
        client.key_value_set(f"mosaics/roll/{jax.process_index()}", "here")
        missing = _absent(client, "mosaics/roll/", missing, seconds)
        client.key_value_set(f"mosaics/looked/{jax.process_index()}", "yes")
    except jax.errors.JaxRuntimeError:  # the service that holds the keys is process 0's
        return "process 0 has ended; look at its log first: if another process ended before it, it is named there"
    return f"{_numbers(missing)} did not answer within {seconds:.0f} s; look at their logs first" if missing else ""


def stay_for_the_roll(seconds: float = 5.0) -> None:
    """Keeps process 0, whose service holds the roll, until all others have looked at it, or so many seconds."""
    if jax.process_index() == 0:
        client: Any = distributed.global_state.client
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _absent(client, "mosaics/looked/", list(range(1, jax.process_count())), seconds)


def _absent(client: Any, folder: str, processes: list[int], seconds: float) -> list[int]:
    """Those of `processes` that set no key in `folder` within so many seconds."""
    deadline = time.monotonic() + seconds
    while processes and time.monotonic() < deadline:
        time.sleep(0.1)
        came = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(folder)}
        processes = [process for process in processes if process not in came]
    return processes


def _told(client: Any, key: str, deadline: float) -> str | None:
    try:
        return client.blocking_key_value_get(key, max(1, int(1000 * (deadline - time.monotonic()))))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return None
        raise


def _gather(place: Place, deadline: float, wait: int) -> str:
    """Process 0 waits until all have reported, and tells them so, or who is missing. Returns its own address.

    jax alone would end the process from C++ code, without a word on who did not come.
    """
    port = int(place.coordinator.rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    came: dict[int, socket.socket] = {}
    problem = ""
    with socket.create_server(("", port), family=family, backlog=place.processes, dualstack_ipv6=dual) as server:
        while len(came) < place.processes - 1 and not problem:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, place.processes)) - set(came))
                problem = f"{_numbers(missing)} did not come within {wait} s; look at their logs, or raise --wait"
                break
            process, processes = _hello(connection)
            if processes is None:  # somebody else's connection
                connection.close()
            elif processes != place.processes:
                problem = f"process {process} was started for {processes} processes, process 0 for {place.processes}"
                came[-1] = connection
            elif process in came or process == 0:
                problem = f"two processes have number {process}"
                came[-1] = connection
            else:
                came[process] = connection
        for connection in came.values():
            with connection:
                connection.sendall(f"{problem}\n".encode())
    if problem:
        raise ValueError(problem)
    return "127.0.0.1"


def _hello(connection: socket.socket) -> tuple[int, int | None]:
    connection.settimeout(5)
    try:
        process, processes = map(int, connection.makefile().readline().split())
    except (OSError, ValueError):
        return 0, None
    return process, processes


def _report(place: Place, deadline: float, wait: int) -> str:
    """Tells process 0 that this one has come, and waits for its word. Returns the address at which it was."""
    host, _, port = place.coordinator.rpartition(":")
    while True:
        left = max(0.01, deadline - time.monotonic())
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as connection:
                address: str = connection.getpeername()[0]
                connection.settimeout(left + _GRACE)
                connection.sendall(f"{place.process} {place.processes}\n".encode())
                answer = connection.makefile().readline()
            if not answer.endswith("\n"):
                raise ConnectionError("no answer")
            break
        except OSError as error:
            if time.monotonic() + 0.2 > deadline:
                raise ValueError(
                    f"process 0 was not at {place.coordinator} within {wait} s ({error}); is it running, and is that "
                    "its address as seen from here (--coordinator)?"
                ) from error
            time.sleep(0.2)
    if answer.strip():
        raise ValueError(answer.strip())
    return address


def _numbers(missing: list[int]) -> str:
    shown = ", ".join(map(str, missing[:20])) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
    return f"process{'es' if len(missing) > 1 else ''} {shown}"
