"""One run: what is checked before anything is made, what is opened, and the loop over it."""

import contextlib
import dataclasses
import pathlib
from typing import Any

import jax

from mosaics_jax import compilation, environment, lock, metrics, paths, processes, sharding
from mosaics_jax.checkpoint import Checkpoints, SaveFailed
from mosaics_jax.config import Config
from mosaics_jax.data.corpora import Corpora
from mosaics_jax.data.tokenizer import load_tokenizer
from mosaics_jax.local_checkpoint import LocalCheckpoints
from mosaics_jax.loop import Loop, TrainingStopped
from mosaics_jax.record import RunRecord, check_same_run, data_differences, read_run_record, write_run_record
from mosaics_jax.restore import check_initial, make_state
from mosaics_jax.watchdog import Watchdog

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
    corpora = Corpora(config.data)  # all is checked before anything is made
    if corpora.vocabulary > config.model.vocabulary:
        raise ValueError(
            f"model.vocabulary is {config.model.vocabulary}, but the corpus {config.data.path} has token ids up to "
            f"{corpora.vocabulary - 1}; set --config.model.vocabulary={corpora.vocabulary} or more"
        )
    if config.init_from and not (workdir / "config.json").exists():
        check_initial(config, corpora.tokenizer_fingerprint)
    processes.check_devices(config.mesh)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(mesh, config.data.batch, config.data.context, config.run.accumulation)
    compilation.use_cache(config.run, workdir)
    record = RunRecord(config.to_dict(), corpora.fingerprint, 0)
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


def _hold(stack: contextlib.ExitStack, workdir: pathlib.Path) -> None:
    """Makes the workdir, and keeps other runs from writing there. ValueError, on all processes, where one does."""
    problem = ""
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock.hold(workdir / "lock", str(workdir)))
        except lock.HeldError as error:
            problem = str(error)
    if problem := processes.agree(problem, "lock of the workdir"):
        raise ValueError(problem)


def _open_workdir(
    workdir: pathlib.Path, config: Config, corpora: Corpora, record: RunRecord, accept_new_data: bool
) -> tuple[Checkpoints, RunRecord]:
    """Checks that the run that the workdir holds, if any, is this one; its record, with all changes of its data."""
    saved = read_run_record(workdir) if (workdir / "config.json").exists() else None
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
    if jax.process_index() == 0:
        load_tokenizer(corpora.tokenizer_directory).save(workdir / "tokenizer")
        write_run_record(workdir, record)
        Watchdog.clear(workdir)
    processes.barrier("workdir")
    return checkpoints, record
