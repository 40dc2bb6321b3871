"""A task as examples of an evaluation: every answer of an episode is asked in one forward pass.

An answer counts where each of its tokens is the likeliest after the true ones before it, which is where greedy decoding
would write it.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from mosaics_jax.claims.episodes import Task
from mosaics_jax.data.tokenizer import Tokenizer
from mosaics_jax.evaluate import suite
from mosaics_jax.evaluate.model import Model


class Questions:
    """Episodes at each x of the task, the same for every model."""

    def __init__(self, task: Task, tokenizer: Tokenizer, *, seed: int = 1):
        self.name, self._task, self._tokenizer, self._seed = task.name, task, tokenizer, seed

    def __len__(self) -> int:
        return self._task.episodes * len(self._task.asked)

    def examples(self) -> Iterator[suite.Example]:
        for x in self._task.asked:
            for number in range(self._task.episodes):
                episode = self._task.question(random.Random(f"question {self._seed} {x} {number}"), x)
                ids = suite.row(self._tokenizer, episode.text)
                assert len(ids) == 1 + len(episode.text), "a token is a character"
                yield suite.Example(f"{x} {number} {suite.digest(episode.text)}", len(ids), (ids, episode.answers))

    def answer(self, model: Model, batch: Sequence[suite.Example]) -> list[dict[str, Any]]:
        records = []
        for example, losses in zip(batch, model.losses([example.payload[0] for example in batch]), strict=True):
            right: dict[str, list[int]] = {}
            for answer in example.payload[1]:  # the begin token comes before the text, and has no loss
                right.setdefault(str(answer.x), []).append(int(losses.likeliest_T[answer.start : answer.stop].all()))
            records.append({"right": right, "length": example.length})
        return records


def accuracy(records: Sequence[dict[str, Any]]) -> dict[int, list[float]]:
    """For each x, 1 for every right answer and 0 for every wrong one."""
    found: dict[int, list[float]] = {}
    for record in records:
        for x, right in record["right"].items():
            found.setdefault(int(x), []).extend(map(float, right))
    return dict(sorted(found.items()))
