"""Every fault once: how a run is struck, and what must be left of it. `FAULTS` holds them by name."""

import dataclasses
import os
import pathlib
import signal
from collections.abc import Callable, Sequence
from typing import Any

from job import Job, arrays, identical, records
from suite import EVERY, Outcome, Suite

from mosaics_jax import goodput
from mosaics_jax.config import Config
from mosaics_jax.watchdog import HUNG

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
    def spoil(workdir: pathlib.Path) -> None:
        job = Job(suite.config(), workdir, fault="kill_in_restore")
        assert -signal.SIGKILL in job.end()

    return suite.spoilt("killed while a checkpoint is read", spoil)[0]


@_fault
def disk_full(suite: Suite) -> Outcome:
    outcome, first, _ = suite.broken("disk full during a save", fault=f"disk_full:{2 * EVERY}", ranks=1)
    assert f"failed: checkpoint {2 * EVERY} could not be saved" in first.log(), first.log()[-3000:]
    return outcome


@_fault
def disk_full_of_one(suite: Suite) -> Outcome:
    """The others wait for its part, and must not wait long."""
    outcome, first, _ = suite.broken("disk full for one rank of two", fault=f"disk_full_of_one:{2 * EVERY}")
    assert f"failed: checkpoint {2 * EVERY} could not be saved" in first.log(1), first.log(1)[-3000:]
    return outcome


def _damaged(name: str, suite: Suite, spoil: Callable[[pathlib.Path], None]) -> Outcome:
    def spoil_newest(workdir: pathlib.Path) -> None:
        newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else 0)
        assert (newest / "verified.json").exists()
        spoil(max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))

    outcome, second = suite.spoilt(name, spoil_newest)
    assert "is damaged" in second.log()
    assert outcome.lost > 0
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

    return suite.broken("a data worker that dies", strike=strike, **{"data.workers": 1})[0]


@_fault
def data_gone(suite: Suite) -> Outcome:
    def spoil(workdir: pathlib.Path) -> None:
        (shard,) = (suite.folder / "corpus").glob("train-*.tokens")
        shard.rename(suite.folder / "away")
        job = Job(suite.config(), workdir)
        assert set(job.end()) & {2}, job.log()
        assert f"{shard.name}' is missing" in job.log() + job.log(1)
        (suite.folder / "away").rename(shard)

    return suite.spoilt("a data file that disappears", spoil)[0]


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
