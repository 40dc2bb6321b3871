"""One run: what is checked before anything is made, what is opened, and the loop over it."""

import contextlib
import dataclasses
import pathlib
import shutil
import time
from typing import Any

import jax

from mosaics_jax import compilation, environment, lock, metrics, paths, place, processes, sharding, whole
from mosaics_jax.checkpoint import Checkpoints, SaveFailed
from mosaics_jax.config import Config, flat
from mosaics_jax.data.corpora import Corpora
from mosaics_jax.data.tokenizer import load_tokenizer
from mosaics_jax.local_checkpoint import LocalCheckpoints
from mosaics_jax.loop import Loop, TrainingStopped
from mosaics_jax.record import (
    OWN_FIELDS,
    RECORD,
    RunRecord,
    check_same_run,
    data_differences,
    read_run_record,
    write_run_record,
)
from mosaics_jax.restore import check_initial, make_state
from mosaics_jax.watchdog import Watchdog
from mosaics_jax.whole import DamagedError

__all__ = ["SaveFailed", "TrainingStopped", "train"]


def train(config: Config, workdir: str | pathlib.Path, accept_new_data: bool = False) -> dict[str, Any] | None:
    """Trains until `run.steps`, resuming whatever `workdir` holds; returns the last evaluation.

    With `accept_new_data` a run goes on although its corpora, or how they are mixed and packed, are others than before;
    config.json and metrics.jsonl say from which step. SIGTERM, to any process, saves a checkpoint and returns None.
    Raises ValueError for what the user can mend, TrainingStopped where too many steps in a row were skipped, SaveFailed
    where a checkpoint could not be written, and processes.Missing.
    """
    workdir = paths.absolute(workdir)
    environment.check()
    place.check(workdir, (place.EMPTY, place.RUN), "the workdir")
    corpora = Corpora(config.data)  # all is checked before anything is made
    if corpora.vocabulary > config.model.vocabulary:
        raise ValueError(
            f"model.vocabulary is {config.model.vocabulary}, but the corpus {config.data.path} has token ids up to "
            f"{corpora.vocabulary - 1}; set --config.model.vocabulary={corpora.vocabulary} or more"
        )
    record = RunRecord(config.to_dict(), corpora.fingerprint, 0, tokenizer=corpora.tokenizer_fingerprint)
    processes.same(_decisive(workdir, record, accept_new_data), "what they were started with")
    if config.init_from and not (workdir / RECORD).exists():
        check_initial(config, corpora.tokenizer_fingerprint)
    processes.check_devices(config.mesh)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(mesh, config.data.batch, config.data.context, config.run.accumulation)
    compilation.use_cache(config.run, workdir)
    with contextlib.ExitStack() as stack:
        _hold(stack, workdir)
        checkpoints, record = _open_workdir(workdir, config, corpora, record, accept_new_data)
        stack.callback(checkpoints.close)
        local = None
        if config.checkpoint.local_dir:
            local = LocalCheckpoints(config.checkpoint.local_dir, workdir)
            stack.callback(local.close)
        writer = stack.enter_context(contextlib.closing(metrics.MetricWriter(workdir, config.checkpoint)))
        watchdog = Watchdog(workdir, config.run, jax.process_index(), jax.process_count())
        watchdog.start()
        stack.callback(watchdog.stop)
        stack.enter_context(jax.set_mesh(mesh))  # modules divide their work over the mesh that they are traced under
        with watchdog.phase("restore"):
            start = make_state(config, mesh, checkpoints, local, record, writer.say)
        return Loop(config, workdir, corpora, mesh, checkpoints, local, record, writer, watchdog).run(start)


def _decisive(workdir: pathlib.Path, record: RunRecord, accept_new_data: bool) -> dict[str, str]:
    """What all processes of a run must have been started with: code, corpora, settings but those of a node's own."""
    settings = {name: str(value) for name, value in flat(record.config).items() if name not in OWN_FIELDS}
    return settings | environment.versions() | {
        "workdir": str(workdir), "corpora": record.manifest, "tokenizer": record.tokenizer,
        "accept_new_data": str(accept_new_data),
    }  # fmt: skip


def _hold(stack: contextlib.ExitStack, workdir: pathlib.Path) -> None:
    """Makes the workdir, and keeps other runs from writing there. Raises ValueError where one does, and OSError."""

    def hold() -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        stack.enter_context(lock.hold(workdir / "lock", str(workdir)))

    processes.first(hold, "lock of the workdir")


def _open_workdir(
    workdir: pathlib.Path, config: Config, corpora: Corpora, record: RunRecord, accept_new_data: bool
) -> tuple[Checkpoints, RunRecord]:
    """Checks that the run that the workdir holds, if any, is this one; its record, with all changes of its data."""
    saved, damaged = _saved(workdir)
    if saved:
        check_same_run(saved, record, str(workdir), accept_new_data)
    # After the check: opening it removes what saves that were killed have left, and the run may be another's.
    checkpoints = Checkpoints(workdir, config.checkpoint)
    if saved:
        changes = list(saved.data_changes)
        if differing := data_differences(saved, record):
            changes.append({"step": max(checkpoints.steps(), default=0), "changes": differing})
        record = dataclasses.replace(record, data_changes=tuple(changes))
    processes.barrier("record")  # all have read it

    def write() -> None:
        if damaged and (workdir / RECORD).exists():
            (workdir / "damaged").mkdir(exist_ok=True)
            (workdir / RECORD).rename(workdir / "damaged" / f"{RECORD}-{time.time_ns()}")
        write_run_record(workdir, record)  # before all else: by it the folder is known to be a run's
        _keep_tokenizer(workdir, corpora)
        Watchdog.clear(workdir)
        if damaged:
            print(damaged, flush=True)

    processes.first(write, "workdir")
    return checkpoints, record


def _saved(workdir: pathlib.Path) -> tuple[RunRecord | None, str]:
    """What the workdir is the run of, if there is one, and what to say where its own record is damaged or gone.

    Then the newest checkpoint whose record is whole tells, as every checkpoint has one.
    """
    try:
        if (workdir / RECORD).exists():
            return read_run_record(workdir), ""
        if place.kind_of(workdir) == place.EMPTY:
            return None, ""
        damaged = f"{workdir / RECORD} is missing"
    except DamagedError as error:
        damaged = f"{error}, and lies in {workdir / 'damaged'} now"
    checkpoints = Checkpoints(workdir)
    try:
        for step in reversed(checkpoints.steps()):
            with contextlib.suppress(DamagedError):
                return checkpoints.record(step), f"{damaged}; it is written anew from checkpoint {step}"
        return None, f"{damaged}; there is no checkpoint to write it from, so the run begins anew"
    finally:
        checkpoints.close()


def _keep_tokenizer(workdir: pathlib.Path, corpora: Corpora) -> None:
    """The corpora's tokenizer in the workdir: a whole folder, and made only where it is not there yet."""
    target, draft = workdir / "tokenizer", workdir / "tokenizer.partial"
    with contextlib.suppress(ValueError):
        if load_tokenizer(target).fingerprint == corpora.tokenizer_fingerprint:
            return
    shutil.rmtree(draft, ignore_errors=True)
    load_tokenizer(corpora.tokenizer_directory).save(draft)
    if old := whole.replace_folder(draft, target):
        shutil.rmtree(old)
