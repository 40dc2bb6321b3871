"""What fields of our JSON files may hold: reading one refuses whatever writing one never gives."""

import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from typing import Any


def checked[Kind](kind: type[Kind], body: Any, where: str, legal: Mapping[str, Callable[[Any], Any]]) -> Kind:
    """`kind(**body)`. ValueError naming the first field that is missing, unknown or not as `legal` says."""
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(body, dict):
        raise ValueError(f"{where} is {reprlib.repr(body)}; legal: an object with {', '.join(fields)}")
    for name in body:
        if name not in fields:
            raise ValueError(f"{where} has a field {reprlib.repr(name)}; legal: {', '.join(fields)}")
    for name, field in fields.items():
        if name not in body and field.default is dataclasses.MISSING:
            raise ValueError(f"{where} lacks the field {name!r}")
        if name in body and name in legal and not legal[name](body[name]):
            raise ValueError(f"{where} has {name} {reprlib.repr(body[name])}, which `prepare` never writes")
    return kind(**body)


def text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def sha256(value: Any) -> bool:
    return text(value) and len(value) == 64


def mapping(value: Any) -> bool:
    return isinstance(value, dict)


def count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**60  # times the bytes of a token, an offset in a file


def token_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31  # read as int32


def counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(text, value)) and all(map(count, value.values()))
