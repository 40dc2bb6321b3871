"""The results of a job on a GPU: how they begin, where they go, as JSON and as a page, rewritten as the run goes on."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
from typing import Any

from launch.gpu import tables
from launch.gpu.bundle import read as bundles
from mosaics_jax import paths
from mosaics_jax.data.corpus import write_whole

_SHOWN = 30  # failures printed; the table has them all
_PACKAGES = ("jax", "jaxlib", "torch", "flax", "optax", "orbax-checkpoint", "numpy", "jax-linear-attention", "tokamax")
RESULTS = bundles.ROOT / "docs/results/gpu"
Results = dict[str, Any]


class Report:
    """The files of a run, `<job>-<device>-<date>` and a suffix; numbered where that date has some already."""

    def __init__(self, directory: pathlib.Path, results: Results):
        self.results = results
        name = slug(f"{results['job']} {results['device']} {results['time'][:10]}")
        self._stem, number = directory / name, 1
        while self._path(".json").exists():
            number += 1
            self._stem = directory / f"{name}-{number}"
        directory.mkdir(parents=True, exist_ok=True)
        self.save()

    @property
    def log(self) -> pathlib.Path:
        """What the parts print."""
        return self._path(".log")

    def _path(self, suffix: str) -> pathlib.Path:
        return self._stem.with_name(self._stem.name + suffix)

    def save(self) -> None:
        for suffix, text in (
            (".json", json.dumps(self.results, indent=1) + "\n"),
            (".md", tables.markdown(self.results)),
        ):
            write_whole(self._path(suffix), text.encode())

    def __str__(self) -> str:
        return str(self._path(".md"))


def begun(job: str, sources: str, carried: bundles.Bundle, dry: bool) -> Results:
    """The results of a job that has found nothing yet.

    Raises:
      ValueError: there is no Hopper GPU here, and the run is not dry.
    """
    card = {"device": "CPU", "driver": "none", "memory": ""} if dry else look()
    return {
        "job": job, **card, "dry": dry, "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": carried.manifest.get("commit") or bundles.commit(), "sources": sources,
        "bundle": carried.refusal or f"of commit {carried.manifest['commit']}, {carried.manifest['compiler']}",
        "packages": {name: _version(name) for name in _PACKAGES}, "seconds": 0.0, "broken": {}, "parts": {},
    }  # fmt: skip


def folder(given: str | None) -> pathlib.Path:
    """Where results go: what is given, $OUT, or the project's own place."""
    return paths.absolute(given or os.environ.get("OUT") or RESULTS)


def conclude(page: "Report") -> int:
    """Prints what went wrong, and where the results are; returns the exit code."""
    failed, late = tables.failures(page.results), tables.not_reached(page.results)
    print("\n".join(["", *(line[:200] for line in failed[:_SHOWN])]))
    beside = f": {', '.join(late)}" if late else ""
    print(f"{len(failed)} failure(s), {len(late)} part(s) not reached{beside}; results: {page}", flush=True)
    return 1 if failed or late else 0


def look() -> dict[str, str]:
    """The card's name, memory and driver.

    Raises:
      ValueError: there is no Hopper GPU here.
    """
    fields = ("name", "driver_version", "compute_cap", "memory.total")
    try:
        text = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=30,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(
            f"the GPU suite cannot run: nvidia-smi sees no GPU ({type(error).__name__}); legal: one of compute "
            "capability 9.0, or --dry on a CPU"
        ) from None
    name, driver, capability, memory = (word.strip() for word in text.splitlines()[0].split(","))
    if capability != "9.0":
        raise ValueError(
            f"the GPU suite cannot run on {name}, of compute capability {capability}; legal: 9.0, or --dry on a CPU"
        )
    return {"device": name, "driver": driver, "memory": memory}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
