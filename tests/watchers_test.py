"""What only watches a run never stops it; where the disk takes the run's own files no more, it ends with one line."""

import contextlib
import itertools
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import helpers
import pytest
from tensorboardX.proto.event_pb2 import Event

from mosaics_jax import background, board
from mosaics_jax.config import CheckpointConfig
from mosaics_jax.history import read_metrics
from mosaics_jax.metrics import MetricWriter
from mosaics_jax.train import train

ROOT = pathlib.Path(__file__).parent.parent


def _events(folder: pathlib.Path) -> list[Event]:
    """All of a folder, in the order in which TensorBoard reads it."""
    found = []
    for path in sorted(folder.glob("events*")):
        data, at = path.read_bytes(), 0
        while at + 12 <= len(data) and at + 16 + (size := int.from_bytes(data[at : at + 8], "little")) <= len(data):
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += size + 16
    return found


def _steps(folder: pathlib.Path) -> list[int]:
    return [event.step for event in _events(folder) if event.HasField("summary")]


@contextlib.contextmanager
def _writer(workdir: pathlib.Path, first_step: int = 0) -> Iterator[MetricWriter]:
    workdir.mkdir(exist_ok=True)
    with contextlib.closing(MetricWriter(workdir, CheckpointConfig())) as writer:
        writer.begin(1_000_000, first_step)
        yield writer


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[Callable[[pathlib.Path, str], None]]:
    """Mounts a file system of so many bytes, or gives one that is there another size."""
    mounted = []

    def mount(place: pathlib.Path, size: str) -> None:
        options = f"remount,size={size}" if place in mounted else f"size={size}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        mounted.append(place)

    if shutil.which("mount") is None:
        pytest.skip("there is no mount here")
    yield mount
    for place in set(mounted):
        subprocess.run(["umount", "--lazy", str(place)], check=True)


# TensorBoard.


def test_curves_hold_every_number_of_a_step(tmp_path: pathlib.Path) -> None:
    with _writer(tmp_path) as writer:
        writer.write("train", {"step": 3, "loss": 2.5, "delay": 4, "mfu": "unknown"})
        writer.write("save", {"tier": "durable"})  # of no step
    version, mark, event = _events(tmp_path / "tensorboard")
    assert version.file_version == "brain.Event:2"
    assert mark.session_log.status == mark.session_log.START
    assert mark.step == 0
    assert event.step == 3
    assert {value.tag: value.simple_value for value in event.summary.value} == {"train/loss": 2.5, "train/delay": 4.0}


def test_a_later_life_is_read_later_whatever_the_clock_does(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for first, now in ((0, 2e9), (5, 1e9), (7, 1e9)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        with _writer(tmp_path, first) as writer:
            writer.write("train", {"step": first + 1, "loss": 1.0})
    marks = [event.step for event in _events(tmp_path / "tensorboard") if event.HasField("session_log")]
    assert marks == [0, 6, 8]
    assert _steps(tmp_path / "tensorboard") == [1, 6, 8]


def test_a_disk_that_hangs_under_the_curves_holds_no_step(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "_CLOSING", 1.0)
    monkeypatch.setattr(board.Board, "_append", staticmethod(lambda *_: threading.Event().wait()))
    began = time.monotonic()
    with _writer(tmp_path) as writer:
        for step in range(1, 3001):
            writer.write("train", {"step": step, "loss": 1.0})
    assert time.monotonic() - began < 20
    assert len(read_metrics(tmp_path)) == 3000
    (said,) = caplog.messages
    assert said.startswith(f"writing curves into {tmp_path / 'tensorboard'}: it takes too long")


def _told(writer: MetricWriter, first: int, until: Callable[[], bool]) -> int:
    """Tells steps until something is so; the last one."""
    for step in itertools.count(first):
        writer.write("train", {"step": step, "loss": 1.0})
        time.sleep(0.01)
        if until():
            return step
        assert step < first + 2000
    raise AssertionError


def test_curves_go_on_once_they_can_be_written(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "tensorboard"
    folder.write_text("in the place of the folder")
    with _writer(tmp_path, 10) as writer:
        assert writer._board
        writer._board._events._again = 0.05
        last = _told(writer, 11, lambda: bool(caplog.messages))
        time.sleep(0.3)
        last = _told(writer, last + 1, lambda: True)
        folder.unlink()
        last = _told(writer, last + 1, lambda: folder.exists() and len(_steps(folder)) > 3)
    (said,) = caplog.messages
    assert "File exists" in said
    assert _steps(folder)[-1] == last
    assert [event.step for event in _events(folder) if event.HasField("session_log")] == [11]
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(11, last + 1))


def test_a_disk_that_is_full_under_the_curves_holds_no_step(
    tmp_path: pathlib.Path, small_disk: Callable[[pathlib.Path, str], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "tensorboard"
    folder.mkdir()
    small_disk(folder, "16k")
    with _writer(tmp_path) as writer:
        assert writer._board
        writer._board._events._again = 0.05
        record = {f"curve {number}": 1.0 for number in range(50)}
        for step in itertools.count(1):
            writer.write("train", {"step": step, **record})
            time.sleep(0.01)
            if caplog.messages:
                break
        small_disk(folder, "4m")
        last = _told(writer, step + 1, lambda: len(_steps(folder)) > step)
    (said,) = caplog.messages
    assert "No space left on device" in said
    steps = _steps(folder)
    assert steps == sorted(set(steps))
    assert steps[-1] == last
    assert len(list(folder.iterdir())) >= 2
    assert [event.step for event in _events(folder) if event.HasField("session_log")] == [0]
    assert len(read_metrics(tmp_path)) == last


# metrics.jsonl is the run's own.


def test_where_the_metrics_find_no_room_every_line_is_whole_and_the_run_ends(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    with _writer(tmp_path) as writer:
        writer.write("train", {"step": 1, "loss": 1.0})
        whole = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, usual[1]))
        try:
            for _ in range(3):
                with pytest.raises(OSError, match=r"metrics cannot be written: File too large: '.*metrics.jsonl'"):
                    writer.write("train", {"step": 2, "loss": 1.0})
                assert path.read_bytes() == whole
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        writer.write("train", {"step": 2, "loss": 1.0})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("what", ["metrics.jsonl", "."])
@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_metrics_that_went_end_the_run(how: str, what: str, tmp_path: pathlib.Path) -> None:
    with _writer(tmp_path / "run") as writer:
        gone = (tmp_path / "run" / what).rename(tmp_path / "elsewhere")
        if how == "removed":
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        if how == "replaced":
            (tmp_path / "run").mkdir(exist_ok=True)
            (tmp_path / "run" / "metrics.jsonl").write_text("")
        with pytest.raises(OSError, match=r"metrics cannot be written: it was moved or removed: '.*metrics.jsonl'"):
            writer.write("train", {"step": 1, "loss": 1.0})


def test_the_first_failure_is_what_is_said(
    corpus: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MetricWriter.write

    def full(self: MetricWriter, kind: str, record: dict[str, Any]) -> None:
        if kind == "end" or (kind == "train" and record["step"] == 4):
            raise OSError(28, f"no room for {kind}")
        real(self, kind, record)

    monkeypatch.setattr(MetricWriter, "write", full)
    with pytest.raises(OSError, match="no room for train"):
        train(helpers.tiny_config(corpus), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("size", ["24k", "300k", "1200k"])
def test_a_disk_that_is_full_is_one_line_and_with_room_the_run_goes_on(
    size: str, corpus: pathlib.Path, tmp_path: pathlib.Path, small_disk: Callable[[pathlib.Path, str], None]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    small_disk(disk, size)
    config = helpers.tiny_config(corpus, **{"checkpoint.every": 1, "run.log_every": 1, "run.steps": 12})
    command = [sys.executable, "-m", "launch.train", f"--workdir={disk / 'run'}", *helpers.command_line(config)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    # Beside it: which kernels are taken, and one warning of the curves.
    said = [line for line in done.stderr.splitlines() if "choice.py" not in line and "background.py" not in line]
    assert (done.returncode, len(said)) == (1, 1), done.stderr
    assert said[0].startswith("failed: ")
    small_disk(disk, "64m")
    train(config, disk / "run")
    train(config, tmp_path / "whole")
    found, expected = (
        json.loads((folder / "checkpoints" / "12" / "verified.json").read_text())["fingerprints"]
        for folder in (disk / "run", tmp_path / "whole")
    )
    assert found == expected
