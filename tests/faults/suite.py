"""What a fault needs: runs that nobody disturbed, runs that are broken and started again, and what came of them."""

import dataclasses
import pathlib
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import helpers
from job import Job, arrays, identical, last_step, records

from mosaics_jax.config import Config

STEPS, EVERY = 36, 6


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One row of the table. `detected` is None where nothing was to be detected."""

    fault: str
    detected: float | None
    recovered: float | None
    lost: int
    expected: str
    as_expected: bool


class Suite:
    """A folder with a corpus, calm runs to compare with, and a run for each fault."""

    def __init__(self, folder: pathlib.Path, workers: int = 1):
        """`workers`: data workers of each process, of which the results do not depend."""
        self.folder, self.workers = folder, workers
        helpers.make_corpus(folder, documents=300)
        self._calm: dict[Any, dict[str, Any]] = {}
        self._stopped: pathlib.Path | None = None

    def config(self, **changes: Any) -> Config:
        settings = {
            "run.steps": STEPS, "checkpoint.every": EVERY, "run.log_every": 1, "run.eval_every": STEPS,
            "run.eval_batches": 1, "data.workers": self.workers, "run.watchdog_seconds": 6.0,
            "run.compilation_cache": "auto",
        }  # fmt: skip
        return helpers.tiny_config(self.folder / "corpus", **settings | changes)

    def calm(self, config: Config, ranks: int = 2, fault: str = "none") -> dict[str, Any]:
        """What a run ends with that nobody disturbs."""
        key = (str(config), ranks, fault)
        if key not in self._calm:
            workdir = self.folder / f"calm-{len(self._calm)}"
            job = Job(config, workdir, ranks, fault)
            assert set(job.end()) == {0}, job.log()[-3000:]
            self._calm[key] = arrays(workdir)
        return self._calm[key]

    def broken(
        self, name: str, *, fault: str = "none", strike: Callable[[Job], Sequence[int]] | None = None,
        at: int = 2 * EVERY + 3, ranks: int = 2, ranks_after: int | None = None, expected_codes: set[int] | None = None,
        heartbeat: int = 10, **changes: Any,
    ) -> tuple[Outcome, Job, Job]:  # fmt: skip
        """A run that is struck once it is at a step, or that strikes itself, and is started again.

        Args:
          fault: what rank.py does inside the first life.
          strike: what is done to it from outside, after step `at`; returns the ranks that cannot tell of it.
          changes: of the config, without which the same comes out.
        """
        config = self.config(**changes)
        workdir = self.folder / name.replace(" ", "-")
        first = Job(config, workdir, ranks, fault, heartbeat)
        struck: Sequence[int] = []
        if strike:
            assert first.wait_for(lambda: last_step(workdir) >= at), first.log()[-3000:]
            since = time.monotonic()
            struck = strike(first)
        else:
            first.wait_for(lambda: last_step(workdir) >= at)
            since = time.monotonic()
        detected = first.failed_after(since, struck)
        codes = first.end()
        if expected_codes:
            assert set(codes) & expected_codes, (codes, first.log()[-3000:])
        outcome, second = self._again(name, config, workdir, detected, ranks, ranks_after or ranks)
        return outcome, first, second

    def spoilt(self, name: str, spoil: Callable[[pathlib.Path], None]) -> tuple[Outcome, Job]:
        """A run that was told to stop, to whose folder something is done before it is started again."""
        if self._stopped is None:
            self._stopped = self.folder / "stopped"
            job = Job(self.config(), self._stopped)
            assert job.wait_for(lambda: last_step(self._stopped) > 2 * EVERY), job.log()[-3000:]
            job.signal(signal.SIGTERM)
            assert set(job.end()) == {75}, job.log()[-3000:]
        workdir = self.folder / name.replace(" ", "-")
        shutil.copytree(self._stopped, workdir)
        spoil(workdir)
        return self._again(name, self.config(), workdir, None, 2, 2)

    def _again(
        self, name: str, config: Config, workdir: pathlib.Path, detected: float | None, ranks: int, ranks_after: int
    ) -> tuple[Outcome, Job]:
        reached, again = last_step(workdir), len(records(workdir, "train"))
        second = Job(config, workdir, ranks_after)
        second.wait_for(lambda: len(records(workdir, "train")) > again)
        recovered = time.monotonic() - second.began
        assert set(second.end()) == {0}, second.log()[-3000:]
        resumed = records(workdir, "resume")[-1]["step"] if records(workdir, "resume") else 0
        same = identical(arrays(workdir), self.calm(self.config(), ranks))
        return Outcome(name, detected, recovered, reached - resumed, "identical", same), second


def table(outcomes: list[Outcome]) -> str:
    lines = ["| fault | detected, s | recovered, s | steps lost | expected | so it is |", "|---|---|---|---|---|---|"]
    for one in outcomes:
        seconds = ["-" if value is None else f"{value:.1f}" for value in (one.detected, one.recovered)]
        so = "yes" if one.as_expected else "NO"
        lines.append(f"| {one.fault} | {seconds[0]} | {seconds[1]} | {one.lost} | {one.expected} | {so} |")
    return "\n".join(lines)
