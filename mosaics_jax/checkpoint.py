"""Checkpoints: weights, optimiser, counters, data position, config and corpus fingerprint, saved and restored together.

Orbax writes them asynchronously into `workdir/checkpoints/<step>/` and makes each visible by one rename, so a process
killed at any moment leaves whole checkpoints only. `docs/checkpoint.md` describes what lies in one.
"""

import dataclasses
import json
import logging
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from mosaics_jax.config import CheckpointConfig, Config, differences, with_new_fields
from mosaics_jax.data.tokenizer import load_tokenizer
from mosaics_jax.step import TrainState

# Fields that may change between restarts: they move no number beyond the rounding of a reduction.
FREE_FIELDS = frozenset(
    {"data.path", "data.workers", "data.prefetch", "checkpoint.every", "checkpoint.keep", "checkpoint.steps"}
    | {"run.accumulation", "run.log_every", "run.eval_every", "run.eval_steps", "run.eval_batches", "run.max_skipped"}
    | {f"mesh.{field.name}" for field in dataclasses.fields(Config().mesh)}
)

# Fields that may change too where the user says so (`--accept_new_data`).
DATA_FIELDS = frozenset({"data.mixture", "data.mixture_changes", "data.packing", "data.seed"})

# What a run may change of the model that it takes its weights from: these decide no weight's shape or meaning.
FREE_MODEL_FIELDS = frozenset({"remat", "implementation", "compute_dtype", "delay_min", "delay_max"})

# Orbax reports every save and every read-only opening in many lines; what fails, it raises.
logging.getLogger("absl").setLevel(logging.ERROR)


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What must agree for a checkpoint to be continued, and where its data stands.

    Attributes:
      data_changes: for every time that a run was told to go on with other data: from which step, and what changed.
    """

    config: dict[str, Any]
    manifest: str
    rows_read: int
    data_changes: tuple[dict[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "RunRecord":
        return cls(**{**saved, "config": with_new_fields(saved["config"])})


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: pathlib.Path, config: CheckpointConfig | None = None):
        """Without `config` the directory is opened for reading only."""
        self._directory = (workdir / "checkpoints").absolute()
        kept = [policies.LatestN(config.keep), policies.CustomSteps(config.steps)] if config else []
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept) if config else None,
            read_only=config is None,
            create=config is not None,
            cleanup_tmp_directories=config is not None,
            step_prefix=None,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def chosen(self, step: int | None) -> int:
        """`step`, or the newest for None. ValueError where there is none, or not that one."""
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise ValueError(
                f"{self._directory.parent} holds no checkpoint yet; the first comes after checkpoint.every steps"
            )
        if step is not None and step not in steps:
            raise ValueError(f"{self._directory.parent} has no checkpoint {step}; legal: {', '.join(map(str, steps))}")
        return steps[-1] if step is None else step

    def save(self, state: TrainState, step: int, record: RunRecord) -> None:
        """Starts a save; the state may be donated to the next step at once. Raises the errors of the save before."""
        rest = {"step": state.step, "skipped": state.skipped, "skipped_in_row": state.skipped_in_row}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(state.opt_state),
                counters=ocp.args.StandardSave(rest),
                record=ocp.args.JsonSave(record.to_dict()),
            ),
        )

    def record(self, step: int) -> RunRecord:
        return RunRecord.from_dict(self._restore(step, record=ocp.args.JsonRestore())["record"])

    def params(self, step: int, abstract_params: Any) -> Any:
        return self._restore(step, params=ocp.args.StandardRestore(abstract_params))["params"]

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """The saved state, in the shardings of `abstract_state` (shapes with shardings)."""
        counters = {name: getattr(abstract_state, name) for name in ("step", "skipped", "skipped_in_row")}
        restored = self._restore(
            step,
            params=ocp.args.StandardRestore(abstract_state.params),
            optimizer=ocp.args.StandardRestore(abstract_state.opt_state),
            counters=ocp.args.StandardRestore(counters),
        )
        return TrainState(params=restored["params"], opt_state=restored["optimizer"], **restored["counters"])

    def wait(self) -> None:
        """Until the last save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged directory
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"checkpoint {self._directory / str(step)} cannot be read ({reason}); move that directory away to "
                "resume from the checkpoint before it"
            ) from error


def check_initial(config: Config, tokenizer_fingerprint: str) -> None:
    """Raises ValueError where the run of `config.init_from` has another model or tokenizer, or no weights."""
    workdir = pathlib.Path(config.init_from)
    saved = Config.from_dict(read_run_record(workdir).config).model
    differing = [
        f"--config.model.{field.name}={getattr(saved, field.name)!r} (not {getattr(config.model, field.name)!r})"
        for field in dataclasses.fields(saved)
        if field.name not in FREE_MODEL_FIELDS and getattr(saved, field.name) != getattr(config.model, field.name)
    ]
    if differing:
        raise ValueError(f"init_from is {config.init_from!r}, whose model is another; legal: {', '.join(differing)}")
    if load_tokenizer(workdir / "tokenizer").fingerprint != tokenizer_fingerprint:
        raise ValueError(
            f"init_from is {config.init_from!r}, whose tokenizer is not the corpus's; prepare the corpus with "
            f"--tokenizer={workdir / 'tokenizer'}"
        )
    checkpoints = Checkpoints(workdir)
    try:
        checkpoints.chosen(None)
    finally:
        checkpoints.close()


def initial_weights(config: Config, shapes: Any, shardings: Any) -> Any:
    """The newest weights of the run `config.init_from`, in these shardings."""
    checkpoints = Checkpoints(pathlib.Path(config.init_from))
    try:
        abstract = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)
        return checkpoints.params(checkpoints.chosen(None), abstract)
    finally:
        checkpoints.close()


def data_differences(saved: RunRecord, current: RunRecord) -> list[str]:
    """What differs between the data of two runs: corpora, and how they are mixed and packed."""
    found = [line for line in differences(saved.config, current.config) if line.split(":")[0] in DATA_FIELDS]
    if saved.manifest != current.manifest:
        found.append(f"manifest: {saved.manifest[:12]} -> {current.manifest[:12]}")
    return found


def check_same_run(saved: RunRecord, current: RunRecord, where: str, accept_new_data: bool = False) -> None:
    """Raises ValueError naming every setting in which a run differs from the one it would continue."""
    free = FREE_FIELDS | DATA_FIELDS if accept_new_data else FREE_FIELDS
    changed = [line for line in differences(saved.config, current.config) if line.split(":")[0] not in free]
    if changed:
        raise ValueError(
            f"{where} was made with other settings ({'; '.join(changed)}); take the old settings or another --workdir"
        )
    if saved.manifest != current.manifest and not accept_new_data:
        raise ValueError(
            f"{where} was trained on another corpus (manifest {saved.manifest[:12]}, data.path now holds "
            f"{current.manifest[:12]}); point --config.data.path at the old corpus, take another --workdir, or go on "
            "with the new one, which is recorded, by --accept_new_data"
        )


def write_run_record(workdir: pathlib.Path, record: RunRecord) -> None:
    """`workdir/config.json`, made whole or not at all."""
    draft = workdir / "config.json.tmp"
    draft.write_text(json.dumps(record.to_dict(), indent=2) + "\n", encoding="utf-8")
    draft.replace(workdir / "config.json")


def read_run_record(workdir: pathlib.Path) -> RunRecord:
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(f"{workdir} holds no run (no config.json); python -m launch.train --workdir=DIR makes one")
    try:
        return RunRecord.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); restore it, or start in another --workdir") from error
