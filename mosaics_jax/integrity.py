"""What proves that the files of a checkpoint are what was saved: fingerprints of arrays, and checksums of files.

`verified.json` lies in a checkpoint that was read back after its commit and agreed with the fingerprints that the
devices took; docs/checkpoint.md has its form.
"""

import errno
import pathlib
import re
import zlib
from collections.abc import Callable
from typing import Any

import tensorstore
from safetensors import SafetensorError

from mosaics_jax import fingerprint, processes, whole

ARRAYS = ("params", "optimizer", "counters")
VERIFIED = "verified.json"
_PIECE = 1 << 24  # bytes of a file that are looked at, at a time
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_DAMAGE = (ValueError, KeyError, TypeError, EOFError, RecursionError, zlib.error, SafetensorError)
_NO_DAMAGE = re.compile(
    "^(PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|UNKNOWN)"
)


class UnreadableError(OSError):
    """A checkpoint that could not be looked at: whether it is damaged is not known, and nothing of it is moved."""


def prove(directory: pathlib.Path, expected: dict[str, dict[str, int]]) -> str:
    """Reads a committed checkpoint back, and marks it where its arrays have these fingerprints; else what is wrong.

    Raises UnreadableError.
    """
    try:
        if wrong := differing(expected, {item: read(directory / item, slice(None)) for item in ARRAYS}):
            return f"{wrong} on the disk is not what was saved"
        marks = {"fingerprints": expected, "files": {name: _sum(directory / name) for name in _files(directory)}}
    except Exception as error:
        return damage_of(error)
    draft = directory.with_name(f"{directory.name}.removing")  # a life that ends here leaves what the next removes
    try:
        draft.mkdir()
        whole.write_json(draft / VERIFIED, marks)
        (draft / VERIFIED).replace(directory / VERIFIED)
        whole.keep_names(directory)
        draft.rmdir()
    except OSError as error:
        raise UnreadableError(f"{VERIFIED} cannot be written: {first_line(error)}") from error
    return ""


def fingerprints(directory: pathlib.Path) -> dict[str, dict[str, int]] | None:
    """Those that a verified checkpoint was saved with; None for one that no life came to verify.

    Raises DamagedError and OSError.
    """
    return _marks(directory)["fingerprints"] if (directory / VERIFIED).exists() else None


def _marks(directory: pathlib.Path) -> dict[str, Any]:
    marks = whole.read_json(directory / VERIFIED)
    prints = marks.get("fingerprints")
    right = (
        isinstance(prints, dict) and prints.keys() == set(ARRAYS) and all(isinstance(p, dict) for p in prints.values())
    )
    if not right or marks.keys() != {"fingerprints", "files"} or not isinstance(marks["files"], dict):
        raise whole.DamagedError(f"{VERIFIED} has other fields than it was written with")
    return marks


def differing(expected: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]) -> str:
    """The first array that has another fingerprint, or is not there; "" where all agree."""
    for item, names in expected.items():
        for name in sorted(names.keys() | found[item].keys()):
            if name not in found[item] or name not in names or int(names[name]) != int(found[item][name]):
                return f"{item}.{name}"
    return ""


def damage(directory: pathlib.Path, part: slice) -> str:
    """What is wrong with this part of a checkpoint's files, or "".

    One that was verified has a checksum of every file. One whose run ended before that is read, array by array. Raises
    UnreadableError.
    """
    try:
        if not (directory / VERIFIED).exists():
            for item in ARRAYS:
                read(directory / item, part)
            return ""
        files = _marks(directory)["files"]
        for name in sorted(files)[part]:
            if not (directory / name).is_file():
                return f"{name} is missing"
            if (found := _sum(directory / name)) != files[name]:
                what = "size" if found[0] != files[name][0] else "content"
                return f"{name} has another {what} than it was saved with"
    except Exception as error:
        return damage_of(error)
    return ""


def damage_of(error: Exception) -> str:
    """What an error says of the files that were read. Raises UnreadableError for one that speaks of the reading."""
    text = first_line(error)
    number = error.errno if isinstance(error, OSError) else None
    # TensorStore's, perhaps within one of Orbax's, and that of Rust.
    if found := re.search(r"\[os_error_code='(\d+)'\]|\(os error (\d+)\)", str(error)):
        number = int(found[1] or found[2])
    if number in _ABSENT or (number is None and isinstance(error, _DAMAGE) and not _NO_DAMAGE.match(text)):
        return text
    raise UnreadableError(text) from error


def agreed(look: Callable[[], str], what: str) -> str:
    """The first damage that `look` finds on any process, the same for all; all call it.

    Raises UnreadableError on all processes where one could not look.
    """
    found = unreadable = ""
    try:
        found = look()
    except UnreadableError as error:
        unreadable = str(error)
    if unreadable := processes.agree(unreadable, f"reading for {what}"):
        raise UnreadableError(f"{what}: it cannot be looked at ({unreadable}); nothing was moved, so mend that first")
    return processes.agree(found, what)


def read(item: pathlib.Path, part: slice) -> dict[str, int]:
    """The fingerprints of an item's arrays, from what lies on the disk."""
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}}  # a path: in a URL %, # and ? mean else
    keys = [key.decode() for key in tensorstore.KvStore.open(store).result().list().result()]
    names = sorted(key.removesuffix("/.zarray") for key in keys if key.endswith("/.zarray"))
    if not names:
        raise ValueError(f"{item.name} holds no arrays")
    found = {}
    for name in names[part]:
        spec = {"driver": "zarr", "kvstore": store | {"path": name}}
        found[name] = fingerprint.of_numpy(tensorstore.open(spec, read=True, open=True).result().read().result())
    return found


def _files(directory: pathlib.Path) -> list[str]:
    paths = (path for path in directory.rglob("*") if path.is_file() and path.name != VERIFIED)
    return sorted(str(path.relative_to(directory)) for path in paths)


def _sum(path: pathlib.Path) -> list[int]:
    """[size, CRC-32] of a file."""
    size = crc = 0
    with open(path, "rb") as stream:
        while piece := stream.read(_PIECE):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return [size, crc]


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
