"""What several processes compare and refuse, and the roll that names who is missing."""

import os
import re
import threading

import jax
import pytest

from mosaics_jax import processes
from mosaics_jax.config import MeshConfig


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"no_proxy": "10.1.2.3"}),
        ({"no_proxy": "a,b"}, {"no_proxy": "a,b,10.1.2.3"}),
        ({"NO_PROXY": "a"}, {"no_proxy": "a,10.1.2.3"}),
        ({"no_grpc_proxy": "c", "no_proxy": "a"}, {"no_grpc_proxy": "c,10.1.2.3", "no_proxy": "a,10.1.2.3"}),
    ],
)
def test_process_0_is_not_asked_of_a_proxy(before, after, monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy", *processes._PROXIES):
        monkeypatch.setenv(name, before.get(name, ""))
    processes._pass_proxies("10.1.2.3")
    assert all(os.environ[name] == before.get(name, "") for name in after)  # there is none
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    processes._pass_proxies("10.1.2.3")
    assert {name: os.environ[name] for name in after} == after


def test_other_processes_or_devices_than_the_config_says_are_refused():
    processes.check_devices(MeshConfig(processes=1, devices_per_process=1))
    with pytest.raises(ValueError, match=r"mesh.processes is 4, but 1 came; start 4 .*mesh.processes=0"):
        processes.check_devices(MeshConfig(processes=4))
    with pytest.raises(ValueError, match=r"mesh.devices_per_process is 8, but process 0 has 1 .*CUDA_VISIBLE_DEVICES"):
        processes.check_devices(MeshConfig(devices_per_process=8))


def _same(monkeypatch, *fields):
    """What `same` says to each process, called by all at once."""
    here, turn, said, found = threading.local(), threading.Barrier(len(fields)), {}, {}

    def exchange(text, what):
        said[here.me] = text
        turn.wait(10)
        everything = [said[process] for process in range(len(fields))]
        turn.wait(10)
        return everything

    def call(me):
        here.me = me
        try:
            processes.same(fields[me], "test")
            found[me] = ""
        except ValueError as error:
            found[me] = str(error)

    with monkeypatch.context() as patch:
        patch.setattr(processes, "exchange", exchange)
        patch.setattr(processes.jax, "process_index", lambda: here.me)
        threads = [threading.Thread(target=call, args=(me,)) for me in range(len(fields))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    (message,) = {found[me] for me in range(len(fields))}  # the same on all
    return message


def test_processes_started_with_other_settings_are_named(monkeypatch):
    one, two = {"data.seed": "0", "code": "a"}, {"data.seed": "1", "code": "a"}
    end = "; start all with the same command"
    assert _same(monkeypatch, one, dict(reversed(one.items())), dict(one)) == ""
    assert _same(monkeypatch, one, one, one, two) == f"process 3 differs from process 0 in data.seed: 1, not 0{end}"
    assert _same(monkeypatch, two, one, one) == (
        f"process 1 differs from process 0 in data.seed: 0, not 1 (in all 2 processes differ){end}"
    )
    assert _same(monkeypatch, one, two | {"code": "b"}) == (
        f"process 1 differs from process 0 in code: b, not a (in all 2 fields differ){end}"
    )
    assert _same(monkeypatch, one, one | {"z": "1"}) == f"process 1 differs from process 0 in z: 1, not nothing{end}"
    assert _same(monkeypatch, one | {"z": ""}, one) == f"process 1 differs from process 0 in z: nothing, not {end}"


def test_of_long_settings_the_part_that_differs_is_shown(monkeypatch):
    before, after = "a" * 5000, "b" * 5000
    message = _same(monkeypatch, {"x": f"{before}1{after}"}, {"x": f"{before}2{after}"})
    assert re.fullmatch(r"process 1 differs .* in x: \.\.\.a+2b+\.\.\., not \.\.\.a+1b+\.\.\.; start all .*", message)
    assert len(message) < 350


def test_alone_nothing_differs():
    processes.same({"x": "1"}, "test")


# The roll, which is called after a failure.


class _Roll:
    """The service that holds the roll: who has answered at each look; it ends with process 0 when there is no more."""

    def __init__(self, *looks):
        self.looks, self.said = iter(looks), []

    def key_value_set(self, key, _):
        self.said.append(key)

    def key_value_dir_get(self, folder):
        for look in self.looks:
            return [(f"{folder}{process}", "here") for process in look]
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses")


def _as_process(me, roll, monkeypatch):
    monkeypatch.setattr(processes.distributed.global_state, "client", roll)
    monkeypatch.setattr(processes.jax, "process_count", lambda: 4)
    monkeypatch.setattr(processes.jax, "process_index", lambda: me)


@pytest.mark.parametrize(
    ("looks", "said"),
    [
        ([[0, 1, 2, 3]], ""),
        ([[2], [2, 0], [3, 2, 0], *[[3, 2, 0]] * 20], "process 1 did not answer within 1 s; look at their logs first"),
        ([[2, 0]] * 20, "processes 1, 3 did not answer within 1 s; look at their logs first"),
        ([[2]], "process 0 has ended; look at its log first: if another process ended before it, it is named there"),
        ([], "process 0 has ended; look at its log first: if another process ended before it, it is named there"),
    ],
)
def test_the_roll_names_who_is_missing(looks, said, monkeypatch):
    roll = _Roll(*looks)
    _as_process(2, roll, monkeypatch)
    assert processes.roll_call(1) == said
    assert roll.said == ["mosaics/roll/2"]


def test_process_0_leaves_last(monkeypatch):
    roll = _Roll([2], [2, 3], [1, 2, 3], [])
    _as_process(0, roll, monkeypatch)
    processes.leave_last(60)
    assert next(roll.looks) == []  # the third look was the last
    processes.leave_last(0)  # nor longer than it may
    _as_process(1, roll, monkeypatch)
    processes.leave_last(60)
    assert roll.said == ["mosaics/leaving/0"] * 2 + ["mosaics/leaving/1"]
    _as_process(2, _Roll(), monkeypatch)
    processes.leave_last(60)  # the service has ended
