"""The queue: what is due, what fits, and the page that shows it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from launch.gpu import jobs, suite

ROOT = pathlib.Path(__file__).parents[2]


def _result(directory: pathlib.Path, job: str, **changes) -> None:
    results = {
        "job": job, "device": "NVIDIA H200", "time": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef",
        "sources": jobs.sources(job), "dry": False, "parts": {},
    }  # fmt: skip
    (directory / f"{job}-{len(list(directory.iterdir()))}.json").write_text(json.dumps(results | changes))


def _names(minutes: float, directory: pathlib.Path) -> list[str]:
    return [job.name for job in jobs.due(minutes, directory)]


def test_the_first_jobs_that_fit_are_due(tmp_path: pathlib.Path) -> None:
    assert _names(8, tmp_path) == ["suite"]
    assert _names(10, tmp_path) == ["suite", "variants"]
    assert _names(5, tmp_path) == ["variants"]  # what does not fit is passed over
    assert _names(3, tmp_path) == []  # what waits for something is never due
    assert _names(60, tmp_path) == ["suite", "variants", "train", "claims"]


def test_a_job_is_due_again_when_what_it_measures_has_changed(tmp_path: pathlib.Path) -> None:
    _result(tmp_path, "suite")
    assert _names(8, tmp_path) == ["variants", "train"]
    _result(tmp_path, "variants", sources="another")
    _result(tmp_path, "train", dry=True)  # a trial is no measurement
    assert _names(8, tmp_path) == ["variants", "train"]
    _result(tmp_path, "variants", time="2026-01-03T00:00:00+00:00")
    assert _names(8, tmp_path) == ["train"]


def test_the_table_says_what_was_run_last(tmp_path: pathlib.Path) -> None:
    _result(tmp_path, "suite")
    (suite_job, variants, *_, decode) = jobs.JOBS
    found = jobs.newest(tmp_path)
    assert jobs.state(suite_job, found["suite"]) == "0123456789ab, NVIDIA H200, 2026-01-02"
    assert jobs.state(suite_job, found["suite"] | {"sources": "another"}).endswith("; out of date")
    assert jobs.state(variants, None) == "never"
    assert jobs.state(decode, None) == "never; waits for caches that are written in place"


def test_every_job_that_runs_has_a_target_of_make_and_files_that_it_measures() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for job in jobs.JOBS:
        assert bool(job.command) != bool(job.waits)
        assert all(list(ROOT.glob(pattern)) for pattern in job.sources)
        if job.command:
            target = job.shown.removeprefix("make ")
            (recipe,) = (rule for rule in makefile.split("\n\n") if f"\n{target}:" in f"\n{rule}")
            assert f"-m {job.command[0]}" in recipe
            assert all(word in recipe for word in job.command[1:])


def test_the_minutes_of_a_job_are_those_of_its_parts() -> None:
    for job in jobs.JOBS:
        if job.name in suite.JOBS:
            assert suite.JOBS[job.name][1] <= 60 * job.minutes


def test_the_page_is_up_to_date() -> None:
    """`python -m launch.gpu.queue --write` makes it so."""
    text = (jobs.RESULTS / "README.md").read_text(encoding="utf-8")
    assert jobs.page(text) == text


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--minutes=0"], "--minutes is 0.0; legal"), (["--minutes=abc"], "--minutes")]
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "launch.gpu.queue", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert message in line


def test_the_queue_is_printed_and_a_job_without_a_card_says_so(tmp_path: pathlib.Path) -> None:
    env = os.environ | {"PATH": "/nowhere", "OUT": str(tmp_path)}
    command = [sys.executable, "-m", "launch.gpu.queue", "--minutes=4"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500, env=env)
    assert result.returncode == 1
    for job in jobs.JOBS:
        assert f"| {job.name} |" in result.stdout
    assert "nvidia-smi sees no GPU" in result.stderr
    assert "failed: " in result.stdout
