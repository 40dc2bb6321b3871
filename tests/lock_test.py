"""One writer of a folder: on one node, on two, and on file systems whose locks do not reach that far."""

import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from mosaics_jax import lock

ROOT = pathlib.Path(__file__).parent.parent

# The holder of another node, as this one sees it; `flock` there says nothing here.
_HOLDER = """
import fcntl, pathlib, sys, time
from mosaics_jax import lock
lock._BEAT, lock._LEASE, lock._SETTLE = 0.2, 2.0, 0.1
def refuse(*_): raise OSError(38, "Function not implemented")
if "no locks" in sys.argv: fcntl.flock = refuse
if "elsewhere" in sys.argv: lock._myself = lambda: {"host": "elsewhere", "pid": 7, "boot": "b", "space": "s"}
with lock.hold(pathlib.Path(sys.argv[1]), "the run"):
    print("held", flush=True)
    if "give back" in sys.argv: sys.exit()
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_BEAT", 0.2)
    monkeypatch.setattr(lock, "_LEASE", 2.0)
    monkeypatch.setattr(lock, "_SETTLE", 0.1)


def _holder(path: pathlib.Path, *how: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(path), *how], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def _no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("how", [("here",), ("no locks",)])
def test_a_lock_names_its_holder_and_ends_with_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, how: tuple[str, ...]
) -> None:
    path = tmp_path / "lock"
    holder = _holder(path, *how)
    if "no locks" in how:
        _no_locks(monkeypatch)
    with (
        pytest.raises(lock.HeldError, match=rf"another process is writing the run \(process {holder.pid} on "),
        lock.hold(path, "the run"),
    ):
        pass
    _end(holder)
    began = time.monotonic()
    with lock.hold(path, "the run"):
        assert json.loads(path.read_bytes())["pid"] == os.getpid()
    assert time.monotonic() - began < lock._LEASE  # that it has ended is known, and not waited for
    assert path.read_bytes() == b""


@pytest.mark.parametrize("how", [("elsewhere",), ("elsewhere", "no locks")])
def test_a_holder_on_another_node_is_told_by_its_beats(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, how: tuple[str, ...]
) -> None:
    """With locks of the file server, and where each node has locks of its own or none."""
    path = tmp_path / "lock"
    holder = _holder(path, *how)
    _no_locks(monkeypatch)
    with pytest.raises(lock.HeldError, match=r"\(process 7 on elsewhere\)"), lock.hold(path, "the run"):
        pass
    _end(holder)
    began = time.monotonic()
    with lock.hold(path, "the run"):
        assert time.monotonic() - began > lock._LEASE / 2  # its last beat might have been of a living one


def test_a_file_server_may_free_the_lock_of_a_dead_node_late(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    holder = _holder(path)  # whose lock stays, and whose beats do not show here
    monkeypatch.setattr(lock, "_read", lambda path, was={"host": "elsewhere", "boot": "b", "pid": 7}: was)
    threading.Timer(1, _end, [holder]).start()
    assert lock._flock(os.open(path, os.O_RDWR), path, lock._myself(), "the run")


def test_a_lock_that_was_given_back_is_not_waited_for(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = _holder(tmp_path / "lock", "elsewhere", "give back")
    holder.communicate()
    _no_locks(monkeypatch)
    began = time.monotonic()
    with lock.hold(tmp_path / "lock", "the run"):
        assert time.monotonic() - began < lock._LEASE / 2


def test_who_stood_still_and_lost_the_lock_ends(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    holder = _holder(path, "elsewhere", "no locks")
    holder.send_signal(signal.SIGSTOP)
    _no_locks(monkeypatch)
    with lock.hold(path, "the run"):
        holder.send_signal(signal.SIGCONT)
        _, said = holder.communicate(timeout=60)
        assert holder.returncode == 1
        assert said.count("\n") == 1
        assert f"failed: another process is writing the run (process {os.getpid()} on " in said
        assert json.loads(path.read_bytes())["pid"] == os.getpid()


def test_of_two_that_take_it_at_once_one_has_it(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without locks: threads stand for processes of two nodes."""
    _no_locks(monkeypatch)
    monkeypatch.setattr(lock, "_SETTLE", 0.5)

    def node() -> dict[str, object]:
        name = threading.current_thread().name
        return {"host": name, "pid": 1, "boot": name, "space": name}

    monkeypatch.setattr(lock, "_myself", node)
    path, came, held, refused = tmp_path / "lock", threading.Barrier(6), [], []
    over = threading.Event()

    def take() -> None:
        came.wait()
        try:
            with lock.hold(path, "the run"):
                held.append(threading.current_thread().name)
                over.wait(30)
        except lock.HeldError:
            refused.append(threading.current_thread().name)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while len(held) + len(refused) < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    over.set()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 5)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"{" * 900, b"\xff", b'{"pid": "x", "boot": 3}', b"a" * 5000]
)
def test_what_lies_in_the_file_is_no_matter(
    tmp_path: pathlib.Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "lock").write_bytes(content)
    with lock.hold(tmp_path / "lock", "the run"):
        assert json.loads((tmp_path / "lock").read_bytes())["pid"] == os.getpid()


def test_where_the_file_cannot_be_made_the_reason_is_said(tmp_path: pathlib.Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(OSError, match="Is a directory"), lock.hold(tmp_path / "lock", "the run"):
        pass
