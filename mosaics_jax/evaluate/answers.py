"""A model's answers on the disk, one line each, batch by batch: whose they are, and whether they are what was written.

A line is JSON: `key` says all that decides the answer but the model, `of` says which model and which version of the
suites answered, `record` is the answer, `digest` is of the other three. Lines of another model stay and are not used;
nor is a damaged one, whose question is asked again.
"""

import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from mosaics_jax import processes, whole
from mosaics_jax.evaluate import given

_FIELDS = {"key", "of", "record"}
_OLDER = {"key", "record"}  # without a word on whose answer it is


class Answers:
    """What a model has answered of one suite.

    Attributes:
      known: records by key.
    """

    def __init__(self, path: pathlib.Path | None, of: str):
        """`of` is the model's identity; None keeps nothing. OSError where the file is there and cannot be read."""
        self._path, self._of = path, of
        self._name = path.stem if path else "answers"
        self.known: dict[str, dict[str, Any]] = {}
        content = path.read_bytes() if path and path.exists() else b""
        *whole_lines, cut = content.split(b"\n")
        self._cut = len(cut)  # bytes of a last line that was not written to its end
        damaged = 0
        for line in whole_lines:
            try:
                body = given.value(line, "the line")
                fields = whole.opened(body)
                if fields.keys() != (_FIELDS if whole.DIGEST in body else _OLDER):
                    raise whole.DamagedError("it has other fields")
            except ValueError:
                damaged += 1
                continue
            if fields.get("of") == of:
                self.known[fields["key"]] = fields["record"]
        if damaged and jax.process_index() == 0:
            what = f"{damaged} damaged line{'s are' if damaged > 1 else ' is'} not used, and asked again"
            print(f"{str(path)!r}: {what}", file=sys.stderr, flush=True)

    def complete[Item](
        self, batch: Mapping[str, Item], answer: Callable[[Sequence[Item]], Sequence[dict[str, Any]]]
    ) -> None:
        """Has answered what is not known of a batch, by key, and keeps it. All processes call this; one writes.

        Raises ValueError on all where they would ask for different things, and OSError where the disk refuses.
        """
        missing = {key: item for key, item in batch.items() if key not in self.known}
        processes.same({f"what {self._name} asks": whole.digest([*batch, None, *missing])}, self._name)
        if missing:
            found = dict(zip(missing, answer(list(missing.values())), strict=True))
            processes.first(lambda: self._append(found), f"answers of {self._name}")
            self.known |= found

    def _append(self, records: Mapping[str, dict[str, Any]]) -> None:
        if self._path is None:
            return
        lines = [json.dumps(whole.sealed({"key": key, "of": self._of, "record": r})) for key, r in records.items()]
        content = "".join(f"{line}\n" for line in lines).encode()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(self._path, "ab") as file:
                file.truncate(file.tell() - self._cut)
                self._cut = 0
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error  # a write alone names no file
