"""Files that are whole or absent, and small JSON files that tell by themselves whether they are damaged."""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

DIGEST = "digest"  # the field of a JSON file that holds the sha256 of all others
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


class DamagedError(ValueError):
    """A file does not hold what was written."""


def write(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that is whole or absent: a draft beside it, on the disk, then one rename. Raises OSError."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(draft, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
        keep_names(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # a write alone names no file


def keep_names(folder: pathlib.Path) -> None:
    """Brings what was made, renamed or removed in a folder to the disk, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace_folder(draft: pathlib.Path, target: pathlib.Path) -> pathlib.Path | None:
    """Puts the folder `draft` in the place of `target`, which may be there; returns where the old one lies, if any.

    The two change places in one step where the file system can do that (not NFS); else `target` is absent for a moment.
    Raises OSError.
    """
    if not target.exists():
        os.rename(draft, target)
        keep_names(target.parent)
        return None
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is not None:
        if swap(_HERE, os.fsencode(draft), _HERE, os.fsencode(target), _EXCHANGE) == 0:
            keep_names(target.parent)
            return draft
        if (number := ctypes.get_errno()) not in _UNSUPPORTED:
            raise OSError(number, os.strerror(number), str(target))
    old = draft.with_name(f"{draft.name}.old")
    os.rename(target, old)
    os.rename(draft, target)
    keep_names(target.parent)
    return old


def digest(body: Any) -> str:
    """sha256 of JSON values: the same before they are written and after they are read."""
    plain = json.loads(json.dumps(body))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
    """`body` with the digest of its fields."""
    return {**body, DIGEST: digest(body)}


def opened(body: Any) -> dict[str, Any]:
    """The fields of what `sealed` made, or of an object without a digest, which an older version wrote.

    Without one, readers must refuse fields that they do not know: a flipped bit may lie in the digest's name.

    Raises DamagedError.
    """
    if not isinstance(body, dict):
        raise DamagedError(f"a {type(body).__name__}; legal: an object")
    fields = {name: value for name, value in body.items() if name != DIGEST}
    if DIGEST in body and body[DIGEST] != digest(fields):
        raise DamagedError(f"its {DIGEST} is not that of its fields")
    return fields


def write_json(path: pathlib.Path, body: Mapping[str, Any]) -> None:
    """Writes a sealed JSON file, whole or not at all. Raises OSError."""
    write(path, (json.dumps(sealed(body), indent=1) + "\n").encode())


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The fields of a JSON file that was sealed. Raises DamagedError, and OSError where it cannot be looked at."""
    return opened(load_json(path))


def load_json(path: pathlib.Path) -> Any:
    """What a JSON file holds. Raises DamagedError, and OSError where it cannot be looked at."""
    content = path.read_bytes()
    try:
        return json.loads(content)
    except RecursionError as error:
        raise DamagedError("it is nested too deep") from error
    except ValueError as error:
        raise DamagedError(f"it is not JSON: {error}") from error
