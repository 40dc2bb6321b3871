"""SIGTERM and SIGHUP: a run saves, and the same command goes on."""

import os
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import helpers
import jax
import pytest

from mosaics_jax import loop, preemption
from mosaics_jax.train import train


@pytest.fixture(autouse=True)
def hangup() -> Iterator[None]:
    """SIGHUP as it is without nohup, under which these tests may run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_told_to_stop_saves_and_goes_on_later(
    number: signal.Signals, corpus: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    real = loop.batches

    def told(*args: Any, **kwargs: Any) -> Any:
        for count, batch in enumerate(real(*args, **kwargs)):
            if "start_batch" in kwargs and count == 4:
                os.kill(os.getpid(), number)
            yield batch

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "batches", told)
        assert train(helpers.tiny_config(corpus), tmp_path / "run") is None
    assert signal.getsignal(number) is before
    assert f"{number.name}: saved step 5; the same command resumes" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "5" / "verified.json").exists()


def test_a_hangup_that_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    heard: list[str] = []
    with preemption.heard(heard.append):
        os.kill(os.getpid(), signal.SIGHUP)
    assert heard == []
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_of_several_processes_a_hangup_is_a_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    caught: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    try:
        with preemption.heard(lambda name: pytest.fail(name)):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught == [signal.SIGTERM]
