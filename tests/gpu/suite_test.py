"""The runner: what hangs is killed and never run again, what fails is said, what was not reached has not passed."""

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

from launch.gpu import records, suite, tables
from launch.gpu.parts import context
from launch.gpu.programs import CANARY
from launch.gpu.suite import CANARY_PART, Part

ROOT = pathlib.Path(__file__).parents[2]
HERE = pathlib.Path(__file__).parent
KERNEL = "retrieve forward, K = 128, unit norm"
LIMIT = 10.0  # seconds that a part which hangs is given: for Python to start, on a busy machine


@pytest.fixture
def run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """Runs parts of fake_parts.py; returns the results and the runner, and counts the times they were saved."""
    monkeypatch.setenv("PYTHONPATH", os.fspath(HERE))
    monkeypatch.setenv("CUDA_ROOT", "nowhere")
    monkeypatch.setenv("FAKE_KERNELS", json.dumps({group: suite.kernels_of(group) for group in CANARY}))
    monkeypatch.setattr(suite, "_CANARY_PROCESS", LIMIT)
    monkeypatch.setattr(suite, "_COMPILING", LIMIT)

    def go(*parts: Part, seconds: float = 60) -> tuple[dict[str, Any], suite.Runner]:
        results: dict[str, Any] = {"parts": {}, "broken": {}, "seconds": 0.0, "saved": 0}

        def save() -> None:
            results["saved"] += 1

        with suite.Runner(results, save, None, False, tmp_path / "log", module="fake_parts") as runner:
            runner.run(parts, seconds)
        return results, runner

    return go


def _part(name: str, limit: float = LIMIT) -> Part:
    return Part(name, limit, seconds=-suite.PROCESS)


def test_a_part_that_hangs_is_killed_and_its_kernels_are_not_run_again(run):
    results, runner = run(_part("hangs"), _part("fine", 20))
    hung, fine = results["parts"]["hangs"], results["parts"]["fine"]
    assert re.fullmatch(r"failed: killed after \d+ s, while 'a program' ran", hung["state"])
    assert hung["records"][1]["tflops"] == 1.0  # what it had found stays
    assert list(runner.broken) == [KERNEL]
    assert "'a program' ran: killed" in runner.broken[KERNEL]
    assert fine["records"][0]["broken"] == runner.broken  # the next part is told
    assert fine["state"] == "passed"
    assert results["saved"] > 3  # as it went on, and not only at the ends
    assert tables.failures(results) == ["hangs: " + hung["state"].removeprefix("failed: ")]


def test_a_part_that_dies_takes_its_kernel_with_it(run, tmp_path):
    log = tmp_path / "log"
    results, runner = run(_part("dies", 20), _part("raises", 20))
    state = results["parts"]["dies"]["state"]
    assert state.startswith("failed: it ended with SIGSEGV, and printed last: famous last words")
    assert "--- dies\nfamous last words\n--- raises\n" in log.read_text()
    assert results["parts"]["raises"]["state"] == "failed"
    assert list(runner.broken) == ["another kernel", "a third kernel"]
    assert "ILLEGAL_ADDRESS" in runner.broken["a third kernel"]


def test_what_compiles_on_the_card_has_longer(run):
    results, _ = run(_part("compiles"))
    (seconds,) = re.findall(r"^failed: killed after (\d+) s", results["parts"]["compiles"]["state"])
    assert int(seconds) >= 2 * LIMIT


def test_half_a_record_is_not_read(run):
    results, _ = run(_part("half_a_record", 20))
    assert [record["kind"] for record in results["parts"]["half_a_record"]["records"]] == ["told", "note"]


def test_the_canary_says_which_kernels_are_broken(run):
    results, runner = run(CANARY_PART)
    expected = {
        "retrieve forward, K = 64, unit norm": "wrong values",
        "leaky_average forward, K = 64": "K = 64' ran: killed after",
        "leaky_average gradient, K = 64": "the canary did not reach it; failed: killed after",
    }
    assert set(runner.broken) == set(expected)
    for kernel, why in expected.items():
        assert why in runner.broken[kernel]
    assert results["parts"]["canary"]["state"].startswith("failed: ")
    passed = [r["kernel"] for r in results["parts"]["canary"]["records"] if r["kind"] == "canary" and r["ok"]]
    assert KERNEL in passed  # a hang beside it does not take it along


def test_what_was_not_reached_has_not_passed(run):
    late = Part("fine", 20, seconds=100)
    results, _ = run(late, seconds=5)
    assert results["parts"]["fine"]["state"] == suite.NOT_BEGUN
    assert tables.not_reached(results) == ["fine"]


def test_a_broken_kernel_is_skipped_and_said(tmp_path: pathlib.Path):
    from launch.gpu.bundle.read import Bundle
    from launch.gpu.parts import read_programs
    from launch.gpu.problem import DRY

    program = read_programs.hopper(DRY, "forward + backward", DRY.time)
    assert KERNEL in program.kernels
    given = context.Context(DRY, Bundle(None, "dry"), records.Recorder(tmp_path / "r"), {KERNEL: "it hung"})
    with pytest.raises(context.Skipped, match="it hung"):
        given.load(program)


@pytest.mark.parametrize(
    ("error", "missing", "failed"),
    [
        (context.Skipped("a kernel: it hung"), "skipped: a kernel: it hung", False),
        (ModuleNotFoundError("No module named 'jla.ops'", name="jla.ops"), "not installed", False),
        (
            ModuleNotFoundError("No module named 'xprof'", name="xprof"),
            "ModuleNotFoundError: No module named 'xprof'",
            True,
        ),
        (RuntimeError("no engine\nand more"), "RuntimeError: no engine", True),
    ],
)
def test_what_stands_in_the_place_of_a_figure(tmp_path: pathlib.Path, error, missing, failed) -> None:
    from launch.gpu.bundle.read import Bundle
    from launch.gpu.problem import DRY

    given = context.Context(DRY, Bundle(None, "dry"), records.Recorder(tmp_path / "r"), {})
    with given.attempt(by="jla", memory="long-term"):
        raise error
    (record,) = records.read(tmp_path / "r")
    assert record == {"kind": "figure", "by": "jla", "memory": "long-term", "missing": missing, "failed": failed}
    assert bool(suite.failures("reads", [record])) == failed


def test_predictions_have_their_margin():
    """By the assumptions in suite.py: each part's, and the whole six minutes'."""
    for parts, seconds in suite.JOBS.values():
        for part in parts:
            assert part.limit >= suite.MARGIN * part.predicted, part
        main = [part for part in parts if not part.late]
        assert sum(part.predicted for part in main) * suite.MARGIN <= seconds
    assert suite.MARGIN * CANARY_PART.predicted <= suite._CANARY_PROCESS


def test_the_counts_behind_the_predictions_are_those_of_the_programs():
    """Of each part's carried programs, and of cuDNN's calls, which the card compiles."""
    from launch.gpu.parts import cases, read_programs, reads, recurrence, train, variants
    from launch.gpu.problem import CARD, places
    from launch.gpu.programs import WHAT

    parts = {part.name: part for group, _ in suite.JOBS.values() for part in group}
    for name in ("reads_long", "reads_short_and_packed", "reads_more"):
        needed = []
        for place in places(CARD)[name]:
            needed.append(read_programs.arrays(CARD, place.time))
            for what in WHAT:
                needed.append(read_programs.hopper(CARD, what, place.time))
                peers = set(reads.contestants(name, place, what)) - set(reads.OURS)
                needed.append(read_programs.ready(CARD, place.time, read_programs.shift(CARD, place)))
                needed += [read_programs.peer(CARD, by, what, place) for by in peers]
        carried = {program.name for program in needed if program.carried}
        cudnn = {program.name for program in needed if not program.carried}
        assert (parts[name].carried, parts[name].cudnn) == (len(carried), len(cudnn)), name
    assert parts["recurrence"].carried == len(recurrence.all_programs(CARD)) + len(recurrence.lengths(CARD))
    assert parts["cases"].carried == len(cases.all_programs(CARD))
    assert parts["variants"].carried == 1 + len(variants.all_programs(CARD))
    assert parts["xla"].carried == (2 + 1) * len(read_programs.xla_lengths(CARD))
    assert parts["train"].carried == len(train.all_programs(CARD))


def test_by_turns_takes_turns():
    order: list[str] = []

    def call(name: str):
        import numpy as np

        return lambda: order.append(name) or np.zeros(1)

    times = context.by_turns({"a": call("a"), "b": call("b")}, 0.1)
    assert len(times["a"]) == len(times["b"]) >= 3
    squeezed = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert squeezed == ["a", "b"] * (len(squeezed) // 2)
    assert context.spread([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])["ratio"] == 2.0


def test_errors_are_of_norms_and_a_nan_is_wrong():
    assert context.errors({"output": [3.0, 4.0]}, {"output": [3.0, 4.0], "d_key": [1.0]})["ok"]
    found = context.errors({"output": [3.0, 4.3]}, {"output": [3.0, 4.0]})
    assert found["errors"]["output"] == pytest.approx(0.06)
    assert not found["ok"]
    assert not context.errors({"output": [float("nan")]}, {"output": [1.0]})["ok"]
    assert context.errors({"output": [0.0]}, {"output": [0.0]})["ok"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nvidia-smi sees no GPU"),
        (["--minutes=0"], "--minutes is 0.0; legal: more than 0"),
        (["--job=nothing"], "legal|should be one of"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: pathlib.Path, arguments: list[str], message: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "OUT"} | {"PATH": "/nowhere"}
    command = [sys.executable, "-m", "launch.gpu", f"--output={tmp_path / 'out'}", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500, env=env)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line)
    assert not (tmp_path / "out").exists()


def test_another_card_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA B200, 590.1, 10.0, 180000 MiB'\n")
    smi.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "launch.gpu", f"--output={tmp_path / 'out'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500, env=env)
    assert result.returncode == 2
    assert "NVIDIA B200, of compute capability 10.0; legal: 9.0" in result.stderr
