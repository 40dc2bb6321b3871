"""In-context learning: classification from n examples of every class in the prompt (PAPER section 7).

A shot is one example of each class. Labels are the data set's (semantic) or class_00, class_01, ... (anonymous). Four
prompts: text and label stand on lines of their own or are joined by spaces; the examples of a shot are in the order of
the classes or shuffled. Figures are of each prompt, and of the best of the four for every number of shots.

Two scores: whether the likeliest continuation, up to where the next example would begin, is the label; and whether the
label is the likeliest of all labels.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mosaics_jax.data.tokenizer import Tokenizer
from mosaics_jax.evaluate import report, suite
from mosaics_jax.evaluate.labelled import Rows, Task
from mosaics_jax.evaluate.model import Model

DELIMITERS = {"newline": "\n", "space": " "}
ORDERS = ("in order", "shuffled")
LABELS = ("semantic", "anonymous")
PROMPTS = tuple((delimiter, order) for delimiter in DELIMITERS for order in ORDERS)
SCORES = {"generated": "label generated", "ranked": "label likeliest of all"}


class Condition(NamedTuple):
    task: str
    labels: str
    shots: int
    delimiter: str
    order: str


def prompt(task: Task, labels: dict[str, str], shots: Sequence[Rows], query: str, delimiter: str) -> str:
    """The whole prompt: instruction, examples, the query, and what stands before its label."""
    lines = [task.instruction]
    for text, label in (row for shot in shots for row in shot):
        lines += task.lines(text, labels[label])
    return DELIMITERS[delimiter].join([*lines, *task.lines(query, "")])


class Classification:
    name = "classification"

    def __init__(
        self, tasks: Sequence[Task], tokenizer: Tokenizer, shots: Sequence[int], *, count: int = 100, seed: int = 0,
        labels: Sequence[str] = LABELS,
    ):  # fmt: skip
        """`count` texts of every test set, the same for all conditions; examples are drawn anew for each of them.

        ValueError for a class with fewer examples than the greatest number of shots.
        """
        for kind in labels:
            if kind not in LABELS:
                raise ValueError(f"labels is {kind!r}; legal: {', '.join(LABELS)}")
        self._tasks = {task.name: task for task in tasks}
        self._by_label: dict[str, dict[str, list[str]]] = {}
        self._queries: dict[str, Rows] = {}
        for task in tasks:
            of: dict[str, list[str]] = {label: [] for label in task.labels}
            for text, label in task.train:
                of[label].append(text)
            few = {label: len(texts) for label, texts in of.items() if len(texts) < max(shots)}
            if few:
                label, number = min(few.items(), key=lambda item: item[1])
                raise ValueError(
                    f"{task.name}: the class {label!r} has {number} examples, fewer than {max(shots)} shots "
                    f"({len(few)} such classes); legal: --shots of {number} or fewer, or more training rows"
                )
            known = [row for row in task.test if row[1] in of]
            if not known:
                raise ValueError(f"{task.name}: no test row has a label of the training rows")
            self._by_label[task.name] = of
            self._queries[task.name] = random.Random(f"{seed} {task.name}").sample(known, min(count, len(known)))
        self._tokenizer, self._shots, self._seed, self._labels = tokenizer, sorted(shots), seed, tuple(labels)
        self._options: dict[tuple[str, str, str], list[np.ndarray]] = {}

    def __len__(self) -> int:
        conditions = len(self._shots) * len(self._labels) * len(PROMPTS)
        return sum(map(len, self._queries.values())) * conditions

    def examples(self) -> Iterator[suite.Example]:
        for name in self._tasks:
            for labels in self._labels:
                for shots in self._shots:
                    for delimiter, order in PROMPTS:
                        condition = Condition(name, labels, shots, delimiter, order)
                        for index in range(len(self._queries[name])):
                            yield self._example(condition, index)

    def _example(self, condition: Condition, index: int) -> suite.Example:
        task = self._tasks[condition.task]
        query, answer = self._queries[condition.task][index]
        names = self.names(condition)
        # The same examples whatever the prompt, and more shots begin with the fewer.
        drawn = {
            label: random.Random(f"{self._seed} {task.name} {index} {label}").sample(texts, max(self._shots))
            for label, texts in self._by_label[task.name].items()
        }
        shots = [[(texts[shot], label) for label, texts in drawn.items()] for shot in range(condition.shots)]
        if condition.order == "shuffled":
            shuffler = random.Random(f"{self._seed} {task.name} {index} order")
            shots = [shuffler.sample(shot, len(shot)) for shot in shots]
        text = prompt(task, names, shots, query, condition.delimiter)
        ids = suite.row(self._tokenizer, text)
        key = f"{' '.join(map(str, condition))} {index} {suite.digest(text, answer)}"
        new = max(map(len, self.options(condition)))
        return suite.Example(key, len(ids) + new, (ids, condition, names[answer]))

    def names(self, condition: Condition) -> dict[str, str]:
        """What each class is called."""
        labels = list(self._by_label[condition.task])
        if condition.labels == "semantic":
            return {label: label for label in labels}
        return {label: f"class_{number:02d}" for number, label in enumerate(labels)}

    def options(self, condition: Condition) -> list[np.ndarray]:
        """The tokens of every label, with the first word of what follows it.

        That word is the same for all; without it a label that another one begins with would have an advantage.
        """
        key = condition.task, condition.labels, condition.delimiter
        if key not in self._options:
            after = DELIMITERS[condition.delimiter] + self._tasks[condition.task].text_field.split()[0]
            names = self.names(condition).values()
            self._options[key] = [self._tokenizer.encode(f" {name}{after}") for name in names]
        return self._options[key]

    def answer(self, model: Model, batch: Sequence[suite.Example]) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = [{} for _ in batch]
        groups: dict[tuple[str, str, str], list[int]] = {}
        for place, example in enumerate(batch):
            condition = example.payload[1]
            groups.setdefault((condition.task, condition.labels, condition.delimiter), []).append(place)
        for places in groups.values():  # what a call ranks is the same for all its rows
            rows = [batch[place].payload[0] for place in places]
            condition = batch[places[0]].payload[1]
            options, names = self.options(condition), list(self.names(condition).values())
            texts = model.generate(rows, max(map(len, options)))
            scores_PN = model.rank(rows, options)
            for place, text, score_N in zip(places, texts, scores_PN, strict=True):
                _, condition, label = batch[place].payload
                given, likeliest = self.first_label(condition, text), names[int(score_N.argmax())]
                answers[place] = {
                    **condition._asdict(), "label": label, "answer": given, "likeliest": likeliest,
                    "generated": float(given == label), "ranked": float(likeliest == label),
                }  # fmt: skip
        return answers

    def first_label(self, condition: Condition, text: str) -> str:
        """What was generated up to the end of the line, or to where the next example begins."""
        line = text.strip().split("\n")[0]
        return line.split(f" {self._tasks[condition.task].text_field}")[0].strip()

    def report(self, records: Sequence[dict[str, Any]]) -> report.Report:
        tables, figures = [], []
        for score, title in SCORES.items():
            found: dict[Condition, list[float]] = {}
            for record in records:
                condition = Condition(*(record[field] for field in Condition._fields))
                found.setdefault(condition, []).append(record[score])
            rows: list[list[Any]] = []
            for name in self._tasks:
                for labels in self._labels:
                    of = {(*way, n): found[Condition(name, labels, n, *way)] for way in PROMPTS for n in self._shots}
                    best = [max((of[(*way, n)] for way in PROMPTS), key=report.mean) for n in self._shots]
                    for way in PROMPTS:
                        percents = [report.percent(of[(*way, n)]) for n in self._shots]
                        rows.append([name, labels, f"{way[0]}, {way[1]}", *percents])
                    rows.append([name, labels, "**best of four**", *(f"**{report.percent(one)}**" for one in best)])
                    series = [
                        report.curve(f"{way[0]}, {way[1]}", self._shots, [of[(*way, n)] for n in self._shots])
                        for way in PROMPTS
                    ]
                    series.append({**report.curve("best of four", self._shots, best), "main": True})
                    chance = {"chance": 1 / len(self._by_label[name])}
                    data = report.lines(
                        f"{name}, {labels} labels: {title}", "number of shots", "accuracy", series, levels=chance
                    )
                    figures.append(report.Figure(f"classification_{name}_{labels}_{score}", data))
            columns = ["task", "labels", "prompt", *(f"{n} shot{'s' * (n > 1)}" for n in self._shots)]
            tables.append(report.Table(f"Accuracy in percent: {title}", columns, rows))
        counts = [[name, len(self._by_label[name]), len(self._queries[name])] for name in self._tasks]
        tables.append(report.Table("Data", ["task", "classes", "texts"], counts))
        return report.Report(tables, figures)
