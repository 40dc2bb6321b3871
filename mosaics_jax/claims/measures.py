"""What is asked of a trained model: measures, each a number at every x of an axis."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from mosaics_jax.claims.distances import MEMORIES, Distances
from mosaics_jax.claims.episodes import Task
from mosaics_jax.claims.questions import Questions, accuracy
from mosaics_jax.config import Config, MeshConfig
from mosaics_jax.data.corpus import Manifest
from mosaics_jax.data.tokenizer import Tokenizer
from mosaics_jax.evaluate import suite
from mosaics_jax.evaluate.model import RunModel, identity
from mosaics_jax.evaluate.perplexity import Perplexity

LONGER = (1, 2, 4, 8)  # times the training length

# What a model answered: by measure, and in it by x. A measure that a model does not have is absent.
Answers = Mapping[str, Mapping[int, Sequence[float]]]


ACCURACY, BITS, WEIGHT = "accuracy", "bits per byte", "weight of a pair"


@dataclasses.dataclass(frozen=True)
class Asker:
    """A checkpoint of a run that may be asked; its weights are loaded where it is."""

    workdir: pathlib.Path
    step: int | None
    long_term: bool

    @functools.cached_property
    def identity(self) -> str:
        return identity(self.workdir, step=self.step, long_term=self.long_term)

    @functools.cached_property
    def model(self) -> RunModel:
        return RunModel(self.workdir, MeshConfig(), step=self.step, long_term=self.long_term)


class Measure(NamedTuple):
    """A table, and curves of a figure.

    Attributes:
      title: of the table, with the unit.
      axis: what x counts.
      figure: the figure that its curves stand in; several measures may share one.
      unit: ACCURACY, a share that tables show in percent, BITS or WEIGHT.
      label: what a curve is called after the variant's name.
      chance: the share that guessing gets right.
      trained: the greatest x of training.
      removal: whether a table shows it without the long-term memory too.
      uniform: what it would be of reads that weigh all alike.
    """

    name: str
    title: str
    axis: str
    figure: str
    unit: str
    label: str = ""
    chance: float | None = None
    trained: int | None = None
    removal: bool = True
    uniform: Mapping[int, Sequence[float]] = {}


class Asked(Protocol):
    """Measures that are answered together."""

    measures: Sequence[Measure]

    def ask(self, asker: Asker, directory: pathlib.Path) -> Answers:
        """Answers what the directory does not hold of this model; where it holds all, the model is not loaded."""


def answers(examples: suite.Examples, asker: Asker, directory: pathlib.Path) -> list[dict[str, Any]]:
    """The records of all examples, asked now where this model was not asked yet."""
    found = suite.answered(examples, asker.identity, directory)
    return suite.answers(examples, asker.model, directory) if found is None else found


class AskedTask:
    """Accuracy at a task."""

    def __init__(self, task: Task, tokenizer: Tokenizer):
        self._questions = Questions(task, tokenizer)
        self.measures: Sequence[Measure] = [
            Measure(
                task.name, f"{task.name}: accuracy in percent", task.axis, task.name, ACCURACY, chance=task.chance,
                trained=task.trained,
            )
        ]  # fmt: skip

    def ask(self, asker: Asker, directory: pathlib.Path) -> Answers:
        return {self._questions.name: accuracy(answers(self._questions, asker, directory))}


class AskedText:
    """Held-out loss by position and by length of context, up to 8 times the training's, and weight by distance."""

    def __init__(self, manifest: Manifest, config: Config):
        """`config` is of one of the variants, which all have the same context, window and delay at inference."""
        context = config.data.context
        self._lengths = [times * context for times in LONGER]
        self._perplexity = Perplexity(manifest, self._lengths, count=8, context=context)
        self._distances = Distances(manifest, context)
        self._bits = 1 / math.log(2) / manifest.split("valid").bytes_per_prediction
        self.measures: Sequence[Measure] = [
            Measure(
                "text_by_context", "Text: bits per byte of a document's same last 256 bytes", "bytes of context",
                "text_by_context", BITS, trained=context,
            ),
            Measure(
                "text_by_position", "Text: bits per byte before a position in the document", "bytes",
                "text_by_position", BITS, trained=context,
            ),
            *(
                Measure(
                    f"{memory}_weight_by_distance", f"Text: weight of one pair, {memory} memory", "bytes back",
                    "weight_by_distance", WEIGHT, label=memory, removal=False,
                    uniform=self._distances.uniform(memory, config.model),
                )
                for memory in MEMORIES
            ),
        ]  # fmt: skip

    def ask(self, asker: Asker, directory: pathlib.Path) -> Answers:
        records = answers(self._perplexity, asker, directory)
        whole = [record["bins"] for record in records if record["bins"] is not None]
        distances = self._distances.by_memory(answers(self._distances, asker, directory))
        return {
            "text_by_context": {
                length: [self._bits * record["tail"] for record in records if record["length"] == length]
                for length in self._lengths
            },
            "text_by_position": {
                stop: [self._bits * bins[place] for bins in whole]
                for place, (_, stop) in enumerate(self._perplexity.bins())
            },
            **{f"{memory}_weight_by_distance": by_x for memory, by_x in distances.items()},
        }
