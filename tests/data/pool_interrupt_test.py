"""Ctrl-C while processes are started: it comes after, and once, whichever thread of the process hears it."""

import os
import signal
import threading
import time

import pytest

from mosaics_jax.data.pool import interrupts_wait


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_comes_after_the_start(times: int) -> None:
    idle = threading.Thread(target=time.sleep, args=(1,))  # which does not block it
    idle.start()
    done = []

    def start() -> None:
        with interrupts_wait():
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    idle.join()


def test_where_nothing_comes_all_is_as_before() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupts_wait():
        pass
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_in_another_thread_it_waits_there_alone() -> None:
    raised = []

    def enter() -> None:
        try:
            with interrupts_wait():
                pass
        except ValueError as error:  # what setting a handler raises there
            raised.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not raised
