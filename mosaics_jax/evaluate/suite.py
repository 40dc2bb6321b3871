"""What a suite is, and the loop that runs one: batch by batch, each answer on disk before the next is asked for."""

import functools
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from tqdm import tqdm

from mosaics_jax.data.tokenizer import Tokenizer
from mosaics_jax.evaluate.answers import Answers
from mosaics_jax.evaluate.model import Model
from mosaics_jax.evaluate.report import Report

_SECONDS = 30  # between lines of progress


class Example(NamedTuple):
    """One thing to be answered.

    Attributes:
      key: says all that decides the answer but the model; unique in its suite.
      length: tokens that the model reads and writes for it.
      payload: the suite's own.
    """

    key: str
    length: int
    payload: Any


class Examples(Protocol):
    """What is asked of a model, and how."""

    name: str

    def __len__(self) -> int:
        """The number of its examples."""

    def examples(self) -> Iterator[Example]:
        """Always the same, in the same order; those that are alike in length together."""

    def answer(self, model: Model, batch: Sequence[Example]) -> list[dict[str, Any]]:
        """What is recorded of each example: JSON values."""


class Suite(Examples, Protocol):
    """Examples, and what is said of their answers."""

    def report(self, records: Sequence[dict[str, Any]]) -> Report:
        """The tables and figures of all records, which are in the order of the examples."""


def run(suite: Suite, model: Model, directory: pathlib.Path) -> Report:
    """The report on `answers`."""
    return suite.report(answers(suite, model, directory))


def answers(suite: Examples, model: Model, directory: pathlib.Path) -> list[dict[str, Any]]:
    """Answers what `directory`/<suite>.jsonl does not hold of this model yet; all records, in the examples' order.

    Killed at any moment, it goes on after the last whole line. Raises ValueError for an example that is longer than the
    model can hold, and for a suite without examples; OSError where the disk refuses.
    """
    if not len(suite):
        raise ValueError(f"the suite {suite.name!r} has no examples; give it more data or fewer conditions")
    kept = _kept(suite, model.identity, directory)
    order = []
    first = jax.process_index() == 0
    shown = sys.stderr.isatty()
    said = time.monotonic()
    with tqdm(
        total=len(suite), desc=suite.name, unit="example", dynamic_ncols=True, disable=not (first and shown)
    ) as bar:
        for batch in _batches(suite, model):
            order += [example.key for example in batch]
            kept.complete({example.key: example for example in batch}, functools.partial(suite.answer, model))
            bar.update(len(batch))
            if first and not shown and time.monotonic() - said > _SECONDS:  # a log has lines instead
                print(f"{suite.name}: {len(order)} of {len(suite)} examples", file=sys.stderr, flush=True)
                said = time.monotonic()
    return [kept.known[key] for key in order]


def answered(suite: Examples, identity: str, directory: pathlib.Path) -> list[dict[str, Any]] | None:
    """What `answers` would give where nothing is left to ask, which needs no model; None where something is."""
    known = _kept(suite, identity, directory).known
    keys = [example.key for example in suite.examples()] if known else []
    return [known[key] for key in keys] if keys and known.keys() >= set(keys) else None


def _kept(suite: Examples, identity: str, directory: pathlib.Path) -> Answers:
    return Answers(directory / f"{suite.name}.jsonl", identity)


def row(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The token ids of a text that begins a document."""
    return np.array([tokenizer.begin, *tokenizer.encode(text)], np.int32)


def digest(text: str, *more: Any) -> str:
    """Twelve hexadecimal digits that change with the text, and with more JSON values: what is too long for a key."""
    decides = text + "".join(f"\0{json.dumps(one)}" for one in more)
    return hashlib.sha256(decides.encode()).hexdigest()[:12]


def _batches(suite: Examples, model: Model) -> Iterator[list[Example]]:
    batch: list[Example] = []
    longest = 0
    for example in suite.examples():
        if example.length > model.max_length:
            raise ValueError(
                f"{suite.name}: {example.key} needs {example.length} tokens, and --max_length is {model.max_length}; "
                "no prompt is cut: raise it, or ask for less"
            )
        if batch and len(batch) >= model.rows_at_once(max(longest, example.length)):
            yield batch
            batch, longest = [], 0
        batch.append(example)
        longest = max(longest, example.length)
    if batch:
        yield batch
