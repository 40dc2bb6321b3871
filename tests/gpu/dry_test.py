"""Every job of the queue from its first line to its last, tiny and interpreted, so that none is run first on a card."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from helpers import OPTIMISED

from launch.gpu import jobs, suite, tables
from launch.gpu.bundle import read

ROOT = pathlib.Path(__file__).parents[2]

_NCU = """#!/bin/sh
while [ "$1" != "{python}" ]; do shift; done
"$@" || exit 1
echo '==PROF== Disconnected'
echo '"ID","Kernel Name","gpu__time_duration.sum"'
echo '"","","ms"'
echo '"0","retrieve_forward","5.1"'
"""


def _run(*words: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=1500,
        env=OPTIMISED | {"JAX_PLATFORMS": "cpu"} | env,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def _results(directory: pathlib.Path, job: str) -> dict:
    (path,) = directory.glob(f"{job}-cpu-*.json")
    results = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == tables.markdown(results)
    return results


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("bundle")
    out = _run("launch.gpu.bundle", "--dry", f"--output={directory}")
    assert "MiB" in out
    again = _run("launch.gpu.bundle", "--dry", f"--output={directory}")
    assert ", 0 to make" in again  # what is there is not made again
    return directory


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_suite(bundle: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """With an ncu that runs what it is given and prints a table."""
    ncu = tmp_path / "bin" / "ncu"
    ncu.parent.mkdir()
    ncu.write_text(_NCU.format(python=sys.executable))
    ncu.chmod(0o755)
    path = f"{ncu.parent}:{os.environ['PATH']}"
    _run("launch.gpu", "--dry", f"--bundle={bundle}", f"--output={tmp_path}", PATH=path)
    results = _results(tmp_path, "suite")
    assert list(results["parts"]) == [part.name for part in suite.SUITE]
    assert {part["state"] for part in results["parts"].values()} == {"passed"}
    assert not results["broken"]
    assert len([r for r in tables.of(results, "canary") if r["ok"] and r["same_bits"]]) == 13
    assert [r["kernel"] for r in tables.of(results, "counter")] == ["retrieve_forward"]
    loaded = list(tables.of(results, "program"))
    assert {r["how"] for r in loaded} == {read.CARRIED, read.COMPILED}
    # Interpreted kernels call back into Python, so nothing can carry them; everything else is carried.
    carried = {r["name"] for r in loaded if r["how"] == read.CARRIED}
    assert {"train step", "train state", "xla, forward, T = 128", "arrays T = 128"} <= carried
    figures = [r for r in tables.of(results, "figure") if "missing" not in r]
    assert {r["by"] for r in figures} >= {"hopper", "hopper, small bandwidth", "cudnn", "jla", "jax", "xla"}
    checked = [r for r in tables.of(results, "check") if r["errors"]]
    assert {r["by"] for r in checked} >= {"hopper", "hopper, small bandwidth", "cudnn", "jla", "jax"}
    assert [r["compiled"] for r in tables.of(results, "train")] == ["as loaded", "here"]
    (one, other) = (r["losses"] for r in tables.of(results, "train"))
    assert one == pytest.approx(other, rel=1e-5)
    (counted,) = tmp_path.glob("*.counters.csv")
    assert '"retrieve_forward"' in counted.read_text()


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_variants(bundle: pathlib.Path, tmp_path: pathlib.Path) -> None:
    _run("launch.gpu", "--dry", "--job=variants", f"--bundle={bundle}", f"--output={tmp_path}")
    results = _results(tmp_path, "variants")
    found = [r for r in tables.of(results, "variant") if "missing" not in r]
    assert len(found) == 2 * 9  # with the model's bandwidths and with small ones
    assert all(r["ok"] for r in tables.of(results, "check"))


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_a_run_is_killed_and_trained_on(tmp_path: pathlib.Path) -> None:
    _run("launch.gpu.commands", "--job=train", "--dry", f"--output={tmp_path}")
    results = _results(tmp_path, "train")
    assert list(results["parts"]) == ["corpus", "trained until killed", "trained on"]
    assert {part["state"] for part in results["parts"].values()} == {"passed"}
    values = {r["name"]: r["value"] for r in results["parts"]["trained on"]["records"] if r["kind"] == "value"}
    assert any(name.startswith("resume at step ") for name in values)
    assert "held out at step 300, bits a byte" in values
    assert values["tokens_per_second, median"] > 0
    assert any(r["kind"] == "text" and "## The curve" in r["text"] for r in tables.of(results, "text"))


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_claims(tmp_path: pathlib.Path) -> None:
    _run("launch.gpu.commands", "--job=claims", "--dry", f"--output={tmp_path}")
    results = _results(tmp_path, "claims")
    assert results["parts"]["claims"]["state"] == "passed"
    (run,) = tables.of(results, "value")  # it is cut off in its first training
    assert run["name"].startswith("recall_one_layer/mosaic/")
    assert "loss" in run["value"]


def test_every_job_has_its_trial_here() -> None:
    assert [job.name for job in jobs.JOBS if job.command] == ["suite", "variants", "train", "claims"]
