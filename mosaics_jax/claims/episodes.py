"""Made-up tasks, as text: what a model is trained on, and what it is asked. Nothing can be learnt by heart.

An episode is one document. Its answers are stretches of it that follow from what stands before them, and from nothing
else: the bindings are drawn anew for every episode. All text is ASCII, so a character is a byte is a token.
"""

import json
import pathlib
import random
import string
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol


class Answer(NamedTuple):
    """Characters [start, stop) of an episode, and where on the task's axis they belong."""

    start: int
    stop: int
    x: int


class Episode(NamedTuple):
    text: str
    answers: Sequence[Answer]


class Task(Protocol):
    """What a study trains and asks.

    Attributes:
      axis: what x counts.
      chance: the share of answers that guessing gets right.
      trained: the greatest x of training.
      asked: the x of the questions, beyond `trained` too.
      episodes: how many are asked at each.
    """

    name: str
    axis: str
    chance: float
    trained: int
    asked: Sequence[int]
    episodes: int

    def training(self, draw: random.Random) -> Episode:
        """One of the training distribution."""

    def question(self, draw: random.Random, x: int) -> Episode:
        """One whose greatest x is this."""


class Recall:
    """Pairs of a key and a value, then every key again in another order, each followed by its value (MQAR).

    A layer that stores what followed a key answers in one look; a transformer's first layer must tie values to keys.
    """

    name = "recall"
    axis = "pairs"
    chance = 1 / 30
    trained = 16
    asked: Sequence[int] = (2, 4, 8, 16, 24, 32, 48)
    episodes = 16
    _KEYS = string.ascii_letters
    _VALUES = string.digits + "!#$%&*+-/:;<=>?@^_~|"

    def training(self, draw: random.Random) -> Episode:
        return self.question(draw, draw.randint(2, self.trained))

    def question(self, draw: random.Random, x: int) -> Episode:
        bound = {key: draw.choice(self._VALUES) for key in draw.sample(self._KEYS, x)}
        again = draw.sample(list(bound), x)
        first = "".join(f"{key}{value}" for key, value in bound.items()) + "\n"
        answers = [Answer(len(first) + 2 * place + 1, len(first) + 2 * place + 2, x) for place in range(x)]
        return Episode(first + "".join(f"{key}{bound[key]}" for key in again), answers)


class Classification:
    """Examples of four classes, shot by shot; classes and their names are drawn anew for every episode.

    A class is a prototype of eight letters, an example has some of them replaced, so more shots tell more. x of an
    answer is the number of shots before it; one episode has them all.
    """

    name = "classification"
    axis = "shots"
    chance = 1 / 4
    trained = 8
    asked: Sequence[int] = (32,)
    episodes = 64
    scored: Sequence[int] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    classes = 4
    _LETTERS = "abcdefghijklmnop"
    _WIDTH, _NOISE = 8, 0.5

    def training(self, draw: random.Random) -> Episode:
        return self.question(draw, draw.randint(1, self.trained))

    def question(self, draw: random.Random, x: int) -> Episode:
        """x shots, and one more whose labels are the last answers."""
        labels = draw.sample(string.ascii_uppercase, self.classes)
        prototypes = {label: draw.choices(self._LETTERS, k=self._WIDTH) for label in labels}
        text, answers = "", []
        for shot in range(x + 1):
            for label in draw.sample(labels, self.classes):
                letters = [draw.choice(self._LETTERS) if draw.random() < self._NOISE else c for c in prototypes[label]]
                text += "".join(letters) + label
                if shot in self.scored:
                    answers.append(Answer(len(text) - 1, len(text), shot))
                text += "\n"
        return Episode(text, answers)


class Facts:
    """Unrelated one-line documents, each a fact about somebody, then questions about some of them, as RULER's task.

    A question repeats the words of its document up to the answer: what is asked for is finding it among the others.
    """

    axis = "documents"
    chance = 1 / 16
    episodes = 16
    _VALUES: ClassVar = {
        "colour": [
            "amber", "azure", "beige", "black", "brown", "coral", "ebony", "green", "ivory",
            "khaki", "lemon", "mauve", "ochre", "olive", "peach", "white",
        ],
        "town": [
            "Arles", "Basel", "Crewe", "Delft", "Essen", "Fulda", "Genoa", "Hague", "Izmir",
            "Kyoto", "Lagos", "Malmo", "Natal", "Omaha", "Paris", "Quito",
        ],
        "trade": [
            "actor", "baker", "clerk", "diver", "envoy", "fakir", "guard", "judge", "maker",
            "nurse", "pilot", "quill", "rider", "smith", "tutor", "valet",
        ],
    }  # fmt: skip
    _QUESTIONS = 8

    def __init__(self, name: str, trained: int, asked: Sequence[int]):
        self.name, self.trained, self.asked = name, trained, asked

    def training(self, draw: random.Random) -> Episode:
        return self.question(draw, draw.randint(1, self.trained))

    def question(self, draw: random.Random, x: int) -> Episode:
        people: dict[str, tuple[str, str]] = {}
        while len(people) < x:
            attribute = draw.choice(list(self._VALUES))
            people[self._person(draw)] = attribute, draw.choice(self._VALUES[attribute])
        text, answers = "".join(f"The {a} of {name} is {value}.\n" for name, (a, value) in people.items()), []
        for name in draw.sample(list(people), min(x, self._QUESTIONS)):
            attribute, value = people[name]
            text += f"Question: the {attribute} of {name} is "
            answers.append(Answer(len(text), len(text) + len(value), x))
            text += f"{value}.\n"
        return Episode(text, answers)

    def _person(self, draw: random.Random) -> str:
        return "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(2)).capitalize()


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Recall(),
        Classification(),
        Facts("facts", 8, (1, 2, 4, 8, 16, 32, 64, 128)),
        Facts("long_facts", 64, (32, 64)),  # what a model that reads longer rows is trained on further
    )
}


def write(task: Task, path: pathlib.Path, characters: int, seed: int) -> None:
    """A .jsonl of training episodes, for `prepare`."""
    draw, written = random.Random(f"{task.name} {seed}"), 0
    with open(path, "w", encoding="ascii") as file:
        while written < characters:
            text = task.training(draw).text
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text)
