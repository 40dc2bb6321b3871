"""The watchdog on a disk that hangs or refuses: it goes on watching, and what it ends has its stacks told."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent

_WATCH = """
import pathlib, sys, time
from mosaics_jax import background, watchdog
from mosaics_jax.config import RunConfig
watchdog._BEAT, watchdog._GRACE, background._CLOSING = 0.1, 1.0, 1.0
def a_collective_that_never_ends():
    time.sleep(60)
config = RunConfig(watchdog_seconds=0.4, watchdog_factor=3, watchdog_phase_seconds=9)
dog = watchdog.Watchdog(pathlib.Path(sys.argv[1]), config, int(sys.argv[3]), int(sys.argv[4]))
dog.start()
dog.begin(5)
for number in range(6, 30):
    time.sleep(0.05)
    dog.step(number)
if sys.argv[2] == "hang":
    a_collective_that_never_ends()
dog.stop()
"""


def _watch(workdir: pathlib.Path, ends: str, process: int = 0, processes: int = 1) -> subprocess.CompletedProcess:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _WATCH, str(workdir), ends, str(process), str(processes)], cwd=ROOT,
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert time.monotonic() - began < 40
    return done


def _hanging(path: pathlib.Path) -> None:
    """A file that holds whoever opens it, as a file server does that is away."""
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize("ends", ["hang", "stop"])
def test_heartbeats_that_hang_keep_nobody_from_watching(ends: str, tmp_path: pathlib.Path) -> None:
    _hanging(tmp_path / "heartbeats" / "0.0.tmp")
    done = _watch(tmp_path, ends)
    assert done.stderr.count("it takes too long") == 1
    assert done.returncode == (70 if ends == "hang" else 0), done.stderr
    assert bool(list(tmp_path.glob("hangs/*-step-29/process-0.txt"))) == (ends == "hang")


def test_heartbeats_that_fail_are_one_warning(tmp_path: pathlib.Path) -> None:
    (tmp_path / "heartbeats").write_text("")
    done = _watch(tmp_path, "stop")
    assert (done.returncode, len(done.stderr.splitlines())) == (0, 1)
    assert f"heartbeats in {tmp_path}: [Errno 17] File exists" in done.stderr


@pytest.mark.parametrize("disk", ["away", "refuses"])
def test_stacks_that_cannot_be_written_are_told(disk: str, tmp_path: pathlib.Path) -> None:
    if disk == "away":
        _hanging(tmp_path / "hangs" / "request.json")
    else:
        (tmp_path / "hangs").write_text("")
    done = _watch(tmp_path, "hang")
    assert done.returncode == 70
    assert "hung: process 0: step 30 is not done after" in done.stderr
    assert "in a_collective_that_never_ends" in done.stderr


@pytest.mark.parametrize(
    ("asked", "folder"),
    [
        (json.dumps({"folder": "then", "why": "because"}), "then"),
        (json.dumps({"folder": "../../elsewhere", "why": "because"}), "elsewhere"),
        ("[1]", "unknown"),
        ("", "unknown"),
        ("[" * 100_000, "unknown"),
        (json.dumps({"folder": 3}), "3"),
    ],
)
def test_what_another_process_asks_is_done_whatever_it_has_left(
    asked: str, folder: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "run" / "hangs").mkdir(parents=True)
    (tmp_path / "run" / "hangs" / "request.json").write_text(asked)
    done = _watch(tmp_path / "run", "hang", process=1, processes=2)
    assert done.returncode == 70
    assert "this is process 1" in done.stderr
    text = (tmp_path / "run" / "hangs" / folder / "process-1.txt").read_text()
    assert "process 0 has no heartbeat" in text
    assert "_watch" in text
