"""A run of several processes as a scheduler sees it: started together, watched, killed, and started again."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import helpers
import numpy as np
import tensorstore

from mosaics_jax import config as config_lib

ROOT = pathlib.Path(__file__).parents[2]
PATIENCE = 500  # seconds until what does not come is given up: other tests run beside it


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Job:
    """One life of a run: its processes, each in a group of its own with its data workers."""

    def __init__(
        self, config: config_lib.Config, workdir: pathlib.Path, ranks: int = 2, fault: str = "", heartbeat: int = 10
    ):
        """`fault` is done inside the processes, as rank.py says."""
        self.workdir, self.began = workdir, time.monotonic()
        self._ranks: list[subprocess.Popen] = []
        self._pipes: list[subprocess.Popen] = []
        port = free_port()
        for rank in range(ranks):
            command = [
                sys.executable, str(ROOT / "tests" / "faults" / "rank.py"), fault or "none",
                *helpers.command_line(config), f"--workdir={workdir}", f"--coordinator=localhost:{port}",
                f"--processes={ranks}", f"--process={rank}", "--wait=200", f"--heartbeat={heartbeat}",
            ]  # fmt: skip
            # Little compilation: the first life of every other config compiles, into a folder beside the runs.
            environment = helpers.OPTIMISED | {
                "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": "--xla_backend_optimization_level=0",
            }  # fmt: skip
            environment.pop("JAX_COMPILATION_CACHE_DIR", None)
            # Through a pipe: a limit on the size of files is not to reach the log.
            with open(self._log(rank), "ab") as log:
                pipe = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log, start_new_session=True)
            self._ranks.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=pipe.stdin, stderr=pipe.stdin, start_new_session=True
                )
            )
            pipe.stdin.close()
            self._pipes.append(pipe)

    def _log(self, rank: int) -> pathlib.Path:
        return self.workdir.with_name(f"{self.workdir.name}.{rank}.log")

    def log(self, rank: int = 0) -> str:
        return self._log(rank).read_text(errors="replace")

    def signal(self, number: int, ranks: Sequence[int] | None = None) -> Sequence[int]:
        """To the processes themselves, as a scheduler sends it; SIGKILL reaches their data workers too."""
        ranks = range(len(self._ranks)) if ranks is None else ranks
        for rank in ranks:
            if self._ranks[rank].poll() is None:
                if number == signal.SIGKILL:
                    os.killpg(self._ranks[rank].pid, number)
                else:
                    self._ranks[rank].send_signal(number)
        return ranks

    def workers(self, rank: int = 0) -> list[int]:
        """The process numbers of a rank's data workers."""
        threads = pathlib.Path(f"/proc/{self._ranks[rank].pid}/task").iterdir()
        children = [int(pid) for thread in threads for pid in (thread / "children").read_text().split()]
        return [pid for pid in children if b"spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()]

    def running(self) -> bool:
        return all(rank.poll() is None for rank in self._ranks)

    def wait_for(self, what: Callable[[], bool], seconds: float = PATIENCE) -> bool:
        """Until `what` holds; False where a process ends before."""
        deadline = time.monotonic() + seconds
        while not what():
            if not self.running():
                return False
            if time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"waited {seconds} s in vain: {self.log()[-3000:]}")
            time.sleep(0.005)
        return True

    def end(self, seconds: float = PATIENCE) -> list[int]:
        """As srun --kill-on-bad-exit: waits for the first process that fails, or for all; then kills what is left.

        Returns their exit codes; negative: the signal.
        """
        deadline = time.monotonic() + seconds
        while any(rank.poll() is None for rank in self._ranks) and time.monotonic() < deadline:
            if any(rank.poll() not in (None, 0) for rank in self._ranks):
                deadline = min(deadline, time.monotonic() + 15)  # what srun gives the others
            time.sleep(0.01)
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)  # what is left of it, workers too
            rank.wait()
        for pipe in self._pipes:
            pipe.wait()
        return [rank.returncode for rank in self._ranks]

    def failed_after(self, since: float, struck: Sequence[int], seconds: float = PATIENCE) -> float:
        """Seconds from `since` until a process ends that was not struck itself."""
        others = [rank for number, rank in enumerate(self._ranks) if number not in struck]
        while others and all(rank.poll() is None for rank in others):
            assert time.monotonic() - since < seconds, self.log()[-3000:]
            time.sleep(0.01)
        return time.monotonic() - since


def records(workdir: pathlib.Path, kind: str) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    found = []
    for line in path.read_text().split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["kind"] == kind:
            found.append(record)
    return found


def last_step(workdir: pathlib.Path) -> int:
    return max((record["step"] for record in records(workdir, "train")), default=0)


def arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint, weights and optimiser, as they lie on the disk."""
    newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    found = {}
    for item in ("params", "optimizer", "counters"):
        files = {"driver": "file", "path": f"{workdir / 'checkpoints' / str(newest) / item}/"}
        store = {"driver": "ocdbt", "base": files}
        for key in tensorstore.KvStore.open(store).result().list().result():
            if key.endswith(b"/.zarray"):
                name = key.decode().removesuffix("/.zarray")
                spec = {"driver": "zarr", "kvstore": store | {"path": name}}
                found[f"{item}.{name}"] = tensorstore.open(spec, read=True, open=True).result().read().result()
    return found


def identical(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """To the bit, NaN included."""
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)
