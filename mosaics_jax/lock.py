"""One writer of a folder at a time."""

import contextlib
import fcntl
import json
import logging
import os
import pathlib
import socket
import time
from collections.abc import Iterator

# A file server frees the locks of a node that died only when it has missed it for so long.
_LEASE = 120.0


class HeldError(ValueError):
    """Another process holds the lock."""


@contextlib.contextmanager
def hold(path: pathlib.Path, what: str) -> Iterator[None]:
    """Holds the lock file `path`, which is made, until the context ends or the process does, however it ends.

    A lock of another node is waited for as long as it may be one of a node that died. Where the file system has no
    locks, a warning says so. `what` is written to, in the message.

    Raises HeldError.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _lock(handle, path, what)
        if not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
            raise HeldError(f"another process has just written {what}; look at what is there now")
        os.truncate(handle, 0)
        os.pwrite(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, path: pathlib.Path, what: str) -> None:
    deadline = time.monotonic() + _LEASE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            holder = _holder(handle)
            if holder.get("host") in (None, socket.gethostname()) or time.monotonic() > deadline:
                raise HeldError(
                    f"another process is writing {what} (process {holder.get('pid', 'unknown')} on "
                    f"{holder.get('host', 'unknown')}); wait until it has ended, or end it"
                ) from error
            time.sleep(1)
        except OSError as error:  # Lustre without -o flock, some FUSE file systems
            logging.getLogger(__name__).warning(
                "the file system of %s has no locks (%s): see to it that no second process writes %s",
                path.parent, error.strerror, what,
            )  # fmt: skip
            return


def _holder(handle: int) -> dict[str, object]:
    """Who holds the lock, as far as it has said."""
    try:
        found = json.loads(os.pread(handle, 1000, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
