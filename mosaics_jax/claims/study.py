"""Trains every variant of a study and asks each the same; what is on disk is not done again.

W/claims.json                                 the size and the text that the workdir is of
W/data/<corpus>                               prepared corpora, shared by all runs
W/runs/<study>/<variant>/<rate>-seed<s>/      a run of launch.train, and its answers
"""

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from configs import claims as recipe
from mosaics_jax import history, lock, place, whole
from mosaics_jax.claims.episodes import TASKS, write
from mosaics_jax.claims.measures import Answers, Asked, AskedTask, AskedText, Asker, Measure
from mosaics_jax.config import Config
from mosaics_jax.data.corpus import Manifest
from mosaics_jax.data.prepare import prepare
from mosaics_jax.data.tokenizer import load_tokenizer
from mosaics_jax.train import train

_TEXT_BYTES = 100_000_000  # of a corpus of text, at most
_HELD_OUT = 0.05


class Preempted(RuntimeError):
    """A signal ended a training, which has saved."""


class Run(NamedTuple):
    """One training of one variant. `init_from`: the folder of a run whose weights it starts from."""

    variant: str
    rate: float
    seed: int
    init_from: str = ""


class Found(NamedTuple):
    """What came of a run.

    Attributes:
      bits_per_byte: on what is held out of all its corpora, after its last step.
      whole: its answers.
      removed: what it answers without its long-term memory, where it has that beside another.
    """

    run: Run
    bits_per_byte: float
    whole: Answers
    removed: Answers | None


class Variant(NamedTuple):
    """All that came of a variant: the held-out bits per byte of the first seed by learning rate, and a run a seed."""

    sweep: Mapping[float, float]
    runs: Sequence[Found]


@dataclasses.dataclass(frozen=True)
class Study:
    """One study in one workdir.

    Attributes:
      rates: the learning rates tried; empty: the budget's.
      text: what the corpus of text is made of, as `launch.prepare --input` takes it.
      times: how many times the recipe's steps every run has.
      changes: "section.field" and its value, in the config of every run.
    """

    name: str
    workdir: pathlib.Path
    budget: str = "cpu"
    seeds: int = 3
    variants: Sequence[str] = tuple(recipe.VARIANTS)
    rates: Sequence[float] = ()
    text: Sequence[str] = ("python",)
    times: int = 1
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    say: Callable[[str], None] = print

    def config(self, run: Run) -> Config:
        values = recipe.get_config(f"{self.budget},{self.name},{run.variant}").to_dict()
        steps = self.times * values["run"]["steps"]
        changes = {
            "data.path": str(self.workdir / "data"), "data.seed": run.seed, "run.seed": run.seed,
            "optimizer.peak_learning_rate": run.rate, "run.steps": steps, "run.eval_every": steps,
        }  # fmt: skip
        for name, value in (changes | dict(self.changes)).items():
            section, field = name.split(".")
            values[section][field] = value
        return Config.from_dict(values | {"init_from": run.init_from})

    def folder(self, run: Run) -> pathlib.Path:
        return self.workdir / "runs" / self.name / run.variant / f"{run.rate:g}-seed{run.seed}"

    @property
    def measures(self) -> Sequence[Measure]:
        """What is asked of every run."""
        return [measure for asked in self._asked for measure in asked.measures]

    @functools.cached_property
    def _asked(self) -> Sequence[Asked]:
        asked: list[Asked] = []
        for name in recipe.STUDIES[self.name].corpora:
            if name in TASKS:
                asked.append(self.asked_task(name))
            else:
                asked.append(AskedText(self._manifest(name), self.config(Run(self.variants[0], 1.0, 0))))
        return asked

    def asked_task(self, name: str) -> AskedTask:
        """A task, in the tokens of its corpus."""
        return AskedTask(TASKS[name], load_tokenizer(self._manifest(name).tokenizer_directory))

    def _manifest(self, corpus: str) -> Manifest:
        return Manifest.load(self.workdir / "data" / corpus)

    def run(self) -> dict[str, Variant]:
        """Everything: corpora, runs, answers."""
        self.prepare()
        found = {}
        for variant in self.variants:
            sweep, runs = self.chosen(variant)
            found[variant] = Variant(sweep, [self._found(run) for run in runs])
        return found

    def prepare(self) -> None:
        """The corpora that the study needs and that are not there. ValueError if those there are of another command."""
        self._claim()
        one = self.config(Run(self.variants[0], 1.0, 0))
        held_out = one.run.eval_batches * one.data.batch * one.data.context
        tokens = one.run.steps * one.data.batch * one.data.context + round(1 / _HELD_OUT) * held_out
        for name in one.data.mixture:
            target = self.workdir / "data" / name
            if (target / "manifest.json").exists():
                continue
            self.say(f"preparing {target}")
            target.parent.mkdir(parents=True, exist_ok=True)
            if name not in TASKS:
                prepare(self.text, str(target), max_bytes=_TEXT_BYTES, valid_fraction=_HELD_OUT)
                continue
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                write(TASKS[name], pathlib.Path(folder) / f"{name}.jsonl", tokens, seed=0)
                prepare([f"{folder}/{name}.jsonl"], str(target), valid_fraction=1.2 * _HELD_OUT)

    def _claim(self) -> None:
        """A workdir is of one size and one text: its corpora would be too small for another, or of something else."""
        mine = {"budget": self.budget, "times": str(self.times), "text": ",".join(self.text)}
        path = self.workdir / "claims.json"
        if not path.exists():
            self.workdir.mkdir(parents=True, exist_ok=True)
            whole.write_json(path, mine)
            return
        try:
            there = whole.read_json(path)
            if there.keys() != mine.keys():
                raise whole.DamagedError(f"it has the fields {', '.join(there)}; legal: {', '.join(mine)}")
        except whole.DamagedError as error:
            raise ValueError(f"{str(path)!r} is damaged ({error}); take another --workdir") from error
        if there != mine:
            is_of, asked = (" ".join(f"--{name}={of[name]}" for name in mine) for of in (there, mine))
            raise ValueError(
                f"{str(self.workdir)!r} is of {is_of}; legal: the same here, or another --workdir for {asked}"
            )

    def chosen(self, variant: str) -> tuple[Mapping[float, float], Sequence[Run]]:
        """The sweep, a run of each rate with the first seed, trained; and a run of every seed with the best of them."""
        rates = self.rates or recipe.RATES[self.budget]
        sweep = {rate: self.trained(Run(variant, rate, 0)) for rate in rates}
        best = min(rates, key=lambda rate: sweep[rate])
        return sweep, [Run(variant, best, seed) for seed in range(self.seeds)]

    def trained(self, run: Run) -> float:
        """The held-out bits per byte of a run, trained now where it is not yet."""
        folder, config = self.folder(run), self.config(run)
        found = _last_evaluation(folder, config.run.steps)
        if found is None:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "train.log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
                finished = train(config, folder) is not None
            if not finished:
                raise Preempted(f"{folder} was told to stop, and saved")
            jax.clear_caches()
            found = _last_evaluation(folder, config.run.steps)
            assert found is not None
            self.say(f"{self.name}: {run.variant}, rate {run.rate:g}, seed {run.seed}: {found:.3f} bits per byte")
        return found

    def _found(self, run: Run) -> Found:
        both = set(self.config(run).model.memories) >= {"short", "long"}
        return Found(run, self.trained(run), self.ask(run, True), self.ask(run, False) if both else None)

    def ask(self, run: Run, long_term: bool) -> Answers:
        """What a trained run answers, asked now where it was not yet."""
        folder = self.folder(run)
        asker = Asker(folder, None, long_term)
        found: dict[str, Mapping[int, Sequence[float]]] = {}
        for asked in self._asked:
            found |= asked.ask(asker, folder / answers_folder(long_term))
        return found


@contextlib.contextmanager
def writing(workdir: pathlib.Path) -> Iterator[None]:
    """Makes the workdir of studies, and keeps another command from writing there meanwhile.

    Raises ValueError where one does, or where it is the place of something else, and OSError.
    """
    place.check(workdir, (place.EMPTY, place.STUDY), "--workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    with lock.hold(workdir / "lock", str(workdir)):
        yield


def answers_folder(long_term: bool) -> str:
    return "answers" if long_term else "answers_without_long_term"


def _last_evaluation(folder: pathlib.Path, steps: int) -> float | None:
    """The held-out bits per byte of a run that is finished."""
    path = folder / "metrics.jsonl"
    records = history.records(path) if path.is_file() else []
    if not any(record["kind"] == "end" and record.get("why") == "finished" for record in records):
        return None
    last = (r["bits_per_byte"] for r in reversed(records) if r["kind"] == "eval" and r["step"] == steps)
    return next(map(float, last), None)
