"""Jobs for a GPU that are commands of this project, one after another, each with a hard limit.

python3 -m launch.gpu.commands --job=train [--output=DIR] [--dry]      # make gpu-train: 4 minutes
python3 -m launch.gpu.commands --job=claims [--output=DIR] [--dry]     # make claims-gpu: 10 minutes

train: a corpus is made of Python's own source; configs/small.py, cut to 8 layers so that a save fits the minutes, is
trained, killed after a checkpoint, and trained on. What the two lives wrote says how it went.
"""

import dataclasses
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from launch import command
from launch.gpu import report, suite, tables
from launch.gpu.bundle import read as bundles
from launch.gpu.bundle import wheels
from launch.gpu.jobs import sources
from mosaics_jax import history

_JOB = flags.DEFINE_enum("job", "train", ["train", "claims"], "what to run")
_OUTPUT = command.define_path("output", None, "directory of the results; $OUT where it is set, or docs/results/gpu")
_BUNDLE = command.define_path("bundle", "build/gpu", "directory of the bundle, whose wheels are used")
_TEXT = flags.DEFINE_string("text", "", "what claims are made of, as `launch.claims --text` takes it")
_DRY = flags.DEFINE_bool("dry", False, "tiny, on a CPU: a trial of the job itself")

_CURVE_POINTS = 40


@dataclasses.dataclass(frozen=True)
class Step:
    """A command. `kill_when`: it is killed as soon as this holds, and has then done what it should."""

    name: str
    limit: float
    words: tuple[str, ...]
    kill_when: Callable[[], bool] | None = None


def main() -> None:
    carried = bundles.Bundle(pathlib.Path(_BUNDLE.value), "dry" if _DRY.value else "card")
    results = report.begun(_JOB.value, sources(_JOB.value), carried, _DRY.value)
    page = report.Report(report.folder(_OUTPUT.value), results)
    print(f"{results['device']}, driver {results['driver']}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        work = pathlib.Path(place)
        results["wheels_unpacked"] = wheels.unpack(carried.directory, work / "site")
        steps, read = {"train": (_train_steps, _read_train), "claims": (_claims_steps, _read_claims)}[_JOB.value]
        begin = time.monotonic()
        for step in steps(work):
            found = results["parts"].setdefault(step.name, {"state": suite.NOT_BEGUN, "seconds": 0.0, "records": []})
            page.save()
            started = time.monotonic()
            found["state"] = run(step, work, page.log)
            found["seconds"], results["seconds"] = time.monotonic() - started, time.monotonic() - begin
            for part in results["parts"].values():
                part["records"] = []  # those of the last step tell of all
            try:
                found["records"] = read(work)
            except Exception as error:  # whatever a file that was cut off makes of its reader
                found["records"] = [{"kind": "error", "message": f"its results cannot be read: {error!r}"}]
            page.save()
            print(f"{step.name}: {found['state']} ({found['seconds']:.0f} s)", flush=True)
            if found["state"] != "passed":
                break  # each needs the one before it
    sys.exit(report.conclude(page))


def run(step: Step, work: pathlib.Path, log: pathlib.Path) -> str:
    """The state in which a step ended."""
    part = suite.Part(step.name, step.limit, environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "true"})
    env = suite.environment(part, _DRY.value, str(work / "site"))
    words = [sys.executable, "-m", *step.words]
    child = suite.Child(part, words, env, work / f"{report.slug(step.name)}.jsonl", log)
    while (code := child.wait(step.limit)) is None:
        if step.kill_when is not None and step.kill_when():
            child.kill()
            return "passed"
    if child.failed:
        return f"failed: {child.reason}"
    if step.kill_when is not None:
        return f"failed: it ended by itself, with {code}, before it was to be killed"
    return "passed"


# --- A run: killed, and trained on. ---


def _train_steps(work: pathlib.Path) -> list[Step]:
    fields: dict[str, Any] = {"data.path": work / "corpus"}
    if _DRY.value:
        config, size, limits = "configs/tiny.py", 3_000_000, (900.0, 900.0, 900.0)
        fields |= {"run.steps": 300, "run.log_every": 10, "run.eval_every": 300, "run.eval_batches": 1}
        fields |= {"checkpoint.every": 20, "data.context": 64, "data.batch": 2, "model.layers": 1}
    else:
        config, size, limits = "configs/small.py:8", 60_000_000, (40.0, 110.0, 80.0)
        fields |= {"run.steps": 120, "run.log_every": 5, "run.eval_every": 120, "run.eval_batches": 4}
        fields |= {"checkpoint.every": 50, "data.batch": 8, "run.accumulation": 1, "mesh.fsdp": 1}
        fields |= {"model.layers": 8, "model.vocabulary": 258}
    overrides = (f"--config.{name}={value}" for name, value in fields.items())
    train = ("launch.train", f"--config={config}", f"--workdir={work / 'run'}", *overrides)
    prepare = ("launch.prepare", "--input=python", f"--output={work / 'corpus'}", f"--max_bytes={size}")

    def saved() -> bool:
        return any(record["kind"] == "save" and not record.get("problem") for record in _metrics(work))

    return [
        Step("corpus", limits[0], prepare),
        Step("trained until killed", limits[1], train, saved),
        Step("trained on", limits[2], train),
    ]


def _metrics(work: pathlib.Path) -> list[dict[str, Any]]:
    path = work / "run" / "metrics.jsonl"
    return history.records(path) if path.is_file() else []


def _read_train(work: pathlib.Path) -> list[dict[str, Any]]:
    """The curve and the figures, of all that both lives have written so far."""
    found = _metrics(work)
    trained = [record for record in found if record["kind"] == "train"]
    records: list[dict[str, Any]] = []

    def value(name: str, what: Any) -> None:
        records.append({"kind": "value", "name": name, "value": what})

    for record in found:
        if record["kind"] == "compile":
            value(f"compiled at step {record['step']}, s", f"{record['seconds']:.1f}, cache: {record['cache']}")
        elif record["kind"] in ("init", "resume"):
            value(f"{record['kind']} at step {record['step']}, s", f"{record['seconds']:.2f}")
        elif record["kind"] == "save":
            value(
                f"save of step {record['step']}: in all, and standing still, s",
                f"{record['seconds']:.2f}, {record['blocking']:.2f}",
            )
        elif record["kind"] == "eval":
            value(f"held out at step {record['step']}, bits a byte", record["bits_per_byte"])
    if trained:
        for name in ("tokens_per_second", "mfu", "data_wait"):
            values = [record[name] for record in trained[1:] or trained if isinstance(record[name], float)]
            value(f"{name}, median", statistics.median(values) if values else "unknown")
        rows = [[str(r["step"]), f"{r['loss']:.4f}", f"{r['tokens_per_second']:,.0f}"] for r in trained]
        step = -(-len(rows) // _CURVE_POINTS)
        text = "## The curve\n\n" + tables.table(["step", "loss", "tokens a second"], rows[::step])
        records.append({"kind": "text", "text": text})
    return records


# --- The paper's claims. ---


def _claims_folder(work: pathlib.Path) -> pathlib.Path:
    """On a card where it stays: what is killed goes on with the same command."""
    return work / "claims" if _DRY.value else bundles.ROOT / "runs" / "claims_gpu"


def _claims_steps(work: pathlib.Path) -> list[Step]:
    words: tuple[str, ...] = ("launch.claims", f"--workdir={_claims_folder(work)}")
    if _DRY.value:
        words += ("--suite=recall_one_layer", "--variants=mosaic", "--seeds=1")
    else:
        words += (
            "--budget=gpu",
            "--seeds=2",
            "--variants=mosaic,transformer",
            "--suite=language,classification,recall",
        )
    if _TEXT.value:
        words += (f"--text={_TEXT.value}",)
    if not _DRY.value:
        return [Step("claims", 570.0, words)]
    # Its own tests train and ask to the end; here it is enough that it begins, and is read when it is cut off.
    return [Step("claims", 900.0, words, lambda: any(r["kind"] == "value" for r in _read_claims(work)))]


def _read_claims(work: pathlib.Path) -> list[dict[str, Any]]:
    """The reports of the studies that were finished, and how far each run came."""
    place = _claims_folder(work)
    texts = [path.read_text(encoding="utf-8") for path in sorted(place.glob("*.md"))]
    records: list[dict[str, Any]] = [{"kind": "text", "text": text} for text in texts]
    for path in sorted(place.glob("runs/**/metrics.jsonl")):
        trained = [record for record in history.records(path) if record["kind"] == "train"]
        if trained:
            name, last = str(path.parent.relative_to(place / "runs")), trained[-1]
            shown = f"step {last['step']}, loss {last['loss']:.4f}, {last['tokens_per_second']:,.0f} tokens/s"
            records.append({"kind": "value", "name": name, "value": shown})
    return records


if __name__ == "__main__":
    command.run(main)
