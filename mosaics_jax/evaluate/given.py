"""Files that a user gives: text and JSON, of which whatever is wrong is one line."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from mosaics_jax.data import files

# What reading the fields of JSON values raises where they are of another form.
WRONG_FORM = (AttributeError, KeyError, TypeError, ValueError, IndexError)


def text(path: pathlib.Path) -> str:
    """ValueError where it is no file of UTF-8, and OSError where it cannot be looked at."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise files.cannot_read(path, error, "legal: a file") from error
    except UnicodeError as error:
        raise ValueError(f"{str(path)!r} cannot be read: it is not text in UTF-8 ({error})") from error


def lines(path: pathlib.Path) -> list[str]:
    return [line for line in text(path).split("\n") if line]


def value(content: str | bytes, where: str) -> Any:
    """What JSON holds. ValueError, which begins with `where`."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError(f"{where} is not JSON that can be read: it is nested too deep") from error
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def values(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Of JSON lines, where each stands, and what it holds."""
    for number, line in enumerate(lines(path), start=1):
        where = f"{str(path)!r}, line {number}"
        yield where, value(line, where)


def string(found: Any) -> str:
    """`found`, which must be a string. TypeError."""
    if not isinstance(found, str):
        raise TypeError(f"a {type(found).__name__} where a string is legal")
    return found
