"""Trained short, then trained on with longer rows: what a few mini-batches change (the paper's figure 8)."""

import functools
from collections.abc import Mapping, Sequence

from mosaics_jax.claims.episodes import TASKS
from mosaics_jax.claims.measures import Answers, Measure, answers
from mosaics_jax.claims.questions import Questions, accuracy
from mosaics_jax.claims.study import Run, Study, answers_folder
from mosaics_jax.config import MeshConfig
from mosaics_jax.data.corpus import Manifest
from mosaics_jax.data.tokenizer import load_tokenizer
from mosaics_jax.evaluate.model import RunModel

_TASK = TASKS["long_facts"]
_SLOWER = 10  # the learning rate is this much below the one that a variant was trained at


class Extension(Study):
    """The study `extension`: each run goes on from the run of `language` of its variant and seed."""

    @property
    def parents(self) -> Study:
        return Study(
            "language", self.workdir, self.budget, self.seeds, self.variants, self.rates, self.text, self.times,
            self.changes, self.say,
        )  # fmt: skip

    @property
    def measures(self) -> Sequence[Measure]:
        return [
            Measure(
                _name(documents), f"Accuracy in percent among {documents} documents", "mini-batches", _name(documents),
                percent=True, chance=_TASK.chance,
            )
            for documents in _TASK.asked
        ]  # fmt: skip

    def prepare(self) -> None:
        self.parents.prepare()
        super().prepare()

    def train(self, variant: str) -> tuple[Mapping[float, float], Sequence[Run]]:
        """No sweep of its own: the rate is the parent's best, less."""
        _, parents = self.parents.train(variant)
        runs = [
            Run(variant, parent.rate / _SLOWER, parent.seed, str(self.parents.folder(parent))) for parent in parents
        ]
        for run in runs:
            self.trained(run)
        return {}, runs

    def ask(self, run: Run, long_term: bool) -> Answers:
        """By the number of mini-batches; after none of them it is the parent that answers."""
        config, folder = self.config(run), self.folder(run)
        manifest = Manifest.load(self.workdir / "data" / _TASK.name)
        questions = Questions(_TASK, load_tokenizer(manifest.tokenizer_directory))
        found: dict[str, dict[int, Sequence[float]]] = {_name(documents): {} for documents in _TASK.asked}
        for step in (0, *config.checkpoint.steps, config.run.steps):
            load = functools.partial(
                RunModel, folder if step else run.init_from, MeshConfig(), step=step or None, long_term=long_term
            )
            answered = answers(questions, load, folder / answers_folder(long_term) / str(step))
            for documents, right in accuracy(answered).items():
                found[_name(documents)][step] = right
        return found


def _name(documents: int) -> str:
    return f"extension_{documents}_documents"
