"""Files as they are read: compressed or not, within the process's limit of open ones, and what their errors mean."""

import contextlib
import errno
import functools
import gzip
import io
import os
import pathlib
import resource
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from mosaics_jax.data.unpacked import DAMAGE, TooLargeError, unpacked_xz, unpacked_zst

# Called with how many more bytes of a file have been read.
Advance = Callable[[int], None]

COMPRESSIONS = (".gz", ".xz", ".zst")
_MOST_OPEN = 1 << 16
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


def meaning(error: OSError) -> str:
    """What an error of the system says, and what helps."""
    text = error.strerror or str(error)
    if error.errno == errno.EMFILE:
        return f"{text}: this process may have {open_files_limit()}; raise that before starting it (ulimit -n 65536)"
    if error.errno == errno.ENFILE:
        return f"{text}, on the whole machine; close some, or raise fs.file-max"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{text}; let this user read and write it"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{text}; make room"
    if error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO):
        return f"{text}: the disk or the file server failed, the file itself may be whole; try again"
    return text


def cannot_read(path: pathlib.Path | str, error: OSError, remedy: str) -> Exception:
    """What to raise for a file of ours: a ValueError with the remedy where it is gone, else an OSError."""
    if error.errno in _ABSENT:
        return ValueError(f"{str(path)!r} cannot be read ({error.strerror}); {remedy}")
    return OSError(error.errno, f"cannot be read ({meaning(error)})", str(path))


@functools.cache
def open_files_limit() -> int:
    """Files that this process may have open, raised as far as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_OPEN if hard == resource.RLIM_INFINITY else min(hard, _MOST_OPEN)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS has a limit of its own below the one it tells
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return _MOST_OPEN if soft == resource.RLIM_INFINITY else soft


class Kept:
    """Descriptors that stay open, by key. All of a process together leave half of its limit to others."""

    _lock = threading.Lock()
    _count = 0

    def __init__(self) -> None:
        self._handles: dict[int, tuple[int, ...]] = {}
        weakref.finalize(self, Kept._close, self._handles)

    def get(self, key: int) -> tuple[int, ...] | None:
        return self._handles.get(key)

    def keep(self, key: int, handles: tuple[int, ...]) -> bool:
        """Whether they are kept. If not, because of the limit or another thread, the caller closes them."""
        with Kept._lock:
            if key in self._handles or Kept._count + len(handles) > open_files_limit() // 2:
                return False
            Kept._count += len(handles)
            self._handles[key] = handles
            return True

    @staticmethod
    def _close(held: dict[int, tuple[int, ...]]) -> None:
        for handles in held.values():
            close_all(handles)
        with Kept._lock:
            Kept._count -= sum(map(len, held.values()))


def open_all(paths: tuple[str, ...], remedy: str) -> tuple[int, ...]:
    """Descriptors of files to read. Raises as `cannot_read`, and leaves none open then."""
    handles: list[int] = []
    for path in paths:
        try:
            handles.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            close_all(handles)
            raise cannot_read(path, error, remedy) from error
    return tuple(handles)


def close_all(handles: Any) -> None:
    for handle in handles:
        os.close(handle)


def guarded(path: pathlib.Path, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except DAMAGE as error:
        raise damaged(path, error) from error


def damaged(path: pathlib.Path | str, error: Exception) -> ValueError:
    """What to raise for a file that a user gave."""
    if isinstance(error, OSError) and error.errno is not None:
        return ValueError(f"{str(path)!r} cannot be read ({meaning(error)})")
    reason = " ".join(str(error).split())
    if isinstance(error, TooLargeError):
        return ValueError(f"{str(path)!r} cannot be read: {reason}")
    return ValueError(f"{str(path)!r} cannot be read ({reason}); the file is damaged or not what its suffix says")


@contextlib.contextmanager
def open_plain(path: pathlib.Path, advance: Advance) -> Iterator[BinaryIO]:
    """The decompressed bytes of a file; `advance` hears of the bytes of the file itself."""
    try:
        counted = _Counted(path, advance)
    except OSError as error:
        raise damaged(path, error) from error
    with io.BufferedReader(counted, 1 << 20) as raw:
        stream: Any = raw
        match path.suffix.lower():
            case ".gz":
                stream = gzip.open(raw)  # noqa: SIM115 (closed below)
            case ".xz":
                stream = unpacked_xz(raw)
            case ".zst":
                stream = unpacked_zst(raw)
        with stream:
            yield stream


class _Counted(io.FileIO):
    def __init__(self, path: pathlib.Path, advance: Advance):
        super().__init__(path)
        self._advance = advance

    def readinto(self, buffer: Any) -> int:
        size = super().readinto(buffer)
        self._advance(size or 0)
        return size or 0
