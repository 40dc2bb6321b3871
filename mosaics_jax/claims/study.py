"""Trains every variant of a study and asks each the same; what is on disk is not done again.

W/data/<corpus>                               prepared corpora, shared by all runs
W/runs/<study>/<variant>/<rate>-seed<s>/      a run of launch.train, and its answers
W/<study>.{json,md,png}                       the report
"""

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from configs import claims as recipe
from mosaics_jax import goodput, metrics, roofline
from mosaics_jax.claims.episodes import TASKS, Task, write
from mosaics_jax.claims.questions import Questions, accuracy
from mosaics_jax.config import Config, MeshConfig
from mosaics_jax.data.corpus import Manifest
from mosaics_jax.data.prepare import prepare
from mosaics_jax.evaluate import report, suite
from mosaics_jax.evaluate.model import RunModel
from mosaics_jax.evaluate.perplexity import Perplexity
from mosaics_jax.nn.model import parameter_count
from mosaics_jax.train import train

RATES = (1e-3, 3e-3, 1e-2)
LONGER = (1, 2, 4, 8)  # times the training length


class Run(NamedTuple):
    """One training of one variant."""

    variant: str
    rate: float
    seed: int


class Found(NamedTuple):
    """What came of a run: its held-out loss, and its answers, "whole" and with the long-term memory "removed", by x."""

    run: Run
    bits_per_byte: float
    answers: dict[str, dict[int, list[float]]]


@dataclasses.dataclass(frozen=True)
class Study:
    """One study in one workdir. `text` is what the corpus of text is made of, as `launch.prepare --input` takes it."""

    name: str
    workdir: pathlib.Path
    budget: str = "cpu"
    seeds: int = 3
    variants: Sequence[str] = tuple(recipe.VARIANTS)
    rates: Sequence[float] = RATES
    text: Sequence[str] = ("python",)
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)  # "section.field": value, of every run
    say: Callable[[str], None] = print

    def config(self, run: Run) -> Config:
        values = recipe.get_config(f"{self.budget},{self.name},{run.variant}").to_dict()
        changes = {
            "data.path": str(self.workdir / "data"), "data.seed": run.seed, "run.seed": run.seed,
            "optimizer.peak_learning_rate": run.rate,
        }  # fmt: skip
        for name, value in (changes | self.changes).items():
            section, field = name.split(".")
            values[section][field] = value
        return Config.from_dict(values)

    def folder(self, run: Run) -> pathlib.Path:
        return self.workdir / "runs" / self.name / run.variant / f"{run.rate:g}-seed{run.seed}"

    @property
    def task(self) -> Task | None:
        """What the study asks; None: text."""
        return next((TASKS[name] for name in recipe.STUDIES[self.name][0] if name in TASKS), None)

    def run(self) -> report.Report:
        """Everything: corpora, runs, answers, report."""
        self._prepare()
        return self._report({variant: list(self._train(variant)) for variant in self.variants})

    def _prepare(self) -> None:
        """The corpora that the study needs and that are not there."""
        one = self.config(Run(self.variants[0], self.rates[0], 0))
        held_out = one.run.eval_batches * one.data.batch * one.data.context
        tokens = one.run.steps * one.data.batch * one.data.context + 20 * held_out  # a twentieth is held out
        for name in one.data.mixture:
            target = self.workdir / "data" / name
            if (target / "manifest.json").exists():
                continue
            self.say(f"preparing {target}")
            target.parent.mkdir(parents=True, exist_ok=True)
            if name not in TASKS:
                prepare(self.text, str(target), max_bytes=4 * tokens)
                continue
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                write(TASKS[name], pathlib.Path(folder) / f"{name}.jsonl", tokens, seed=0)
                prepare([f"{folder}/{name}.jsonl"], str(target), valid_fraction=0.06)

    def _train(self, variant: str) -> Iterator[Found]:
        """A run of each rate with the first seed; then the other seeds with the best of them. Asks these and it."""
        losses = {rate: self._trained(Run(variant, rate, 0)) for rate in self.rates}
        best = min(losses, key=lambda rate: losses[rate])
        for seed in range(self.seeds):
            run = Run(variant, best, seed)
            yield Found(run, self._trained(run) if seed else losses[best], self._ask(run))

    def _trained(self, run: Run) -> float:
        """The held-out bits per byte of a run, trained now where it is not yet."""
        folder, config = self.folder(run), self.config(run)
        found = _last_evaluation(folder, config.run.steps)
        if found is None:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
                train(config, folder)
            jax.clear_caches()
            found = _last_evaluation(folder, config.run.steps)
            assert found is not None
            self.say(f"{self.name}: {run.variant}, rate {run.rate:g}, seed {run.seed}: {found:.3f} bits per byte")
        return found

    def _ask(self, run: Run) -> dict[str, dict[int, list[float]]]:
        """The answers of a run, and where it has a long-term memory beside another, of what is left without it."""
        answers = {"whole": self._answers(run, long_term=True)}
        if set(self.config(run).model.memories) >= {"short", "long"}:
            answers["removed"] = self._answers(run, long_term=False)
        return answers

    def _answers(self, run: Run, long_term: bool) -> dict[int, list[float]]:
        """By x: right or wrong of each answer; of text, the nats of each document's last tokens by length read."""
        folder = self.folder(run)
        model = RunModel(folder, MeshConfig(), long_term=long_term)
        directory = folder / ("answers" if long_term else "answers_without_long_term")
        if self.task is not None:
            return accuracy(suite.answers(Questions(self.task, model.tokenizer), model, directory))
        lengths = [times * model.context for times in LONGER]
        manifest = Manifest.load(self.workdir / "data" / "text")
        records = suite.answers(Perplexity(manifest, lengths, context=model.context), model, directory)
        return {length: [r["tail"] for r in records if r["length"] == length] for length in lengths}

    def _report(self, found: dict[str, list[Found]]) -> report.Report:
        task = self.task
        axis, what = (task.axis, "Accuracy in percent") if task else ("tokens", "Nats of a document's last 256 tokens")
        tables, series = [self._sizes(found)], []
        for kind, title in (("whole", "as trained"), ("removed", "long-term memory removed")):
            rows: list[list[Any]] = []
            for variant, runs in found.items():
                if kind not in runs[0].answers:
                    continue
                by_x = {x: [report.mean(one.answers[kind][x]) for one in runs] for x in runs[0].answers[kind]}
                rows.append([variant, *(_spread(values, percent=task is not None) for values in by_x.values())])
                if kind == "whole":
                    one = report.curve(variant, list(by_x), list(by_x.values()))
                    series.append({**one, "main": variant == "mosaic"})
            if rows:
                columns = ["variant", *(f"{x:,} {axis}" for x in by_x)]
                title = f"{what}, {title}: mean of {self.seeds} seeds ± standard error"
                tables.append(report.Table(title, columns, rows))
        more: dict[str, Any] = {"log_x": True}
        if task:
            more |= {"levels": {"chance": task.chance}, "marks": {str(task.trained): "trained"}}
        data = report.lines(self.name, axis, "accuracy" if task else "nats", series, **more)
        return report.Report(tables, [report.Figure(self.name, data)])

    def _sizes(self, found: dict[str, list[Found]]) -> report.Table:
        rows = []
        for variant, runs in found.items():
            config = self.config(runs[0].run)
            tokens = config.data.batch * config.data.context
            flops = metrics.step_flops(config, roofline.visible_pairs(config, config.data.context)) / 3 / tokens
            rows.append([
                variant, parameter_count(config.model), round(flops), f"{runs[0].run.rate:g}",
                _spread([one.bits_per_byte for one in runs], percent=False),
            ])  # fmt: skip
        columns = ["variant", "parameters", "FLOPs a token, forward", "best rate", "held out, bits per byte"]
        return report.Table("What was trained", columns, rows)


def _spread(values: Sequence[float], percent: bool) -> str:
    if percent:
        return report.percent(values)
    return f"{report.mean(values):.3f}" + (f" ± {report.standard_error(values):.3f}" if len(values) > 1 else "")


def _last_evaluation(folder: pathlib.Path, steps: int) -> float | None:
    """The held-out bits per byte of a run that is finished."""
    path = folder / "metrics.jsonl"
    records = goodput.records(path) if path.is_file() else []
    if not any(record["kind"] == "end" and record["why"] == "finished" for record in records):
        return None
    return next(float(r["bits_per_byte"]) for r in reversed(records) if r["kind"] == "eval" and r["step"] == steps)
