"""What a run is: its settings, corpora and data position, and whether one may go on from another's checkpoint."""

import dataclasses
import json
import pathlib
from typing import Any

from mosaics_jax import paths, whole
from mosaics_jax.config import Config, differences, with_new_fields
from mosaics_jax.data.tokenizer import Tokenizer, load_tokenizer
from mosaics_jax.whole import DamagedError

RECORD = "config.json"

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

# Of those, what may differ between the processes of a run too: where a node finds and keeps things.
OWN_FIELDS = frozenset({"data.path", "data.workers", "data.prefetch", "run.compilation_cache", "checkpoint.local_dir"})

# Fields that may change too where the user says so (`--accept_new_data`).
DATA_FIELDS = frozenset({"data.mixture", "data.mixture_changes", "data.packing", "data.seed"})

# What a run may change of the model that it takes its weights from: these decide no weight's shape or meaning.
FREE_MODEL_FIELDS = frozenset({"remat", "implementation", "compute_dtype", "delay_min", "delay_max"})


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What must agree for a checkpoint to be continued, and where its data stands.

    Attributes:
      manifest: fingerprint of the corpora.
      data_changes: for every time that a run was told to go on with other data: from which step, and what changed.
      tokenizer: fingerprint of the tokenizer; "" in a record that is older than the field.
    """

    config: dict[str, Any]
    manifest: str
    rows_read: int
    data_changes: tuple[dict[str, Any], ...] = ()
    tokenizer: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with a digest of them."""
        return whole.sealed(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, saved: Any) -> "RunRecord":
        """What `to_dict` made. Raises DamagedError, and ValueError for the whole record of another version."""
        fields = whole.opened(saved)
        try:
            made = cls(**fields)
            config = with_new_fields(made.config)
            if config["init_from"]:  # as it is in a config that is read today
                config["init_from"] = str(paths.absolute(config["init_from"]))
            Config.from_dict(config)
            changes = tuple({"step": int(one["step"]), "changes": list(one["changes"])} for one in made.data_changes)
            right = isinstance(made.manifest, str) and isinstance(made.tokenizer, str) and type(made.rows_read) is int
            if not right:
                raise ValueError("manifest, tokenizer or rows_read is of another type")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            if whole.DIGEST in saved:
                raise ValueError(f"it is of another version of this program ({reason})") from error
            raise DamagedError(reason) from error
        return dataclasses.replace(made, config=config, data_changes=changes)


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
    if saved.tokenizer and saved.tokenizer != current.tokenizer:
        raise ValueError(
            f"{where} was trained with another tokenizer than the corpora's; prepare them with the run's own, by "
            "--tokenizer=WORKDIR/tokenizer, or take another --workdir"
        )
    if saved.manifest != current.manifest and not accept_new_data:
        raise ValueError(
            f"{where} was trained on another corpus (manifest {saved.manifest[:12]}, data.path now holds "
            f"{current.manifest[:12]}); point --config.data.path at the old corpus, take another --workdir, or go on "
            "with the new one, which is recorded, by --accept_new_data"
        )


def write_run_record(workdir: pathlib.Path, record: RunRecord) -> None:
    """`workdir/config.json`, made whole or not at all. Raises OSError."""
    whole.write(workdir / RECORD, (json.dumps(record.to_dict(), indent=2) + "\n").encode())


def read_run_record(workdir: pathlib.Path) -> RunRecord:
    """What the workdir is the run of. Raises DamagedError, and ValueError where there is no run."""
    path = workdir / RECORD
    if not path.is_file():
        raise no_run(workdir)
    try:
        return RunRecord.from_dict(whole.load_json(path))
    except DamagedError as error:
        raise DamagedError(f"{path} is damaged ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); start in another --workdir") from error


def no_run(workdir: pathlib.Path) -> ValueError:
    """What to raise where a run is to be read and there is none."""
    return ValueError(f"{workdir} holds no run (no {RECORD}); python -m launch.train --workdir=DIR makes one")


def tokenizer_of(workdir: pathlib.Path, record: RunRecord) -> Tokenizer:
    """The tokenizer that a run keeps. ValueError where it is damaged, or not the one that the run was trained with."""
    found = load_tokenizer(workdir / "tokenizer")
    if record.tokenizer not in ("", found.fingerprint):
        raise ValueError(
            f"the tokenizer in {str(workdir / 'tokenizer')!r} is not the one that the run was trained with; resume the "
            "run, which puts it back, or copy it from the corpus"
        )
    return found
