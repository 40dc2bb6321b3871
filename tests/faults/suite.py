"""Breaks runs in every way that this file knows, and holds what is left against a run that nobody disturbed.

    make faults        (or: PYTHONPATH=.:tests python tests/faults/suite.py --kills=20 --faults=stop,flipped)

Real processes on the CPU, data workers on. For each fault: seconds until the run was found broken, seconds from its
next start to its next step, steps computed twice, and whether the last checkpoint is the undisturbed run's to the bit.
"""

import argparse
import dataclasses
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import helpers
from job import Job, arrays, identical, last_step, records

from mosaics_jax import goodput
from mosaics_jax.config import Config
from mosaics_jax.watchdog import HUNG

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

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        helpers.make_corpus(folder, documents=300)
        self._calm: dict[Any, dict[str, Any]] = {}

    def config(self, **changes: Any) -> Config:
        settings = {
            "run.steps": STEPS, "checkpoint.every": EVERY, "run.log_every": 1, "run.eval_every": STEPS,
            "run.eval_batches": 1, "data.workers": 1, "run.watchdog_seconds": 6.0, "run.compilation_cache": "auto",
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
        at: int = 2 * EVERY + 3, between: Callable[[pathlib.Path], None] | None = None, ranks: int = 2,
        ranks_after: int | None = None, expected_codes: set[int] | None = None, heartbeat: int = 10,
    ) -> tuple[Outcome, Job, Job]:  # fmt: skip
        """A run that is struck once it is at a step, or that strikes itself, and is started again.

        Args:
          fault: what rank.py does inside the first life.
          strike: what is done to it from outside, after step `at`; returns the ranks that cannot tell of it.
          between: what is done to its files before the second life.
        """
        config = self.config()
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
        reached = last_step(workdir)
        if between:
            between(workdir)
        again = len(records(workdir, "train"))
        second = Job(config, workdir, ranks_after or ranks)
        second.wait_for(lambda: len(records(workdir, "train")) > again)
        recovered = time.monotonic() - second.began
        assert set(second.end()) == {0}, second.log()[-3000:]
        resumed = records(workdir, "resume")[-1]["step"] if records(workdir, "resume") else 0
        same = identical(arrays(workdir), self.calm(config, ranks))
        return Outcome(name, detected, recovered, reached - resumed, "identical", same), first, second


FAULTS: dict[str, Callable[[Suite], Outcome]] = {}


def _fault(run: Callable[[Suite], Outcome]) -> Callable[[Suite], Outcome]:
    FAULTS[run.__name__] = run
    return run


@_fault
def kill_one(suite: Suite) -> Outcome:
    return suite.broken("SIGKILL of one rank", strike=lambda job: job.signal(signal.SIGKILL, [1]))[0]


@_fault
def kill_first(suite: Suite) -> Outcome:
    return suite.broken("SIGKILL of rank 0 of 4", strike=lambda job: job.signal(signal.SIGKILL, [0]), ranks=4)[0]


@_fault
def kill_all(suite: Suite) -> Outcome:
    return suite.broken("SIGKILL of all ranks", strike=lambda job: job.signal(signal.SIGKILL))[0]


@_fault
def terminate(suite: Suite) -> Outcome:
    outcome, first, _ = suite.broken(
        "SIGTERM to one rank", strike=lambda job: job.signal(signal.SIGTERM, [1]), expected_codes={75}
    )
    assert "SIGTERM: saved step" in first.log()
    assert outcome.lost <= 0
    return outcome


@_fault
def stop(suite: Suite) -> Outcome:
    # A heartbeat that is missed would end the rest too, without the stacks.
    outcome, first, _ = suite.broken(
        "SIGSTOP of one rank", strike=lambda job: job.signal(signal.SIGSTOP, [1]), expected_codes={HUNG}, heartbeat=60
    )
    (dump,) = (first.workdir / "hangs").glob("*-step-*/process-0.txt")
    text = dump.read_text()
    assert "is not done after" in text
    assert "loop.py" in text
    return outcome


@_fault
def killed_in_write(suite: Suite) -> Outcome:
    def strike(job: Job) -> Sequence[int]:
        drafts = lambda: [p for p in (job.workdir / "checkpoints").iterdir() if "tmp" in p.name]  # noqa: E731
        job.wait_for(lambda: bool(drafts()))
        return job.signal(signal.SIGKILL)

    return suite.broken("killed while a checkpoint is written", strike=strike)[0]


@_fault
def killed_in_commit(suite: Suite) -> Outcome:
    return suite.broken("killed before a checkpoint's rename", fault=f"kill_in_commit:{2 * EVERY}")[0]


@_fault
def killed_after_commit(suite: Suite) -> Outcome:
    return suite.broken("killed before a checkpoint is verified", fault=f"kill_after_commit:{2 * EVERY}")[0]


@_fault
def killed_in_restore(suite: Suite) -> Outcome:
    def between(workdir: pathlib.Path) -> None:
        job = Job(suite.config(), workdir, fault="kill_in_restore")
        job.end()

    return suite.broken(
        "killed while a checkpoint is read", strike=lambda job: job.signal(signal.SIGKILL), between=between
    )[0]


@_fault
def disk_full(suite: Suite) -> Outcome:
    outcome, first, _ = suite.broken("disk full during a save", fault=f"disk_full:{2 * EVERY}", ranks=1)
    assert f"failed: checkpoint {2 * EVERY} could not be saved" in first.log(), first.log()[-3000:]
    return outcome


def _damaged(name: str, suite: Suite, spoil: Callable[[pathlib.Path], None]) -> Outcome:
    def between(workdir: pathlib.Path) -> None:
        newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else 0)
        assert (newest / "verified.json").exists()
        spoil(max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))

    def strike(job: Job) -> Sequence[int]:
        job.wait_for(lambda: (job.workdir / "checkpoints" / str(3 * EVERY) / "verified.json").exists())
        return job.signal(signal.SIGKILL)

    outcome, _, second = suite.broken(name, strike=strike, between=between)
    assert "is damaged" in second.log()
    return outcome


@_fault
def truncated(suite: Suite) -> Outcome:
    def spoil(path: pathlib.Path) -> None:
        os.truncate(path, path.stat().st_size // 2)

    return _damaged("a checkpoint with a truncated file", suite, spoil)


@_fault
def flipped(suite: Suite) -> Outcome:
    def spoil(path: pathlib.Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return _damaged("a checkpoint with a flipped bit", suite, spoil)


@_fault
def missing(suite: Suite) -> Outcome:
    return _damaged("a checkpoint that lacks a file", suite, lambda path: path.unlink())


def _skipped(name: str, suite: Suite, fault: str, step: int, config: Config, why: str) -> Outcome:
    """A run that goes on by itself, without exactly one batch."""
    workdir = suite.folder / name.replace(" ", "-")
    job = Job(config, workdir, fault=f"{fault}:{step}")
    assert set(job.end()) == {0}, job.log()[-3000:]
    (skip,) = records(workdir, "skip")
    batch = config.data.batch
    found = (skip["step"], skip["why"], skip["rows"]) == (step, why, [(step - 1) * batch, step * batch - 1])
    same = identical(_weights(arrays(workdir)), _weights(suite.calm(config, fault=f"left_out:{step}")))
    return Outcome(name, 0.0, 0.0, 0, "one batch skipped", found and same)


def _weights(found: dict[str, Any]) -> dict[str, Any]:
    """Without the ring of losses, where the run left out by hand has another number of the same step."""
    return {name: array for name, array in found.items() if name != "counters.recent"}


@_fault
def nan(suite: Suite) -> Outcome:
    return _skipped("NaN in one batch", suite, "nan", 20, suite.config(), "not finite")


@_fault
def exploding(suite: Suite) -> Outcome:
    config = suite.config(**{"run.steps": 160, "run.eval_every": 160, "checkpoint.every": 40, "run.spike_sigma": 6.0})
    return _skipped("an exploding loss", suite, "explode", 145, config, "loss spike")


@_fault
def worker_dies(suite: Suite) -> Outcome:
    def strike(job: Job) -> Sequence[int]:
        (worker,) = job.workers(1)
        os.kill(worker, signal.SIGKILL)
        return []

    return suite.broken("a data worker that dies", strike=strike)[0]


@_fault
def data_gone(suite: Suite) -> Outcome:
    def between(workdir: pathlib.Path) -> None:
        corpus = suite.folder / "corpus"
        (shard,) = corpus.glob("train-*.tokens")
        shard.rename(suite.folder / "away")
        job = Job(suite.config(), workdir)
        assert set(job.end()) & {2}, job.log()
        assert f"{shard.name}' is missing" in job.log() + job.log(1)
        (suite.folder / "away").rename(shard)

    return suite.broken("a data file that disappears", strike=lambda job: job.signal(signal.SIGKILL), between=between)[
        0
    ]


@_fault
def clock(suite: Suite) -> Outcome:
    """Orbax measures its patience by the wall clock: a save that is under way may fail, and the run with it."""
    workdir = suite.folder / "clock"
    first = Job(suite.config(), workdir, fault=f"clock:{EVERY + 3}")
    codes = set(first.end())
    assert codes == {0} or "could not be saved" in first.log() + first.log(1), first.log()[-3000:]
    if codes != {0}:
        again = Job(suite.config(), workdir)
        assert set(again.end()) == {0}, again.log()[-3000:]
    times = [record["time"] for record in records(workdir, "train")]
    found = goodput.measure(workdir)
    sane = max(times) - min(times) > 80000 and found.total < 200
    same = identical(arrays(workdir), suite.calm(suite.config()))
    return Outcome("a clock that jumps by days", None, None, 0, "identical", same and sane)


@_fault
def other_mesh(suite: Suite) -> Outcome:
    """Not bit for bit: sums are in another order. What was restored is, by the fingerprints."""
    outcome, _, second = suite.broken(
        "killed as 4 ranks, resumed as 2", strike=lambda job: job.signal(signal.SIGKILL), ranks=4, ranks_after=2
    )
    resumed = records(second.workdir, "resume")
    return dataclasses.replace(
        outcome, expected="restored as saved; sums in another order",
        as_expected=len(resumed) == 1 and resumed[0]["step"] > 0,
    )  # fmt: skip


def random_kills(suite: Suite, kills: int, seed: int = 0) -> tuple[list[str], Outcome, goodput.Goodput]:
    """Runs of 240 steps, killed again and again at moments that are drawn, until there were so many kills.

    Returns where each kill fell, whether every run ended as the calm one, and the time of the run of the most lives.
    """
    config = suite.config(**{"run.steps": 240, "run.eval_every": 240})
    calm = suite.calm(config)
    draw, fell, runs = random.Random(seed), [], []
    while len(fell) < kills:
        workdir = suite.folder / f"killed-{len(runs)}"
        runs.append(workdir)
        while not _finished(workdir):
            job = Job(config, workdir)
            if len(fell) < kills and (phase := _kill(job, draw)):
                fell.append(phase)
            else:
                assert set(job.end()) == {0}, job.log()[-3000:]
    found = [goodput.measure(workdir) for workdir in runs]
    same = all(identical(arrays(workdir), calm) for workdir in runs)
    lost = sum(one.lost_steps for one in found)
    name = f"{len(fell)} kills at random moments, of {len(runs)} runs"
    most = max(found, key=lambda one: len(one.lives))
    return fell, Outcome(name, None, None, lost, "identical", same), most


def _kill(job: Job, draw: random.Random) -> str:
    """Kills a life at a drawn moment; where that fell, or "" where it ended by itself before."""
    kinds = ("start", "resume", "compile", "train")
    before = {kind: len(records(job.workdir, kind)) for kind in kinds}
    # From the launch, the opened workdir, the restored state, or the first step on: so all of a life is struck.
    after = draw.choice(["launch", "start", "compile", "train", "train", "train"])
    job.wait_for(lambda: after == "launch" or len(records(job.workdir, after)) > before[after], 120)
    time.sleep(draw.uniform(0, 1.5))
    if not job.running():
        return ""
    one = draw.random() < 0.2
    job.signal(signal.SIGKILL, [draw.randrange(2)] if one else None)
    phase = _phase(job.workdir, before)
    job.end()
    return phase + (", one rank" if one else "")


def _finished(workdir: pathlib.Path) -> bool:
    return [record["why"] for record in records(workdir, "end")[-1:]] == ["finished"]


def _phase(workdir: pathlib.Path, before: dict[str, int]) -> str:
    drafts = (workdir / "checkpoints").iterdir() if (workdir / "checkpoints").exists() else []
    if any("tmp" in path.name for path in drafts):
        return "save"
    for kind, phase in (("train", "train"), ("compile", "first step"), ("resume", "compile"), ("start", "restore")):
        if len(records(workdir, kind)) > before[kind]:
            return phase
    return "start"


def table(outcomes: list[Outcome]) -> str:
    lines = ["| fault | detected, s | recovered, s | steps lost | expected | so it is |", "|---|---|---|---|---|---|"]
    for one in outcomes:
        seconds = ["-" if value is None else f"{value:.1f}" for value in (one.detected, one.recovered)]
        so = "yes" if one.as_expected else "NO"
        lines.append(f"| {one.fault} | {seconds[0]} | {seconds[1]} | {one.lost} | {one.expected} | {so} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="random kill points")
    parser.add_argument("--faults", default=",".join(FAULTS), help="which, by name")
    parser.add_argument("--output", default="", help="folder for faults.md and goodput.png")
    given = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="faults-"))
    suite, outcomes = Suite(folder), []
    for name in filter(None, given.faults.split(",")):
        outcomes.append(FAULTS[name](suite))
        print(table(outcomes[-1:]).splitlines()[-1], flush=True)
    text = "\n" + table(outcomes) + "\n"
    if given.kills:
        fell, outcome, found = random_kills(suite, given.kills)
        outcomes.append(outcome)
        text = "\n" + table(outcomes) + "\n\nWhere the random kills fell: "
        text += ", ".join(f"{phase} {fell.count(phase)}" for phase in sorted(set(fell))) + ".\n\n"
        text += goodput.table(found) + "\n"
    print(text)
    if given.output:
        output = pathlib.Path(given.output)
        output.mkdir(parents=True, exist_ok=True)
        (output / "faults.md").write_text(text.lstrip())
        if given.kills:
            goodput.draw(found, output / "goodput.png")
    if not all(one.as_expected for one in outcomes):
        sys.exit(f"not all as expected; the runs are in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
