"""What a run is: its settings, corpora and data position, and whether one may go on from another's checkpoint."""

import dataclasses
import json
import pathlib
from typing import Any

from mosaics_jax import paths
from mosaics_jax.config import Config, differences, with_new_fields

# Fields that may change between restarts: they move no number beyond the rounding of a reduction, and spike_sigma none
# but of steps that it skips, which metrics.jsonl names.
FREE_FIELDS = frozenset(
    {"data.path", "data.workers", "data.prefetch", "run.accumulation", "run.log_every", "run.max_skipped"}
    | {"run.eval_every", "run.eval_steps", "run.eval_batches", "run.deterministic", "run.compilation_cache"}
    | {"run.spike_sigma"}
    | {f"run.watchdog_{name}" for name in ("factor", "seconds", "phase_seconds")}
    | {f"checkpoint.{field.name}" for field in dataclasses.fields(Config().checkpoint)}
    | {f"mesh.{field.name}" for field in dataclasses.fields(Config().mesh)}
)

# Fields that may change too where the user says so (`--accept_new_data`).
DATA_FIELDS = frozenset({"data.mixture", "data.mixture_changes", "data.packing", "data.seed"})

# What a run may change of the model that it takes its weights from: these decide no weight's shape or meaning.
FREE_MODEL_FIELDS = frozenset({"remat", "implementation", "compute_dtype", "delay_min", "delay_max"})


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
        config = with_new_fields(saved["config"])
        if config["init_from"]:  # as it is in a config that is read today
            config["init_from"] = str(paths.absolute(config["init_from"]))
        return cls(**{**saved, "config": config})


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
