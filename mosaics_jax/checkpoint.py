"""Checkpoints: weights, optimiser, counters, data position, config and corpus fingerprint, saved and restored together.

Orbax writes them asynchronously into `workdir/checkpoints/<step>/` and makes each visible by one rename, so a process
killed at any moment leaves whole checkpoints only. What was committed is then read back and held against fingerprints
that the devices took, and only what agreed counts as good: of those the newest are kept, and a damaged one is passed
over. `docs/checkpoint.md` describes what lies in one.
"""

import dataclasses
import json
import logging
import pathlib
import shutil
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore

from mosaics_jax import fingerprint, processes
from mosaics_jax.config import CheckpointConfig
from mosaics_jax.record import RunRecord
from mosaics_jax.step import TrainState

COUNTERS = ("step", "skipped", "skipped_in_row", "recent")
_ARRAYS = ("params", "optimizer", "counters")
_VERIFIED = "verified.json"
_DRAFT = ".orbax-checkpoint-tmp"  # what Orbax adds to the name of a checkpoint that is not committed
_PIECE = 1 << 24  # bytes of a file that are looked at, at a time


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
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._workdir, self._config = workdir.absolute(), config
        self._directory = self._workdir / "checkpoints"
        if config and jax.process_index() == 0:
            self._directory.mkdir(parents=True, exist_ok=True)
            for left in [*self._directory.glob("*.removing"), *self._directory.glob(f"*{_DRAFT}*")]:
                shutil.rmtree(left, ignore_errors=True)
        # Not Orbax's manager: where one process alone fails, it has that one too wait for the others, for its patience.
        handlers = {name: ocp.StandardCheckpointHandler() for name in _ARRAYS}
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
        return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdigit())

    def chosen(self, step: int | None) -> int:
        """`step`, or the newest for None. ValueError where there is none, or not that one."""
        steps = self.steps()
        if not steps:
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
        fingerprints = _fingerprints(items)
        try:
            self._orbax.save(
                self._directory / str(step),
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                    record=ocp.args.JsonSave(record.to_dict()),
                ),
            )
        except Exception as error:
            raise self._failed(step, error) from error
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

    def problem(self, step: int) -> str:
        """Why a checkpoint cannot be trusted, or "": the same on all processes, which look at a part each."""
        part = slice(jax.process_index(), None, jax.process_count())
        return processes.agree(_damage(self._directory / str(step), part), f"verification of checkpoint {step}")

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
        return RunRecord.from_dict(self._restore(step, record=ocp.args.JsonRestore())["record"])

    def params(self, step: int, abstract_params: Any) -> Any:
        """The weights, checked. Raises ValueError where the checkpoint is damaged."""
        if damage := _damage(self._directory / str(step), slice(None)):
            raise self._unreadable(step, damage)
        return self._restore(step, params=ocp.args.StandardRestore(abstract_params))["params"]

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """The saved state, in the shardings of `abstract_state` (shapes with shardings). Raises ValueError."""
        abstract = arrays(abstract_state)
        found = self._restore(step, **{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()})
        state = state_of(found)
        verified = self._directory / str(step) / _VERIFIED
        if verified.exists():
            expected = json.loads(verified.read_text(encoding="utf-8"))["fingerprints"]
            if wrong := differing(expected, jax.device_get(_fingerprints(arrays(state)))):
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
        began, directory = time.perf_counter(), self._directory / str(saving.step)
        fingerprints = jax.tree.map(int, jax.device_get(saving.fingerprints))
        try:
            wrong = differing(fingerprints, {item: _read(directory / item, slice(None)) for item in _ARRAYS})
            problem = f"{wrong} on the disk is not what was saved" if wrong else ""
        except Exception as error:  # TensorStore raises many kinds for a damaged directory
            problem = _first_line(error)
        if not problem:
            marks = {
                "fingerprints": fingerprints,
                "files": {name: _sum(directory / name) for name in _files(directory)},
            }
            draft = directory.with_name(f"{saving.step}.removing")  # a life that ends here leaves what the next removes
            draft.mkdir()
            (draft / _VERIFIED).write_text(json.dumps(marks, indent=1) + "\n", encoding="utf-8")
            (draft / _VERIFIED).replace(directory / _VERIFIED)
            draft.rmdir()
            self._retire()
        else:
            (self._workdir / "damaged").mkdir(exist_ok=True)
            directory.rename(self._workdir / "damaged" / f"{saving.step}-{time.time_ns()}")
        return {
            "step": saving.step, "tier": "durable", "blocking": saving.blocking, "seconds": seconds,
            "verify_seconds": time.perf_counter() - began, "problem": problem,
        }  # fmt: skip

    def _retire(self) -> None:
        assert self._config is not None
        marks = {step: self._directory / str(step) / _VERIFIED for step in self.steps()}
        times = {step: mark.stat().st_mtime for step, mark in marks.items() if mark.exists()}
        for step in retired(list(marks), times, self._config):
            gone = self._directory / f"{step}.removing"
            (self._directory / str(step)).rename(gone)  # never half a checkpoint under a checkpoint's name
            shutil.rmtree(gone, ignore_errors=True)

    def _failed(self, step: int, error: Exception) -> SaveFailed:
        older = [one for one in self.steps() if one != step]
        return SaveFailed(
            f"checkpoint {step} could not be saved in {self._directory} ({_first_line(error)}); the same command goes "
            f"on from step {older[-1] if older else 0}"
        )

    def _unreadable(self, step: int, reason: str) -> ValueError:
        return ValueError(
            f"checkpoint {self._directory / str(step)} cannot be read ({reason}); move that directory away, or "
            "resume the run, which goes on from the one before it"
        )

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._orbax.restore(self._directory / str(step), args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged directory
            raise self._unreadable(step, _first_line(error)) from error


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


def differing(expected: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]) -> str:
    """The first array that has another fingerprint, or is not there; "" where all agree."""
    for item, names in expected.items():
        for name in sorted(names.keys() | found[item].keys()):
            if name not in found[item] or name not in names or int(names[name]) != int(found[item][name]):
                return f"{item}.{name}"
    return ""


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


def _damage(directory: pathlib.Path, part: slice) -> str:
    """What is wrong with this part of a checkpoint's files, or "".

    One that was verified has a checksum of every file. One whose run ended before that is read, array by array.
    """
    try:
        if not (directory / _VERIFIED).exists():
            for item in _ARRAYS:
                _read(directory / item, part)
            return ""
        files = json.loads((directory / _VERIFIED).read_text(encoding="utf-8"))["files"]
        for name in sorted(files)[part]:
            if not (directory / name).is_file():
                return f"{name} is missing"
            if (found := _sum(directory / name)) != files[name]:
                what = "size" if found[0] != files[name][0] else "content"
                return f"{name} has another {what} than it was saved with"
    except Exception as error:  # TensorStore raises many kinds for a damaged directory
        return _first_line(error)
    return ""


def _read(item: pathlib.Path, part: slice) -> dict[str, int]:
    """The fingerprints of an item's arrays, from what lies on the disk."""
    store = {"driver": "ocdbt", "base": f"file://{item}/"}
    keys = [key.decode() for key in tensorstore.KvStore.open(store).result().list().result()]
    names = sorted(key.removesuffix("/.zarray") for key in keys if key.endswith("/.zarray"))
    if not names:
        raise ValueError(f"{item.name} holds no arrays")
    found = {}
    for name in names[part]:
        spec = {"driver": "zarr", "kvstore": store | {"path": name}}
        found[name] = fingerprint.of_numpy(tensorstore.open(spec, read=True, open=True).result().read().result())
    return found


def _files(directory: pathlib.Path) -> list[str]:
    paths = (path for path in directory.rglob("*") if path.is_file() and path.name != _VERIFIED)
    return sorted(str(path.relative_to(directory)) for path in paths)


def _sum(path: pathlib.Path) -> list[int]:
    """[size, CRC-32] of a file."""
    size = crc = 0
    with open(path, "rb") as stream:
        while piece := stream.read(_PIECE):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return [size, crc]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
