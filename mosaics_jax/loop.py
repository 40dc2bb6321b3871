"""The training loop: the order of operations, and no math.

The order, which matters: compile -> for every step: put the batch on the mesh, dispatch the step, read the metrics of
the step before (so the device never waits for the host), evaluate, save. The data iterator has no state: it starts
where the restored step says.
"""

import contextlib
import dataclasses
import itertools
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from mosaics_jax import checkpoint, compilation, metrics, preemption, processes, sharding
from mosaics_jax.checkpoint import Checkpoints
from mosaics_jax.config import Config
from mosaics_jax.data.corpora import Corpora
from mosaics_jax.data.pipeline import batches
from mosaics_jax.data.source import Batch
from mosaics_jax.local_checkpoint import LocalCheckpoints
from mosaics_jax.record import RunRecord
from mosaics_jax.restore import Start
from mosaics_jax.step import SKIPPED, TrainState, make_eval_step, make_train_step
from mosaics_jax.watchdog import Watchdog


class TrainingStopped(RuntimeError):
    """The run cannot go on: too many steps in a row were skipped."""


def _valid_batches(config: Config, corpora: Corpora, name: str, share: range) -> Iterator[Batch]:
    """The first held-out batches of one corpus."""
    rows = corpora.validation(name)
    one_pass = batches(rows, corpora.begin, batch=config.data.batch, count=len(rows), share=share)
    return itertools.islice(one_pass, config.run.eval_batches)


class Loop:
    """One process's part of the run, from a state to the last step."""

    def __init__(
        self, config: Config, workdir: pathlib.Path, corpora: Corpora, mesh: Mesh, checkpoints: Checkpoints,
        local: LocalCheckpoints | None, record: RunRecord, writer: metrics.MetricWriter, watchdog: Watchdog,
    ):  # fmt: skip
        self._config, self._workdir, self._corpora = config, workdir, corpora
        self._checkpoints, self._local, self._record = checkpoints, local, record
        self._writer, self._watchdog = writer, watchdog
        self._mesh, self._batch_sharding = mesh, NamedSharding(mesh, sharding.BATCH)
        self._share = sharding.rows_here(mesh, config.data.batch)
        self._options = compilation.compiler_options(config.run)
        self._eval_step = jax.jit(make_eval_step(config), compiler_options=self._options)
        self._stop_signal = ""  # the name of the one that came
        self._refused: dict[int, str] = {}  # checkpoints that were not accepted, and why; process 0 knows

    def run(self, start: Start) -> dict[str, Any] | None:
        """The last evaluation, or None where a signal ended the run. Raises TrainingStopped and SaveFailed."""
        config, first_step = self._config, start.step
        self._announce(start)
        rows = batches(
            self._corpora.training(), self._corpora.begin, batch=config.data.batch, start_batch=first_step,
            workers=config.data.workers, prefetch=config.data.prefetch, share=self._share,
        )  # fmt: skip
        try:
            with preemption.heard(self._note_signal), jax.transfer_guard("disallow"):
                evaluation = self._steps(start.state, first_step, rows)
        except BaseException as error:
            why = {TrainingStopped: "stopped", KeyboardInterrupt: "interrupted"}.get(type(error), "failed")
            with contextlib.suppress(OSError):  # perhaps what it failed of, and that is what is to be said
                self._writer.write("end", {"why": why})
            raise
        finally:
            rows.close()  # type: ignore[attr-defined]
        self._writer.write("end", {"why": "finished" if evaluation is not None else "preempted"})
        return evaluation

    def _compile(self, state: TrainState, first_step: int) -> Any:
        """The step, compiled for this state and the run's batches: its time is known, and in no step's."""
        began, before = time.perf_counter(), compilation.cache_events()
        # The new state lies where the old one did: left to itself, the compiler makes weights whole after the update.
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = jax.jit(
            make_train_step(self._config), donate_argnums=0, compiler_options=self._options,
            out_shardings=(placed, sharding.replicated(self._mesh)),
        )  # fmt: skip
        whole = (self._config.data.batch, self._config.data.context)
        types = Batch("int32", "int32", "int32", "int32", "float32")
        batch = jax.tree.map(lambda dtype: jax.ShapeDtypeStruct(whole, dtype, sharding=self._batch_sharding), types)
        compiled = step.lower(state, batch).compile()
        found = compilation.cache_events() - before
        checkpoint.fingerprints_of(state)  # compiles them too, and not while training stands still for the first save
        cache = "hit" if found["hit"] else "miss" if found["miss"] else "off"
        seconds = time.perf_counter() - began
        self._writer.write("compile", {"step": first_step, "seconds": seconds, "cache": cache})
        self._writer.say(f"compiled the step in {seconds:.1f} s (compilation cache: {cache})")
        return compiled

    def _steps(self, state: TrainState, first_step: int, rows: Iterator[Batch]) -> dict[str, Any] | None:
        run, saves = self._config.run, self._config.checkpoint
        evaluation: dict[str, Any] = {}
        pending: Any = None
        if first_step < run.steps:
            with self._watchdog.phase("compile"):
                train_step = self._compile(state, first_step)
        self._watchdog.begin(first_step)
        self._clock, self._clock_step, self._first_step = time.perf_counter(), first_step, first_step
        self._waited = 0.0  # for data, since the clock was set
        self._saved = first_step
        if first_step == 0 and 0 in run.eval_steps:
            self._evaluate(state.params, 0)
        for step in range(first_step, run.steps):
            asked = time.perf_counter()
            batch = next(rows)
            self._waited += time.perf_counter() - asked
            state, raw = train_step(state, self._put(batch))
            self._report(step, pending)  # the step before's: the device works on this one meanwhile
            pending = raw
            done = step + 1
            if jax.process_count() > 1:
                self._stop_signal = "SIGTERM" if multihost_utils.reached_preemption_sync_point(done) else ""
            evaluates = done % run.eval_every == 0 or done in run.eval_steps or done == run.steps
            keeps = done % saves.every == 0 or done in saves.steps or done == run.steps or bool(self._stop_signal)
            keeps_here = self._local is not None and not keeps and done % saves.local_every == 0
            if evaluates or keeps or keeps_here:
                self._report(done, pending)  # and so waits for the step, whose time is not theirs
                pending = None
            if evaluates:
                evaluation = self._evaluate(state.params, done)
            self._note_saves(self._checkpoints.poll() + (self._local.poll() if self._local else []))
            if keeps:
                self._save(state, done)
            if keeps_here:
                self._save_here(state, done)
            if self._stop_signal:
                self._finish_saves()
                self._writer.say(f"{self._stop_signal}: saved step {done}; the same command resumes")
                return None
        self._finish_saves()
        return evaluation or self._evaluate(state.params, run.steps)

    @contextlib.contextmanager
    def _not_training(self, phase: str) -> Iterator[None]:
        """What is done inside counts as no training time, and the watchdog gives it more."""
        began = time.perf_counter()
        with self._watchdog.phase(phase):
            yield
        self._clock += time.perf_counter() - began

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
        self._watchdog.step(step)
        if raw["skip"]:
            self._note_skipped(step, raw)
        first = self._clock_step == self._first_step  # its time holds the compilation: the clock starts anew after it
        if step % self._config.run.log_every and step != self._config.run.steps and not first:
            self._writer.advance(step, None)
            return
        now = time.perf_counter()
        seconds = (now - self._clock) / max(1, step - self._clock_step)
        record = metrics.summarise(self._config, step, raw, seconds, self._corpora.bytes_per_prediction)
        record |= {"steps": step - self._clock_step, "seconds": now - self._clock}
        record["data_wait"] = self._waited / (now - self._clock)
        if len(self._corpora.manifests) > 1:
            record |= {f"mixture/{name}": share for name, share in self._corpora.realised(step).items()}
        self._clock, self._clock_step, self._waited = now, step, 0.0
        self._writer.write("train", record)
        self._writer.advance(step, record)

    def _note_skipped(self, step: int, raw: Any) -> None:
        """Says which step was skipped, and where its rows lie; stops the run after `run.max_skipped` in a row."""
        batch = self._config.data.batch
        rows = range((step - 1) * batch, step * batch)
        why, measured, limits = SKIPPED[int(raw["skip"])], (raw["loss"], raw["grad_norm"]), raw["limits"]
        record = {
            "step": step, "why": why, "loss": float(measured[0]), "grad_norm": float(measured[1]),
            "loss_limit": float(limits[0]), "grad_norm_limit": float(limits[1]), "rows": [rows.start, rows.stop - 1],
            "places": self._corpora.places(rows),
        }  # fmt: skip
        self._writer.write("skip", record)
        self._writer.say(
            f"step {step} is skipped ({why}): loss {measured[0]:.3f}, gradient norm {measured[1]:.3f}; its rows are "
            f"{rows.start} to {rows.stop - 1} of the run, metrics.jsonl says where they lie"
        )
        if raw["skipped_in_row"] >= self._config.run.max_skipped:
            first = step - self._config.run.max_skipped + 1
            raise TrainingStopped(
                f"steps {first} to {step} were all skipped, the last for this: {why}; the last checkpoint is step "
                f"{self._saved}. Lower optimizer.peak_learning_rate, or look at those rows"
            )

    def _evaluate(self, params: Any, step: int) -> dict[str, Any]:
        with self._not_training("evaluate"):
            return self._evaluated(params, step)

    def _evaluated(self, params: Any, step: int) -> dict[str, Any]:
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

    def _record_at(self, step: int) -> RunRecord:
        return dataclasses.replace(self._record, rows_read=step * self._config.data.batch)

    def _save(self, state: TrainState, step: int) -> None:
        if self._saved == step:
            return
        with self._not_training("save"):
            self._checkpoints.save(state, step, self._record_at(step))
        self._saved = step

    def _save_here(self, state: TrainState, step: int) -> None:
        assert self._local is not None
        with self._not_training("save"):
            self._note_saves(self._local.save(state, step, self._record_at(step)))

    def _finish_saves(self) -> None:
        """Waits for all saves. Raises SaveFailed where the last checkpoint is not one that the run can go on from."""
        with self._not_training("save"):
            self._note_saves(self._checkpoints.wait() + (self._local.wait() if self._local else []))
            problem = processes.agree(self._refused.get(self._saved, ""), "last checkpoint")
        if problem:
            raise checkpoint.SaveFailed(f"checkpoint {self._saved} is the last of this life, and {problem}")

    def _note_saves(self, saves: list[dict[str, Any]]) -> None:
        for save in saves:
            self._writer.write("save", save)
            if problem := save.get("problem"):
                self._refused[save["step"]] = problem
                self._writer.say(f"checkpoint {save['step']}: {problem}")
            elif save["tier"] == "durable":
                self._writer.say(
                    f"checkpoint {save['step']}: written in {save['seconds']:.2f} s, for which training stood still "
                    f"{save['blocking']:.2f} s ({save['blocking'] / save['seconds']:.1%}); verified"
                )

    def _announce(self, start: Start) -> None:
        config, first_step = self._config, start.step
        splits = [manifest.split("train") for manifest in self._corpora.manifests.values()]
        self._writer.begin(config.run.steps, first_step)
        self._writer.write(
            "finished" if first_step >= config.run.steps else "resume" if first_step else "init",
            {
                "step": first_step,
                "tier": start.tier,
                "seconds": start.seconds,
            },
        )
        if first_step >= config.run.steps:
            self._writer.say(f"{self._workdir} is finished: {first_step} steps; take another --workdir to train anew")
        elif first_step:
            local = " (local checkpoint)" if start.tier == "local" else ""
            self._writer.say(f"resuming {self._workdir} at step {first_step} of {config.run.steps}{local}")
        for change in self._record.data_changes:
            if change["step"] == first_step:
                self._writer.write("data_change", change)
                self._writer.say(f"other data from step {first_step} on: {'; '.join(change['changes'])}")
        self._writer.say(
            f"{config.model.architecture} with {sharding.count(start.state.params):,} parameters; "
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

    def _note_signal(self, name: str) -> None:
        self._stop_signal = name
