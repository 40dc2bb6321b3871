"""What proves that the files of a checkpoint are what was saved: fingerprints of arrays, and checksums of files.

`verified.json` lies in a checkpoint that was read back after its commit and agreed with the fingerprints that the
devices took; docs/checkpoint.md has its form.
"""

import json
import pathlib
import zlib
from typing import Any

import tensorstore

from mosaics_jax import fingerprint

ARRAYS = ("params", "optimizer", "counters")
VERIFIED = "verified.json"
_PIECE = 1 << 24  # bytes of a file that are looked at, at a time


def prove(directory: pathlib.Path, expected: dict[str, dict[str, int]]) -> str:
    """Reads a committed checkpoint back, and marks it where its arrays have these fingerprints; else what is wrong."""
    try:
        if wrong := differing(expected, {item: read(directory / item, slice(None)) for item in ARRAYS}):
            return f"{wrong} on the disk is not what was saved"
    except Exception as error:  # TensorStore raises many kinds for a damaged directory
        return first_line(error)
    marks = {"fingerprints": expected, "files": {name: _sum(directory / name) for name in _files(directory)}}
    draft = directory.with_name(f"{directory.name}.removing")  # a life that ends here leaves what the next removes
    draft.mkdir()
    (draft / VERIFIED).write_text(json.dumps(marks, indent=1) + "\n", encoding="utf-8")
    (draft / VERIFIED).replace(directory / VERIFIED)
    draft.rmdir()
    return ""


def fingerprints(directory: pathlib.Path) -> dict[str, dict[str, int]] | None:
    """Those that a verified checkpoint was saved with; None for one that no life came to verify."""
    if not (directory / VERIFIED).exists():
        return None
    return json.loads((directory / VERIFIED).read_text(encoding="utf-8"))["fingerprints"]


def differing(expected: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]) -> str:
    """The first array that has another fingerprint, or is not there; "" where all agree."""
    for item, names in expected.items():
        for name in sorted(names.keys() | found[item].keys()):
            if name not in found[item] or name not in names or int(names[name]) != int(found[item][name]):
                return f"{item}.{name}"
    return ""


def damage(directory: pathlib.Path, part: slice) -> str:
    """What is wrong with this part of a checkpoint's files, or "".

    One that was verified has a checksum of every file. One whose run ended before that is read, array by array.
    """
    try:
        if not (directory / VERIFIED).exists():
            for item in ARRAYS:
                read(directory / item, part)
            return ""
        files = json.loads((directory / VERIFIED).read_text(encoding="utf-8"))["files"]
        for name in sorted(files)[part]:
            if not (directory / name).is_file():
                return f"{name} is missing"
            if (found := _sum(directory / name)) != files[name]:
                what = "size" if found[0] != files[name][0] else "content"
                return f"{name} has another {what} than it was saved with"
    except Exception as error:  # TensorStore raises many kinds for a damaged directory
        return first_line(error)
    return ""


def read(item: pathlib.Path, part: slice) -> dict[str, int]:
    """The fingerprints of an item's arrays, from what lies on the disk."""
    store = {"driver": "ocdbt", "base": f"file://{item}/"}
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
