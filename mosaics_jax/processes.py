"""Several processes as one run: that all of them came, that they have the devices they should, and what they say.

After `connect`, jax sees the devices of all processes.
"""

import contextlib
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed

from mosaics_jax import addresses, meeting
from mosaics_jax.config import MeshConfig
from mosaics_jax.schedulers import Place, from_environment

_PROXIES = ("grpc_proxy", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")

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
      ValueError: processes are missing, and which; or they disagree on their number; or the port cannot be had.
      OSError: jax could not start the service by which it connects them.
    """
    place = given or from_environment(wait)
    if place is None or place.processes == 1:
        return
    with contextlib.ExitStack() as held:
        # Numeric addresses: gRPC, by which jax speaks with process 0, looks names up by other means.
        host = bind = ""
        if place.process:
            host = bind = meeting.report(place, wait)
        else:
            host, bind = held.enter_context(meeting.gather(place, wait))
        _pass_proxies(host)
        global _patience
        _patience = wait
        _, port = addresses.split(place.coordinator, "the coordinator")
        try:
            jax.distributed.initialize(
                addresses.join(host, port), place.processes, place.process, place.local_devices,
                coordinator_bind_address=addresses.join(bind, port), initialization_timeout=wait,
                heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=wait,
            )  # fmt: skip
        except jax.errors.JaxRuntimeError as error:
            raise OSError(f"jax could not connect the processes at {addresses.join(bind, port)} ({error})") from error


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
        answer = _told(client, f"{key}/all", deadline + meeting.GRACE)
    else:
        said = [json.dumps(text)] + [_told(client, f"{key}/{process}", deadline) for process in range(1, count)]
        missing = [process for process, one in enumerate(said) if one is None]
        answer = json.dumps(missing) if missing else json.dumps({"said": said})
        client.key_value_set(f"{key}/all", answer)
    found = [0] if answer is None else json.loads(answer)
    if isinstance(found, list):
        raise Missing(f"{meeting.numbers(found)} did not come to {what!r} within {_patience} s; look at their logs")
    return [json.loads(one) for one in found["said"]]


def barrier(what: str) -> None:
    """Waits for all processes. Raises Missing, which names those that do not come."""
    exchange("", what)


def agree(problem: str, what: str) -> str:
    """The first problem that any process has, the same for all; "" where none has one."""
    return next(filter(None, exchange(problem, what)), "")


def first(action: Callable[[], None], what: str) -> None:
    """Has process 0 do something; where that raises a ValueError or an OSError, all raise it. All call this."""
    problem = ""
    if jax.process_index() == 0:
        try:
            action()
        except (ValueError, OSError) as error:
            if alone():
                raise
            problem = f"{OSError.__name__ if isinstance(error, OSError) else ValueError.__name__} {error}"
    if problem := agree(problem, what):
        kind, _, text = problem.partition(" ")
        raise OSError(text) if kind == OSError.__name__ else ValueError(text)


def same(fields: dict[str, str], what: str) -> None:
    """Raises the same ValueError on all processes where one has another text in a field than process 0. All call this.

    They compare a digest; the fields themselves come from process 0 and the first that differs alone.
    """
    digests = exchange(hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest(), what)
    differing = [process for process, digest in enumerate(digests) if digest != digests[0]]
    if not differing:
        return
    asked = jax.process_index() in (0, differing[0])
    said = exchange(json.dumps(fields) if asked else "", f"what differs in {what}")
    ours, theirs = json.loads(said[0]), json.loads(said[differing[0]])
    names = [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
    counts = [f"{len(names)} fields"] * (len(names) > 1) + [f"{len(differing)} processes"] * (len(differing) > 1)
    mine, other = _where_they_differ(ours.get(names[0], "nothing"), theirs.get(names[0], "nothing"))
    raise ValueError(
        f"process {differing[0]} differs from process 0 in {names[0]}: {other}, not {mine}"
        f"{' (in all ' + ' and '.join(counts) + ' differ)' if counts else ''}; start all with the same command"
    )


def _where_they_differ(one: str, other: str, most: int = 100) -> tuple[str, str]:
    """Both texts, of long ones what lies around the first letter that differs."""
    pairs = enumerate(itertools.zip_longest(one, other))
    begin = max(0, next((at for at, (mine, theirs) in pairs if mine != theirs), 0) - most // 2)
    shown = [
        ("..." if begin else "") + text[begin : begin + most] + ("..." if len(text) > begin + most else "")
        for text in (one, other)
    ]
    return shown[0], shown[1]


def roll_call(seconds: float = 5.0) -> str:
    """After a failure: which processes do not answer within so many seconds, as text; "" where all do."""
    if alone():
        return ""
    client: Any = distributed.global_state.client
    missing = list(range(jax.process_count()))
    try:
        client.key_value_set(f"mosaics/roll/{jax.process_index()}", "here")
        missing = _absent(client, "mosaics/roll/", missing, seconds)
    except jax.errors.JaxRuntimeError:  # the service that holds the keys is process 0's
        return "process 0 has ended; look at its log first: if another process ended before it, it is named there"
    return (
        f"{meeting.numbers(missing)} did not answer within {seconds:.0f} s; look at their logs first" if missing else ""
    )


def leave_last(seconds: float = 5.0) -> None:
    """Says that this process ends now. Process 0 waits until all others have said so, or so many seconds.

    It holds the service without which they would end from C++ code, with a dump in place of their own last words.
    """
    if alone():
        return
    client: Any = distributed.global_state.client
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(f"mosaics/leaving/{jax.process_index()}", "now")
        if jax.process_index() == 0:
            _absent(client, "mosaics/leaving/", list(range(1, jax.process_count())), seconds)


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
