"""Checkpoints: weights, optimiser, counters, data position, config and corpus fingerprint, saved and restored together.

Orbax writes them asynchronously into `workdir/checkpoints/<step>/` and makes each visible by one rename, so a process
killed at any moment leaves whole checkpoints only. What was committed is then read back and held against fingerprints
that the devices took, and only what agreed counts as good: of those the newest are kept, and a damaged one is passed
over. `docs/checkpoint.md` describes what lies in one.
"""

import dataclasses
import logging
import pathlib
import re
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp

from mosaics_jax import fingerprint, integrity, paths, processes, whole
from mosaics_jax.config import CheckpointConfig
from mosaics_jax.record import RECORD, RunRecord, no_run
from mosaics_jax.step import TrainState

COUNTERS = ("step", "skipped", "skipped_in_row", "recent")
STEP = re.compile("0|[1-9][0-9]{0,17}")  # as their folders are called
_DRAFT = ".orbax-checkpoint-tmp"  # what Orbax adds to the name of a checkpoint that is not committed


class SaveFailed(RuntimeError):
    """A checkpoint could not be written: a disk that is full, or away. The one before it is untouched."""


@dataclasses.dataclass(frozen=True)
class _Saving:
    """A save that is under way."""

    step: int
    fingerprints: Any  # on the devices until the save is verified
    began: float
    blocking: float
    committed: Future[float]  # when; raises what Orbax does


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: pathlib.Path, config: CheckpointConfig | None = None):
        """Without `config` the directory is opened for reading only."""
        # Orbax reports every save and every read-only opening in many lines; what fails, it raises.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._workdir, self._config = workdir.absolute(), config
        self._directory = self._workdir / "checkpoints"
        self._plain = paths.Plain(self._directory)
        if config and jax.process_index() == 0:
            self._directory.mkdir(parents=True, exist_ok=True)
            for left in [*self._directory.glob("*.removing"), *self._directory.glob(f"*{_DRAFT}*")]:
                shutil.rmtree(left, ignore_errors=True)
        # Not Orbax's manager: where one process alone fails, it has that one too wait for the others, for its patience.
        handlers = {name: ocp.StandardCheckpointHandler() for name in integrity.ARRAYS}
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(**handlers, record=ocp.JsonCheckpointHandler())
        )
        self._saving: _Saving | None = None
        self._committer = ThreadPoolExecutor(1, "commit")
        self._verifier = ThreadPoolExecutor(1, "verify")
        self._verifying: list[Future[dict[str, Any]]] = []

    def steps(self) -> list[int]:
        """Those on the disk, in order, good or not."""
        if not self._directory.is_dir():
            return []
        return sorted(
            int(path.name) for path in self._directory.iterdir() if STEP.fullmatch(path.name) and path.is_dir()
        )

    def chosen(self, step: int | None) -> int:
        """`step`, or the newest for None. ValueError where there is none, or not that one."""
        steps = self.steps()
        if not steps:
            if not (self._workdir / RECORD).exists():
                raise no_run(self._workdir)
            raise ValueError(
                f"{self._directory.parent} holds no checkpoint yet; the first comes after checkpoint.every steps"
            )
        if step is not None and step not in steps:
            raise ValueError(f"{self._directory.parent} has no checkpoint {step}; legal: {', '.join(map(str, steps))}")
        return steps[-1] if step is None else step

    def save(self, state: TrainState, step: int, record: RunRecord) -> None:
        """Starts a save, once the one before is committed; the state may be donated to the next step at once."""
        began = time.perf_counter()
        self._commit()
        items = arrays(state)
        if not self._directory.is_dir():  # Orbax would make a workdir that was removed anew, and nothing else in it
            raise SaveFailed(f"checkpoint {step} could not be saved: {self._directory} is not there any more")
        try:
            self._orbax.save(
                self._plain.path / str(step),
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                    record=ocp.args.JsonSave(record.to_dict()),
                ),
            )
        except Exception as error:
            raise self._failed(step, error) from error
        # After it: Orbax's copies, and its meeting of several processes, would wait on the devices for them.
        fingerprints = fingerprints_of(state)
        blocking = time.perf_counter() - began
        self._saving = _Saving(step, fingerprints, began, blocking, self._committer.submit(self._wait_for_orbax))

    def poll(self) -> list[dict[str, Any]]:
        """What has become of saves since the last call, as records for the metrics. Raises SaveFailed."""
        if self._saving and self._saving.committed.done():
            self._commit()
        done = [found for found in self._verifying if found.done()]
        self._verifying = [found for found in self._verifying if not found.done()]
        return [found.result() for found in done]

    def wait(self) -> list[dict[str, Any]]:
        """As `poll`, once the last save is on disk and verified."""
        self._commit()
        found = [one.result() for one in self._verifying]
        self._verifying = []
        return found

    def close(self) -> None:
        self._committer.shutdown()
        try:
            self._orbax.close()
        finally:
            self._verifier.shutdown()
            self._plain.close()

    def problem(self, step: int) -> str:
        """Why a checkpoint cannot be trusted, or "": the same on all processes, which look at a part each.

        Raises UnreadableError.
        """
        part = slice(jax.process_index(), None, jax.process_count())
        return integrity.agreed(lambda: integrity.damage(self._plain.path / str(step), part), f"checkpoint {step}")

    def set_aside(self, step: int) -> pathlib.Path:
        """Moves a damaged checkpoint out of the way; all processes call it. Returns where it lies."""
        target = self._workdir / "damaged" / str(step)
        if jax.process_index() == 0:
            target.parent.mkdir(exist_ok=True)
            while target.exists():
                target = target.with_name(target.name + "-again")
            (self._directory / str(step)).rename(target)
        processes.barrier(f"checkpoint {step} set aside")
        return target

    def record(self, step: int) -> RunRecord:
        """What the step was saved with. Raises DamagedError, UnreadableError, and ValueError for another version's."""
        try:
            # Orbax writes one file; read as any other, so that damage can be told from all else.
            saved = whole.load_json(self._directory / str(step) / "record" / "metadata")
            return RunRecord.from_dict(saved)
        except (OSError, whole.DamagedError) as error:
            where = self._directory / str(step)
            raise whole.DamagedError(f"the record of {where} is damaged ({integrity.damage_of(error)})") from error

    def weights_fingerprint(self, step: int) -> str:
        """sha256 of the fingerprints of the weights: the same for the same weights. Raises as `params`."""
        directory = self._plain.path / str(step)
        try:
            prints = integrity.fingerprints(directory)
            return whole.digest(prints["params"] if prints else integrity.read(directory / "params", slice(None)))
        except Exception as error:
            raise self._unreadable(step, integrity.damage_of(error)) from error

    def params(self, step: int, abstract_params: Any) -> Any:
        """The weights, checked. Raises ValueError where the checkpoint is damaged, and UnreadableError."""
        if damage := integrity.damage(self._plain.path / str(step), slice(None)):
            raise self._unreadable(step, damage)
        return self._restore(step, params=ocp.args.StandardRestore(abstract_params))["params"]

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """The saved state, in the shardings of `abstract_state` (shapes with shardings). Raises as `params`."""
        abstract = arrays(abstract_state)
        found = self._restore(step, **{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()})
        state = state_of(found)
        expected = integrity.fingerprints(self._directory / str(step))
        if expected and (wrong := integrity.differing(expected, jax.device_get(fingerprints_of(state)))):
            raise self._unreadable(step, f"{wrong} was read, and is not what was saved")
        return state

    def _commit(self) -> None:
        """Waits for the save that is under way, and has it verified."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        try:
            seconds = saving.committed.result() - saving.began
        except Exception as error:
            raise self._failed(saving.step, error) from error
        if jax.process_index() == 0:
            self._verifying.append(self._verifier.submit(self._verify, saving, seconds))

    def _wait_for_orbax(self) -> float:
        """When the save that is under way is committed. A process whose own part fails raises at once."""
        self._orbax.wait_until_finished()
        return time.perf_counter()

    def _verify(self, saving: _Saving, seconds: float) -> dict[str, Any]:
        """Reads a committed checkpoint back; keeps it as good, or sets it aside. Runs beside the training."""
        began, name = time.perf_counter(), str(saving.step)
        try:
            problem = integrity.prove(self._plain.path / name, jax.tree.map(int, jax.device_get(saving.fingerprints)))
            if problem:
                (self._workdir / "damaged").mkdir(exist_ok=True)
                (self._directory / name).rename(self._workdir / "damaged" / f"{name}-{time.time_ns()}")
                problem = f"it is not on the disk what it was, and set aside: {problem}"
            else:
                self._retire()
        except integrity.UnreadableError as error:
            problem = f"it cannot be looked at, and stays where it is, unverified: {error}"
        return {
            "step": saving.step, "tier": "durable", "blocking": saving.blocking, "seconds": seconds,
            "verify_seconds": time.perf_counter() - began, "problem": problem,
        }  # fmt: skip

    def _retire(self) -> None:
        assert self._config is not None
        marks = {step: self._directory / str(step) / integrity.VERIFIED for step in self.steps()}
        times = {step: mark.stat().st_mtime for step, mark in marks.items() if mark.exists()}
        for step in retired(list(marks), times, self._config):
            gone = self._directory / f"{step}.removing"
            (self._directory / str(step)).rename(gone)  # never half a checkpoint under a checkpoint's name
            shutil.rmtree(gone, ignore_errors=True)

    def _failed(self, step: int, error: Exception) -> SaveFailed:
        older = [one for one in self.steps() if one != step]
        return SaveFailed(
            f"checkpoint {step} could not be saved in {self._directory} ({integrity.first_line(error)}); the same "
            f"command goes on from step {older[-1] if older else 0}"
        )

    def _unreadable(self, step: int, reason: str) -> ValueError:
        return ValueError(
            f"checkpoint {self._directory / str(step)} cannot be read ({reason}); move that directory away, or "
            "resume the run, which goes on from the one before it"
        )

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._orbax.restore(self._plain.path / str(step), args=ocp.args.Composite(**items))
        except Exception as error:
            raise self._unreadable(step, integrity.damage_of(error)) from error


def arrays(state: TrainState) -> dict[str, Any]:
    """The three items of arrays that a checkpoint has."""
    counters = {name: getattr(state, name) for name in COUNTERS}
    return {"params": state.params, "optimizer": state.opt_state, "counters": counters}


def state_of(items: dict[str, Any]) -> TrainState:
    """What `arrays` was made of."""
    return TrainState(params=items["params"], opt_state=items["optimizer"], **items["counters"])


@jax.jit
def _fingerprints(items: dict[str, Any]) -> dict[str, dict[str, jax.Array]]:
    return {item: fingerprint.of_tree(tree) for item, tree in items.items()}


def fingerprints_of(state: TrainState) -> dict[str, dict[str, jax.Array]]:
    """uint32 of every array, by item and name; on the devices, whatever the mesh."""
    return _fingerprints(arrays(state))


def retired(steps: list[int], verified: dict[int, float], config: CheckpointConfig) -> list[int]:
    """The steps that go: all older than the newest `keep` verified ones, but those that are kept for ever.

    Args:
      verified: for each checkpoint that was verified, when, in seconds.
    """
    newest = sorted(verified)[-config.keep :]
    if len(newest) < config.keep:
        return []
    kept = set(config.steps)
    if config.keep_every:
        kept |= {step for step in steps if step % config.keep_every == 0}
    last = None
    for step in sorted(verified):
        # A clock that was set back must not stop this for ever.
        if config.keep_hours and (last is None or not 0 <= verified[step] - last < 3600 * config.keep_hours):
            kept.add(step)
            last = verified[step]
    return [step for step in steps if step < newest[0] and step not in kept]
