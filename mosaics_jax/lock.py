"""One writer of a folder at a time, on any file system that several nodes share.

The lock is a file with its holder's name in it, which the holder changes every few seconds: a beat. So it ends with the
holder, however that ends, also where the file system has no locks (NFS without them, Lustre without -o flock) or has
them for one node alone (Lustre with -o localflock). No two clocks are compared: who waits looks for changes.

Where flock(2) works, it tells at once, and for certain, of processes of the same node.
"""

import contextlib
import fcntl
import json
import logging
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

_BEAT = 5.0  # seconds between the holder's changes
_LEASE = 60.0  # seconds without a change, after which the holder is taken for dead
_SETTLE = 3.0  # seconds until what one node writes is seen by the others
_LOST = 1  # the exit code of a process whose lock was taken


class HeldError(ValueError):
    """Another process holds the lock."""


@contextlib.contextmanager
def hold(path: pathlib.Path, what: str) -> Iterator[None]:
    """Holds the lock file `path`, which is made, until the context ends or the process does, however it ends.

    A lock whose holder is on another node, and did not give it back, is watched for as long as it may be a dead one's.
    A process that finds its lock taken, as after it was stopped for a minute, ends at once. `what` is written to, in
    the message.

    Raises HeldError, and OSError where the file cannot be written.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    stop = threading.Event()
    beats: threading.Thread | None = None
    try:
        mine = _myself() | {"key": secrets.token_hex(8)}
        _take(handle, path, mine, what)
        beats = threading.Thread(target=_beat, args=(path, mine, what, stop), name="lock", daemon=True)
        beats.start()
        yield
    finally:
        stop.set()
        if beats is not None:
            beats.join(_BEAT)
            with contextlib.suppress(OSError):
                if _read(path).get("key") == mine["key"]:
                    os.ftruncate(handle, 0)  # given back: nobody waits for it
        os.close(handle)


def _take(handle: int, path: pathlib.Path, mine: dict[str, Any], what: str) -> None:
    locks = _flock(handle, path, mine, what)
    before = _read(path)
    if before and not _surely_ended(before, mine, locks):
        _watch(path, before, what)
    if not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
        raise HeldError(f"another process has just written {what}; look at what is there now")
    _write(path, mine, 0)
    if not locks:
        time.sleep(_SETTLE)  # of two that take it at once, the last to write has it
    if (now := _read(path)).get("key") != mine["key"]:
        raise _held(now, what)


def _flock(handle: int, path: pathlib.Path, mine: dict[str, Any], what: str) -> bool:
    """Whether the file system has locks; if so this process has it now. Raises HeldError.

    A file server frees the lock of a node that died only when it has missed it for a while.
    """
    deadline, before = time.monotonic() + 2 * _LEASE, _read(path)
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError as error:
            now = _read(path)
            if now.get("boot") in (None, mine["boot"]) or now != before or time.monotonic() > deadline:
                raise _held(now, what) from error
            time.sleep(min(1.0, _LEASE / 4))
        except OSError:  # no locks there
            return False


def _surely_ended(before: dict[str, Any], mine: dict[str, Any], locks: bool) -> bool:
    """Whether a holder that did not give the lock back is known to have ended, without waiting for a beat of it."""
    if before.get("boot") not in (None, mine["boot"]):  # None: an older version's, which had nothing but locks
        return False
    return locks or (before.get("space") == mine["space"] and not _alive(before.get("pid")))


def _watch(path: pathlib.Path, before: dict[str, Any], what: str) -> None:
    """Returns once the holder is taken for dead, or gives the lock back. Raises HeldError where it lives."""
    logging.getLogger(__name__).warning(
        "process %s on %s was writing %s, and may have died; waiting for %.0f s to see",
        before.get("pid", "unknown"), before.get("host", "unknown"), what, _LEASE,
    )  # fmt: skip
    deadline = time.monotonic() + _LEASE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, _LEASE / 4))
        now = _read(path)
        if not now:
            return
        if now != before:
            raise _held(now, what)


def _myself() -> dict[str, Any]:
    """Who this process is: its node, which two containers may be on, and the numbers of processes that it sees."""
    boot = space = socket.gethostname()
    with contextlib.suppress(OSError):  # Linux tells
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return {"host": socket.gethostname()[:64], "pid": os.getpid(), "boot": boot, "space": space}


def _held(holder: dict[str, Any], what: str) -> HeldError:
    return HeldError(
        f"another process is writing {what} (process {holder.get('pid', 'unknown')} on "
        f"{holder.get('host', 'unknown')}); wait until it has ended, or end it"
    )


def _beat(path: pathlib.Path, mine: dict[str, Any], what: str, stop: threading.Event) -> None:
    number = 0
    while not stop.wait(_BEAT):
        number += 1
        with contextlib.suppress(OSError):  # a disk that is full or away is for others to report
            holder = _read(path)
            if holder and holder.get("key") != mine["key"]:
                message = f"failed: {_held(holder, what)}; this one stood still, and its lock was taken"
                print(message, file=sys.__stderr__, flush=True)
                os._exit(_LOST)
            if path.exists():  # a folder that was removed is not made again
                _write(path, mine, number)


def _alive(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _read(path: pathlib.Path) -> dict[str, Any]:
    """Who holds the lock, as far as it says; opened anew, or a file server would show what was."""
    try:
        with open(path, "rb") as stream:
            found = json.loads(stream.read(1000))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: pathlib.Path, mine: dict[str, Any], beat: int) -> None:
    """In place and always of one size, so that a disk that is full takes it."""
    with open(path, "r+b", buffering=0) as stream:  # closing brings it to a file server
        stream.write(json.dumps(mine | {"beat": beat}).encode().ljust(500))
        stream.truncate(500)
