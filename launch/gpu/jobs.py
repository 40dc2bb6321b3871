"""The jobs for a GPU in the order in which they should be run, what was run last, and the page that shows both."""

import dataclasses
import json
import pathlib
from typing import Any

from launch.gpu import problem, tables
from launch.gpu.bundle import read as bundles
from launch.gpu.report import RESULTS
from mosaics_jax.data.corpus import write_whole

_KERNELS = ("pallas_kernels/**/*.py",)
_MODEL = (*_KERNELS, "mosaics_jax/nn/*.py", "mosaics_jax/*.py", "mosaics_jax/data/*.py")


@dataclasses.dataclass(frozen=True)
class Job:
    """`command`: words after `python3 -m`, to which the output is added; none where it cannot be run yet (`waits`)."""

    name: str
    shown: str
    minutes: int
    decides: str
    sources: tuple[str, ...]
    command: tuple[str, ...] = ()
    waits: str = ""


JOBS = (
    Job(
        "suite", "make gpu", 6, "whether the kernels are right on a card, how fast beside others, what holds them up",
        (*_KERNELS, "launch/gpu/parts/*.py"), ("launch.gpu",),
    ),
    Job(
        "variants", "make gpu-variants", 4, "which block sizes and ring depths the kernels should have",
        (*_KERNELS, "launch/gpu/parts/variants.py"), ("launch.gpu", "--job=variants"),
    ),
    Job(
        "train", "make gpu-train", 4,
        "whether a run on a card trains, feeds, saves and resumes as on a CPU: its curve, tokens/s, MFU, waiting",
        (*_MODEL, "launch/gpu/commands.py"), ("launch.gpu.commands", "--job=train"),
    ),
    Job(
        "claims", "make claims-gpu", 10, "which of the paper's claims hold at 40 M weights",
        (*_MODEL, "mosaics_jax/claims/*.py", "configs/claims.py"), ("launch.gpu.commands", "--job=claims"),
    ),
    Job(
        "decode", "", 3, "what a token costs beside Hugging Face's Llama, prefill and decode", _MODEL,
        waits="caches that are written in place",
    ),
)  # fmt: skip


def sources(job: str) -> str:
    """The fingerprint of what a job measures."""
    return bundles.fingerprint(patterns=next(j.sources for j in JOBS if j.name == job))


def newest(directory: pathlib.Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The last results of each job, of those on a card."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        if not results["dry"] and results["time"] >= found.get(results["job"], {"time": ""})["time"]:
            found[results["job"]] = results
    return found


def state(job: Job, last: dict[str, Any] | None) -> str:
    """ "never", or commit, card and date of the last run, and whether it is out of date."""
    if last is None:
        return f"never; waits for {job.waits}" if job.waits else "never"
    old = "" if last["sources"] == sources(job.name) else "; out of date"
    return f"{last['commit'][:12]}, {last['device']}, {last['time'][:10]}{old}"


def due(minutes: float, directory: pathlib.Path = RESULTS) -> list[Job]:
    """The first jobs in the queue that are out of date and fit together."""
    found, chosen = newest(directory), []
    for job in JOBS:
        last = found.get(job.name)
        if job.command and (last is None or last["sources"] != sources(job.name)) and job.minutes <= minutes:
            chosen.append(job)
            minutes -= job.minutes
    return chosen


# --- The page. ---


def queue_table() -> str:
    found = newest()
    rows = [
        [
            job.name,
            f"`{job.shown}`" if job.shown else "",
            str(job.minutes),
            job.decides,
            state(job, found.get(job.name)),
        ]
        for job in JOBS
    ]
    return tables.table(["job", "command", "minutes", "what it decides", "last run"], rows)


def figures() -> str:
    """The newest figures, and "not measured" where there are none."""
    last = newest()
    suite = last.get("suite", {"parts": {}})
    records = list(tables.of(suite, "figure"))
    setting = problem.CARD
    lengths = sorted({setting.time, setting.packed, *setting.more})
    trained = list(tables.of(suite, "train"))
    step = dict.fromkeys(("rows", "tokens_per_second", "mfu", "peak_gibibytes"), tables.NOT)
    step |= {name: str(trained[-1][name]) for name in step} if trained else {}
    return "\n\n".join([
        "`retrieve`, TFLOP/s on visible pairs:",
        tables.reads_grid([r for r in records if r["memory"] != "recurrence"], tables.PLACES),
        "`leaky_average`, share of the speed of a copy:",
        tables.averages_grid([r for r in records if r["memory"] == "recurrence"], lengths),
        "The train step of `configs/small.py` on one GPU:",
        tables.table(["", ""], [[name.replace("_", " "), value] for name, value in step.items()]),
    ])  # fmt: skip


def page(text: str) -> str:
    """The README with its two generated parts made anew."""
    for name, made in (("queue", queue_table()), ("figures", figures())):
        begin, end = f"<!-- {name}: made by launch.gpu.queue --write -->\n", f"\n<!-- end of {name} -->"
        head, rest = text.split(begin)
        text = head + begin + "\n" + made + "\n" + end + rest.split(end)[1]
    return text


def write_readme() -> None:
    path = RESULTS / "README.md"
    write_whole(path, page(path.read_text(encoding="utf-8")).encode())
