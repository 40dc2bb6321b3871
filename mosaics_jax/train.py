"""The training loop: the order of operations, and no math.

The order, which matters: make or restore the state -> for every step: put the batch on the mesh, dispatch the step,
read the metrics of the step before (so the device never waits for the host), evaluate, save. The data iterator has no
state: it starts where the restored step says.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from mosaics_jax import checkpoint, metrics, processes, sharding
from mosaics_jax.config import Config
from mosaics_jax.data.corpora import Corpora
from mosaics_jax.data.pipeline import batches
from mosaics_jax.data.source import Batch
from mosaics_jax.data.tokenizer import load_tokenizer
from mosaics_jax.nn.model import parameter_axes
from mosaics_jax.step import TrainState, init_state, make_eval_step, make_train_step


class TrainingStopped(RuntimeError):
    """The run cannot go on: too many steps in a row had a non-finite loss or gradient."""


def train(config: Config, workdir: str | pathlib.Path, accept_new_data: bool = False) -> dict[str, Any] | None:
    """Trains until `run.steps`, resuming whatever `workdir` holds; returns the last evaluation.

    With `accept_new_data` a run goes on although its corpora, or how they are mixed and packed, are others than before;
    config.json and metrics.jsonl say from which step. SIGTERM, to any process, saves a checkpoint and returns None.
    Raises ValueError for what the user can mend, and TrainingStopped.
    """
    workdir = pathlib.Path(workdir)
    corpora = Corpora(config.data)  # all is checked before anything is made
    if corpora.vocabulary > config.model.vocabulary:
        raise ValueError(
            f"model.vocabulary is {config.model.vocabulary}, but the corpus {config.data.path} has token ids up to "
            f"{corpora.vocabulary - 1}; set --config.model.vocabulary={corpora.vocabulary} or more"
        )
    if config.init_from and not (workdir / "config.json").exists():
        checkpoint.check_initial(config, corpora.tokenizer_fingerprint)
    processes.check_devices(config.mesh)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(mesh, config.data.batch, config.data.context, config.run.accumulation)
    record = checkpoint.RunRecord(config.to_dict(), corpora.fingerprint, 0)
    checkpoints, record = _open_workdir(workdir, config, corpora, record, accept_new_data)
    try:
        with jax.set_mesh(mesh):  # modules divide their work over the mesh that they are traced under
            state, first_step = _make_state(config, mesh, checkpoints, record)
            return _Loop(config, workdir, corpora, mesh, checkpoints, record).run(state, first_step)
    finally:
        checkpoints.close()


def _open_workdir(
    workdir: pathlib.Path, config: Config, corpora: Corpora, record: checkpoint.RunRecord, accept_new_data: bool
) -> tuple[checkpoint.Checkpoints, checkpoint.RunRecord]:
    """Makes the workdir, or checks that the run it holds is this one; its record, with all changes of its data."""
    workdir.mkdir(parents=True, exist_ok=True)
    saved = checkpoint.read_run_record(workdir) if (workdir / "config.json").exists() else None
    if saved:
        checkpoint.check_same_run(saved, record, str(workdir), accept_new_data)
    # After the check: opening it removes what saves that were killed have left, and the run may be another's.
    checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint)
    if saved:
        changes = list(saved.data_changes)
        if differing := checkpoint.data_differences(saved, record):
            changes.append({"step": checkpoints.latest() or 0, "changes": differing})
        record = dataclasses.replace(record, data_changes=tuple(changes))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("record")  # all have read it
    if jax.process_index() == 0:
        load_tokenizer(corpora.tokenizer_directory).save(workdir / "tokenizer")
        checkpoint.write_run_record(workdir, record)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("workdir")
    return checkpoints, record


def _make_state(
    config: Config, mesh: Mesh, checkpoints: checkpoint.Checkpoints, record: checkpoint.RunRecord
) -> tuple[TrainState, int]:
    """The state to start from, created in its shardings, and its step."""
    shapes = jax.eval_shape(lambda: init_state(config))
    shardings = state_shardings(config, mesh, shapes)
    step = checkpoints.latest()
    if step is None:
        params = checkpoint.initial_weights(config, shapes.params, shardings.params) if config.init_from else None
        return jax.jit(functools.partial(init_state, config), out_shardings=shardings)(params), 0
    # The checkpoint that a change of data starts from was made with the old; the workdir's record has accepted that.
    accepted = any(change["step"] >= step for change in record.data_changes)
    checkpoint.check_same_run(checkpoints.record(step), record, f"checkpoint {step}", accepted)
    abstract = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)
    return checkpoints.restore(step, abstract), step


def state_shardings(config: Config, mesh: Mesh, shapes: TrainState) -> TrainState:
    """Shardings of a train state: the optimiser's moments lie as their parameters do, counters everywhere."""
    params = sharding.parameter_shardings(mesh, parameter_axes(config.model), shapes.params)
    structure: Any = jax.tree.structure(shapes.params)

    def like_params(node: Any) -> bool:
        return bool(structure == jax.tree.structure(node))

    opt_state = jax.tree.map(
        lambda node: params if like_params(node) else sharding.replicated(mesh), shapes.opt_state, is_leaf=like_params
    )
    everywhere = sharding.replicated(mesh)
    return TrainState(everywhere, everywhere, everywhere, params, opt_state)


def _valid_batches(config: Config, corpora: Corpora, name: str, share: range) -> Iterator[Batch]:
    """The first held-out batches of one corpus."""
    rows = corpora.validation(name)
    one_pass = batches(rows, corpora.begin, batch=config.data.batch, count=len(rows), share=share)
    return itertools.islice(one_pass, config.run.eval_batches)


class _Loop:
    """One process's part of the run, from a state to the last step."""

    def __init__(
        self, config: Config, workdir: pathlib.Path, corpora: Corpora, mesh: Mesh,
        checkpoints: checkpoint.Checkpoints, record: checkpoint.RunRecord,
    ):  # fmt: skip
        self._config, self._workdir, self._corpora = config, workdir, corpora
        self._checkpoints, self._record = checkpoints, record
        self._mesh, self._batch_sharding = mesh, NamedSharding(mesh, sharding.BATCH)
        self._share = sharding.rows_here(mesh, config.data.batch)
        self._eval_step = jax.jit(make_eval_step(config))
        self._stop_signal = False

    def run(self, state: TrainState, first_step: int) -> dict[str, Any] | None:
        config = self._config
        # The new state lies where the old one did: left to itself, the compiler makes weights whole after the update.
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        self._train_step = jax.jit(
            make_train_step(config), donate_argnums=0, out_shardings=(placed, sharding.replicated(self._mesh))
        )
        self._writer = metrics.MetricWriter(self._workdir, config.run.steps, first_step)
        self._announce(state, first_step)
        rows = batches(
            self._corpora.training(), self._corpora.begin, batch=config.data.batch, start_batch=first_step,
            workers=config.data.workers, prefetch=config.data.prefetch, share=self._share,
        )  # fmt: skip
        # Else jax hears the signal, whichever process gets it, and all agree on a step.
        alone = jax.process_count() == 1
        previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm) if alone else None
        try:
            with jax.transfer_guard("disallow"):
                return self._steps(state, first_step, rows)
        finally:
            if alone:
                signal.signal(signal.SIGTERM, previous_handler)
            rows.close()  # type: ignore[attr-defined]
            self._writer.close()

    def _steps(self, state: TrainState, first_step: int, rows: Iterator[Batch]) -> dict[str, Any] | None:
        run, saves = self._config.run, self._config.checkpoint
        evaluation: dict[str, Any] = {}
        pending: Any = None
        self._clock, self._clock_step, self._first_step = time.perf_counter(), first_step, first_step
        self._waited = 0.0  # for data, since the clock was set
        if first_step == 0 and 0 in run.eval_steps:
            self._evaluate(state.params, 0)
        for step in range(first_step, run.steps):
            asked = time.perf_counter()
            batch = next(rows)
            self._waited += time.perf_counter() - asked
            state, raw = self._train_step(state, self._put(batch))
            self._report(step, pending)  # the step before's: the device works on this one meanwhile
            pending = raw
            done = step + 1
            if jax.process_count() > 1:
                self._stop_signal = multihost_utils.reached_preemption_sync_point(done)
            evaluates = done % run.eval_every == 0 or done in run.eval_steps or done == run.steps
            if evaluates or self._stop_signal:
                self._report(done, pending)
                pending = None
            if evaluates:
                evaluation = self._evaluate(state.params, done)
            if done % saves.every == 0 or done in saves.steps or done == run.steps or self._stop_signal:
                self._save(state, done)
            if self._stop_signal:
                self._checkpoints.wait()
                self._writer.say(f"SIGTERM: saved step {done}; the same command resumes")
                return None
        self._checkpoints.wait()
        return evaluation or self._evaluate(state.params, run.steps)

    def _put(self, batch: Batch) -> Batch:
        """The global batch, of which this process gives its rows, and of those what each of its devices holds."""
        whole = (self._config.data.batch, self._config.data.context)
        first = self._share.start

        def place(field: np.ndarray) -> jax.Array:
            parts = []
            held: Any = self._batch_sharding.addressable_devices_indices_map(whole)
            for device, (rows, positions) in held.items():
                start, stop, _ = rows.indices(whole[0])
                parts.append(jax.device_put(field[start - first : stop - first, positions], device))
            return jax.make_array_from_single_device_arrays(whole, self._batch_sharding, parts)

        return jax.tree.map(place, batch)

    def _report(self, step: int, raw: Any) -> None:
        """Reads and writes the metrics of the step that ended as number `step` (counted from 1)."""
        if raw is None:
            return
        raw = jax.device_get(raw)
        if raw["skipped_in_row"] >= self._config.run.max_skipped:
            first = step - self._config.run.max_skipped + 1
            raise TrainingStopped(
                f"the loss or gradient was not finite in all of steps {first} to {step}; the last checkpoint is step "
                f"{self._checkpoints.latest()}. Lower optimizer.peak_learning_rate, or look at those rows"
            )
        first = self._clock_step == self._first_step  # its time holds the compilation: the clock starts anew after it
        if step % self._config.run.log_every and step != self._config.run.steps and not first:
            self._writer.advance(step, None)
            return
        now = time.perf_counter()
        seconds = (now - self._clock) / max(1, step - self._clock_step)
        record = metrics.summarise(self._config, step, raw, seconds, self._corpora.bytes_per_prediction)
        record["data_wait"] = self._waited / (now - self._clock)
        if len(self._corpora.manifests) > 1:
            record |= {f"mixture/{name}": share for name, share in self._corpora.realised(step).items()}
        self._clock, self._clock_step, self._waited = now, step, 0.0
        self._writer.write("train", record)
        self._writer.advance(step, record)

    def _evaluate(self, params: Any, step: int) -> dict[str, Any]:
        start = time.perf_counter()
        found = {name: self._evaluate_one(params, name) for name in self._corpora.manifests}
        shares = self._corpora.shares
        record = {
            key: sum(shares[name] * one[key] for name, one in found.items()) for key in next(iter(found.values()))
        }
        if len(found) > 1:
            record |= {f"{name}/{key}": value for name, one in found.items() for key, value in one.items()}
        record |= {"step": step, "seconds": time.perf_counter() - start}
        self._writer.write("eval", record)
        self._writer.say(
            f"step {step}: validation {record['bits_per_byte']:.3f} bits per byte "
            f"(bigram entropy of the same text: {record['bigram_bits_per_byte']:.3f})"
            + "".join(f"; {name} {one['bits_per_byte']:.3f}" for name, one in found.items() if name)
        )
        self._clock += time.perf_counter() - start  # evaluation is not training time
        return record

    def _evaluate_one(self, params: Any, name: str) -> dict[str, float]:
        sums = [
            self._eval_step(params, self._put(batch))
            for batch in _valid_batches(self._config, self._corpora, name, self._share)
        ]
        loss_sum, tokens = np.sum(jax.device_get(sums), axis=0, dtype=np.float64)
        split = self._corpora.manifests[name].split("valid")
        loss = float(loss_sum) / max(1.0, float(tokens))
        return {
            "loss": loss,
            "bits_per_byte": loss / math.log(2) / split.bytes_per_prediction,
            "bigram_bits_per_byte": split.bigram_entropy,
            "tokens": float(tokens),
        }

    def _save(self, state: TrainState, step: int) -> None:
        if self._checkpoints.latest() != step:
            rows_read = step * self._config.data.batch
            self._checkpoints.save(state, step, dataclasses.replace(self._record, rows_read=rows_read))

    def _announce(self, state: TrainState, first_step: int) -> None:
        config = self._config
        splits = [manifest.split("train") for manifest in self._corpora.manifests.values()]
        if first_step >= config.run.steps:
            self._writer.say(f"{self._workdir} is finished: {first_step} steps; take another --workdir to train anew")
        elif first_step:
            self._writer.write("resume", {"step": first_step})
            self._writer.say(f"resuming {self._workdir} at step {first_step} of {config.run.steps}")
        for change in self._record.data_changes:
            if change["step"] == first_step:
                self._writer.write("data_change", change)
                self._writer.say(f"other data from step {first_step} on: {'; '.join(change['changes'])}")
        self._writer.say(
            f"{config.model.architecture} with {sharding.count(state.params):,} parameters; "
            f"{sum(split.tokens for split in splits):,} training tokens in "
            f"{sum(split.documents for split in splits):,} documents; "
            f"{config.data.batch * config.data.context:,} tokens a step on {jax.device_count()} "
            f"{jax.devices()[0].device_kind} device(s)"
        )
        for name, manifest in self._corpora.manifests.items():
            least, most = manifest.documents_longer_than("train", config.data.context)
            cut = f"{least:,}" if least == most else f"{least:,} to {most:,}"
            part = f"{name}, {self._corpora.shares[name]:.1%} of the rows: " if name else ""
            self._writer.say(f"{part}{cut} documents are longer than the context of {config.data.context} and are cut")
        self._writer.say(metrics.MFU_FORMULA)

    def _on_sigterm(self, signum: int, frame: Any) -> None:
        self._stop_signal = True
