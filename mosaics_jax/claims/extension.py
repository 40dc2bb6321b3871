"""Trained short, then trained on with longer rows: what a few mini-batches change (the paper's figure 8)."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence

from configs import claims as recipe
from mosaics_jax.claims.episodes import TASKS
from mosaics_jax.claims.measures import ACCURACY, Answers, Asker, Measure
from mosaics_jax.claims.study import Run, Study, answers_folder

_TASK = TASKS["long_facts"]


class Extension(Study):
    """The study `extension`: each run goes on from the run of `language` of its variant and seed."""

    @functools.cached_property
    def parents(self) -> Study:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Study(**fields | {"name": "language"})

    @property
    def measures(self) -> Sequence[Measure]:
        return [
            Measure(
                _name(documents), f"Accuracy in percent among {documents} documents", "mini-batches", _name(documents),
                ACCURACY, chance=_TASK.chance,
            )
            for documents in _TASK.asked
        ]  # fmt: skip

    def prepare(self) -> None:
        self.parents.prepare()
        super().prepare()

    def chosen(self, variant: str) -> tuple[Mapping[float, float], Sequence[Run]]:
        """No sweep of its own: the rate is the parent's best, less."""
        _, parents = self.parents.chosen(variant)
        for parent in parents:
            self.parents.trained(parent)
        return {}, [
            Run(variant, parent.rate / recipe.SLOWER, parent.seed, str(self.parents.folder(parent)))
            for parent in parents
        ]

    def ask(self, run: Run, long_term: bool) -> Answers:
        """By the number of mini-batches; after none of them it is the parent that answers."""
        config, folder = self.config(run), self.folder(run)
        asked = self.asked_task(_TASK.name)
        found: dict[str, dict[int, Sequence[float]]] = {_name(documents): {} for documents in _TASK.asked}
        for step in (0, *config.checkpoint.steps, config.run.steps):
            asker = Asker(folder if step else pathlib.Path(run.init_from), step or None, long_term)
            answers = asked.ask(asker, folder / answers_folder(long_term) / str(step))
            for documents, right in answers[_TASK.name].items():
                found[_name(documents)][step] = right
        return found


def _name(documents: int) -> str:
    return f"extension_{documents}_documents"
