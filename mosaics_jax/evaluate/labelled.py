"""Labelled texts to classify: Banking77, GoEmotions, TACRED, and any csv, tsv or jsonl of (text, label)."""

import csv
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from mosaics_jax.evaluate import given

Rows = list[tuple[str, str]]  # (text, label)


class Task(NamedTuple):
    """A data set and how its prompt speaks of it.

    Attributes:
      instruction: what the prompt begins with.
      text_field, label_field: what stands before a text and before its label.
      asks: the last line of a text asks about it, and stands before the label field.
    """

    name: str
    instruction: str
    text_field: str
    label_field: str
    train: Rows
    test: Rows
    asks: bool = False

    def lines(self, text: str, label: str) -> list[str]:
        """A text and its label as the lines of an example; without a label, what stands before it."""
        parts = [" ".join(part.split()) for part in text.split("\n")]
        asked = f"{parts.pop()} {self.label_field}" if self.asks else self.label_field
        return [f"{self.text_field} {' '.join(parts)}", f"{asked} {label}".rstrip()]

    @property
    def labels(self) -> list[str]:
        return sorted({label for _, label in self.train})


_FORMAT = "The predict answer must come from the demonstration examples with the exact format. "
_FOLLOW = "The examples are as follows:"


def banking77(folder: pathlib.Path) -> Task:
    train, test = (_table(folder / f"{split}.csv", ",", "text", "category") for split in ("train", "test"))
    instruction = f"Given a customer service query, please predict the intent of the query. {_FORMAT}{_FOLLOW}"
    return Task("banking77", instruction, "service query:", "intent category:", train, test)


def goemotions(folder: pathlib.Path) -> Task:
    """Rows with a single label; `emotions` are numbered by labels.txt."""
    names = given.lines(folder / "labels.txt")

    def rows(path: pathlib.Path) -> Iterator[tuple[str, str]]:
        for number, line in enumerate(given.lines(path), start=1):
            fields = line.split("\t")
            if len(fields) < 2 or not all(label.isdecimal() for label in fields[1].split(",")):
                raise ValueError(f"{str(path)!r}, line {number}: legal are text, TAB, label numbers")
            if "," not in fields[1]:
                if int(fields[1]) >= len(names):
                    raise ValueError(f"{str(path)!r}, line {number}: label {fields[1]}; labels.txt has {len(names)}")
                yield fields[0], names[int(fields[1])]

    train, test = (_some(path, list(rows(path))) for path in (folder / "train.tsv", folder / "test.tsv"))
    instruction = f"Given a comment, please predict the emotion category of this comment. {_FORMAT}{_FOLLOW}"
    return Task("goemotions", instruction, "comment:", "emotion category:", train, test)


def tacred(folder: pathlib.Path) -> Task:
    """Relations between two entities of a sentence, without `no_relation`: 41 classes."""

    def rows(path: pathlib.Path) -> Iterator[tuple[str, str]]:
        body = given.value(given.text(path), f"{str(path)!r}")
        try:
            for item in body:
                words = item["token"]
                subject = " ".join(words[item["subj_start"] : item["subj_end"] + 1])
                object_ = " ".join(words[item["obj_start"] : item["obj_end"] + 1])
                if item["relation"] != "no_relation":
                    text = f"{' '.join(words)}\nthe relation between {subject} and {object_}"
                    yield text, given.string(item["relation"])
        except given.WRONG_FORM as error:
            raise ValueError(f"{str(path)!r} is not in TACRED's format: {error!r}") from error

    train, test = (_some(path, list(rows(path))) for path in (folder / "train.json", folder / "test.json"))
    instruction = (
        "Given a sentence and a pair of subject and object entities within the sentence, please predict the relation "
        f"between the given entities. {_FOLLOW}"
    )
    return Task("tacred", instruction, "sentence:", "is:", train, test, asks=True)


def any_task(name: str, train: pathlib.Path, test: pathlib.Path) -> Task:
    """Two files, .csv or .tsv with the columns text and label, or .jsonl with these fields."""
    instruction = f"Given a text, please predict the label of the text. {_FORMAT}{_FOLLOW}"
    return Task(name, instruction, "text:", "label:", _file(train), _file(test))


def _file(path: pathlib.Path) -> Rows:
    if path.suffix in (".csv", ".tsv"):
        return _table(path, "," if path.suffix == ".csv" else "\t", "text", "label")
    if path.suffix != ".jsonl":
        raise ValueError(f"{str(path)!r} ends in {path.suffix!r}; legal: .csv, .tsv, .jsonl")
    rows = []
    for where, item in given.values(path):
        try:
            rows.append((str(item["text"]), str(item["label"])))
        except given.WRONG_FORM as error:
            raise ValueError(f"{where}: legal is an object with text and label") from error
    return _some(path, rows)


def _table(path: pathlib.Path, delimiter: str, text: str, label: str) -> Rows:
    reader = csv.DictReader(given.text(path).splitlines(keepends=True), delimiter=delimiter)
    rows = []
    try:
        if not {text, label} <= set(reader.fieldnames or ()):
            raise ValueError(f"{str(path)!r} has the columns {reader.fieldnames}; legal: {text} and {label} among them")
        for row in reader:
            if row[text] is None or row[label] is None:
                raise ValueError(f"{str(path)!r}, line {reader.line_num}: legal is a row with {text} and {label}")
            rows.append((row[text], row[label]))
    except csv.Error as error:
        raise ValueError(f"{str(path)!r}, line {reader.line_num}, cannot be read: {error}") from error
    return _some(path, rows)


def _some(path: pathlib.Path, rows: Rows) -> Rows:
    if not rows:
        raise ValueError(f"{str(path)!r} holds no rows")
    return rows
