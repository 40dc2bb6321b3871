"""The frequent tier: each process writes what its own devices hold to its node's disk, and waits for nobody.

    local_dir/<run>-<hash of its workdir>/process-<k>-of-<n>/<step>.safetensors

A life that begins again on the same nodes, with the same mesh, goes on from the newest step that all processes have;
else from the durable tier. What is read is held against fingerprints that the devices took when it was saved.
"""

import hashlib
import json
import os
import pathlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mosaics_jax import checkpoint, fingerprint, integrity, paths, processes, whole
from mosaics_jax.record import RunRecord
from mosaics_jax.step import TrainState

KEEP = 2


class _Shards(NamedTuple):
    """Parts of an array, and where in it each lies: [[start, stop] of each axis]."""

    bounds: list[Any]
    parts: list[np.ndarray]


class LocalCheckpoints:
    """One process's part of the frequent tier."""

    def __init__(self, local_dir: str, workdir: pathlib.Path):
        """ValueError where the folder cannot be made."""
        run = f"{workdir.name}-{hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:12]}"
        process = f"process-{jax.process_index()}-of-{jax.process_count()}"
        self._directory = pathlib.Path(local_dir) / run / process
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"checkpoint.local_dir is {local_dir!r}, which cannot be written ({error.strerror}); legal: a folder "
                "on the node's own disk, or ''"
            ) from error
        for draft in self._directory.glob("*.tmp"):
            draft.unlink()
        self._writer = ThreadPoolExecutor(1, "local checkpoint")
        self._writing: Future[dict[str, Any]] | None = None

    def steps(self) -> list[int]:
        """Those that every process has, in order; all processes call it."""
        mine = self._held()
        said = processes.exchange(json.dumps(mine), "local checkpoints")
        return sorted(set.intersection(*(set(json.loads(one)) for one in said)))

    def save(self, state: TrainState, step: int, record: RunRecord) -> list[dict[str, Any]]:
        """Copies this process's shards to the host, and has them written; returns records of the save before."""
        began = time.perf_counter()
        done = self.wait()
        fingerprints = checkpoint.fingerprints_of(state)
        shards = {name: _shards(array) for name, array in fingerprint.named(checkpoint.arrays(state)).items()}
        blocking = time.perf_counter() - began

        def write() -> dict[str, Any]:
            prints = jax.tree.map(int, jax.device_get(fingerprints))
            self._write(step, shards, {"record": record.to_dict(), "fingerprints": prints})
            return {"step": step, "tier": "local", "blocking": blocking, "seconds": time.perf_counter() - began}

        self._writing = self._writer.submit(write)
        return done

    def poll(self) -> list[dict[str, Any]]:
        """Records of the save that has ended since the last call. Raises SaveFailed."""
        return self.wait() if self._writing and self._writing.done() else []

    def wait(self) -> list[dict[str, Any]]:
        writing, self._writing = self._writing, None
        if writing is None:
            return []
        try:
            return [writing.result()]
        except (OSError, SafetensorError) as error:
            raise checkpoint.SaveFailed(
                f"a local checkpoint could not be written in {self._directory} ({error}); make room there, or set "
                "--config.checkpoint.local_dir=''"
            ) from error

    def close(self) -> None:
        self._writer.shutdown()

    def record(self, step: int) -> RunRecord:
        """What the step was saved with. Raises as `Checkpoints.record`, for this process's file."""
        try:
            with safe_open(self._path(step), "numpy") as file:
                saved = json.loads(file.metadata()["record"])
        except Exception as error:
            raise whole.DamagedError(f"{self._path(step)} cannot be read ({integrity.damage_of(error)})") from error
        return RunRecord.from_dict(saved)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state. Raises ValueError where any process cannot give its part, and UnreadableError; all call it."""
        items = checkpoint.arrays(abstract)
        found: list[tuple[Any, Any]] = []

        def look() -> str:
            try:
                found.append(self._read(step, items))
            except Exception as error:
                return f"process {jax.process_index()}: {self._path(step)} ({integrity.damage_of(error)})"
            return ""

        if problem := integrity.agreed(look, f"local checkpoint {step}"):
            raise ValueError(f"local checkpoint {step} cannot be read ({problem})")
        ((placed, expected),) = found
        state = checkpoint.state_of(placed)
        wrong = integrity.differing(expected, jax.device_get(checkpoint.fingerprints_of(state)))
        if wrong := processes.agree(wrong, f"fingerprints of local checkpoint {step}"):
            raise ValueError(f"local checkpoint {step} cannot be read ({wrong} is not what was saved)")
        return state

    def _read(self, step: int, items: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
        """Arrays like `items` (shapes with shardings), and the fingerprints that they were saved with."""
        with safe_open(self._path(step), "numpy") as file:
            about = {name: json.loads(text) for name, text in file.metadata().items()}

            def place(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
                held = {_key(at): f"{name}@{number}" for number, at in enumerate(about["shards"][name])}
                wanted = leaf.sharding.addressable_devices_indices_map(leaf.shape)
                parts = [
                    jax.device_put(file.get_tensor(held[_key(_bounds(index, leaf.shape))]), device)
                    for device, index in wanted.items()
                ]
                return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)

            flat = {name: place(name, leaf) for name, leaf in fingerprint.named(items).items()}
            return jax.tree.unflatten(jax.tree.structure(items), list(flat.values())), about["fingerprints"]

    def set_aside(self, step: int) -> pathlib.Path:
        """Renames this process's part, so that no life tries the step again. Returns where it lies."""
        target = self._path(step).with_suffix(".damaged")
        self._path(step).replace(target)
        return target

    def _held(self) -> list[int]:
        """The steps of this process's files, in order."""
        names = (path.stem for path in self._directory.glob("*.safetensors"))
        return sorted(int(name) for name in names if checkpoint.STEP.fullmatch(name))

    def _path(self, step: int) -> pathlib.Path:
        return self._directory / f"{step}.safetensors"

    def _write(self, step: int, shards: dict[str, _Shards], about: dict[str, Any]) -> None:
        """One file, made whole or not at all; then the oldest goes."""
        tensors = {f"{name}@{n}": part for name, held in shards.items() for n, part in enumerate(held.parts)}
        about["shards"] = {name: held.bounds for name, held in shards.items()}
        draft = self._path(step).with_suffix(".tmp")
        save_file(tensors, draft, {name: json.dumps(value) for name, value in about.items()})
        paths.give_usual_mode(draft)
        with open(draft, "rb") as stream:
            os.fsync(stream.fileno())
        draft.replace(self._path(step))
        whole.keep_names(self._directory)
        for old in self._held()[:-KEEP]:
            self._path(old).unlink()


def _shards(array: jax.Array) -> _Shards:
    """The distinct shards that this process's devices hold, copied: the array may be donated to the next step."""
    distinct = {_key(_bounds(shard.index, array.shape)): shard.data for shard in array.addressable_shards}
    return _Shards(list(distinct), [np.array(part) for part in jax.device_get(list(distinct.values()))])


def _bounds(index: Any, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]


def _key(bounds: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(pair) for pair in bounds)
