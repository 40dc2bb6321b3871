"""The page of a run: figures, why one is missing, and all that went wrong."""

import json

from launch.gpu import report, suite, tables
from launch.gpu.parts import counters


def _results(**parts):
    passed = {"state": "passed", "seconds": 1.0, "records": []}
    return {
        "job": "suite", "device": "NVIDIA H100 80GB HBM3", "driver": "580.1", "memory": "", "dry": False,
        "time": "2000-01-01T00:00:00+00:00", "commit": "0123", "sources": "4567", "bundle": "of commit 0123",
        "packages": {"jax": "0.0"}, "seconds": 10.0, "broken": {},
        "parts": {name: passed | part for name, part in parts.items()},
    }  # fmt: skip


def _figure(**fields):
    place = {"kind": "figure", "memory": "long-term", "rows": "unpacked", "time": 16384, "what": "forward"}
    return place | {"by": "hopper", "milliseconds": 2.0, "tflops": 512.4} | fields


def _cells(text: str, *head: str) -> list[str]:
    """The cells after a row's first ones."""
    begin = "| " + " | ".join(head) + " |"
    (line,) = (line for line in text.splitlines() if line.startswith(begin))
    return [cell.strip() for cell in line.removeprefix(begin).strip("|").split("|")]


def test_figures_and_why_one_is_missing() -> None:
    records = [
        _figure(),
        _figure(by="cudnn", missing="XlaRuntimeError: no engine", failed=True),
        _figure(by="flex", missing="not installed", failed=False),
        _figure(by="hopper, small bandwidth", missing="skipped: forward: it hung", failed=False, skipped=True),
    ]
    text = tables.markdown(_results(reads_long={"records": records, "state": "failed"}))
    columns = dict(zip(tables.READERS, _cells(text, "long-term", "unpacked", "16,384", "forward"), strict=True))
    assert columns == {
        "hopper": "512 (2.000 ms)",
        "hopper, small bandwidth": "skipped: forward: it hung",
        "cudnn": "XlaRuntimeError: no engine",
        "jla": "not measured",
        "jax": "not measured",
        "flex": "not installed",
        "tokamax": "not measured",
        "xla": "not measured",
    }
    backward = dict(
        zip(tables.READERS, _cells(text, "short-term", "packed", "32,768", "forward + backward"), strict=True)
    )
    assert backward["cudnn"] == backward["jax"] == "unpacked only"


def test_all_that_went_wrong_is_listed() -> None:
    canary = {"kind": "canary", "same_bits": True, "errors": {"output": 1e-3}}
    results = _results(
        canary={"records": [
            canary | {"kernel": "a kernel", "ok": False, "message": "other bits"},
            canary | {"kernel": "another", "ok": True, "message": ""},
        ]},
        cases={"records": [
            {"kind": "case", "name": "a: x", "outcome": "passed", "message": ""},
            {"kind": "case", "name": "a: y", "outcome": "failed", "message": "output is 0.3 off"},
            {"kind": "case", "name": "b", "outcome": "skipped", "message": "it hung"},
        ], "state": "failed: killed after 40 s, while 'a: z' ran"},
        reads_long={"records": [
            {"kind": "check", "by": "hopper", "memory": "long-term", "rows": "unpacked", "time": 1, "what": "forward",
             "errors": {"output": 1.0}, "ok": False},
            _figure(missing="ValueError: x", failed=True),
            {"kind": "error", "message": "OSError: no space"},
        ]},
        xla={"state": suite.NOT_BEGUN},
        flex={"records": [_figure(by="flex", missing="not installed", failed=False)]},
    )  # fmt: skip
    results["broken"] = {"a kernel": "the canary: other bits"}
    assert tables.failures(results) == [
        "a kernel: other bits",
        "cases: killed after 40 s, while 'a: z' ran",
        "a: y: output is 0.3 off",
        "hopper, long-term, unpacked, 1, forward: wrong values, {'output': 1.0}",
        "hopper, long-term, unpacked, 16384, forward: ValueError: x",
        "reads_long: OSError: no space",
    ]
    text = tables.markdown(results)
    for line in tables.failures(results):
        assert f"- {line}" in text
    assert "Not reached, for want of time: xla." in text
    assert "- a kernel: the canary: other bits" in text
    assert _cells(text, "a") == ["1", "1", "0"]
    assert _cells(text, "b") == ["0", "0", "1"]


def test_every_kind_of_record_has_a_place_on_the_page() -> None:
    records = [
        {"kind": "variant", "kernel": "forward", "variant": "64 pairs", "by": "hopper"}
        | {"milliseconds": 1.5, "ratio": 0.75},
        {"kind": "counter", "kernel": "retrieve_forward", "values": {"gpu__time_duration.sum": "5.1 ms"}},
        {"kind": "train", "compiled": "as loaded", "rows": 4, "mfu": 0.5},
        {"kind": "value", "name": "held out", "value": 1.25},
        {"kind": "text", "text": "## The curve"},
        {"kind": "program", "name": "a program", "how": "compiled here", "why": "of jax 0.1", "seconds": 3.0},
    ]  # fmt: skip
    text = tables.markdown(_results(all={"records": records}))
    assert _cells(text, "forward", "64 pairs", "hopper") == ["1.500", "0.750"]
    assert _cells(text, "gpu__time_duration.sum") == ["5.1 ms"]
    assert _cells(text, "mfu") == ["0.5"]
    assert _cells(text, "held out") == ["1.25"]
    assert "## The curve" in text
    assert _cells(text, "a program") == ["3.0", "of jax 0.1"]


def test_reports_are_written_beside_old_ones_and_can_come_back(tmp_path) -> None:
    """Names of letters, digits, '.' and '-' in one folder."""
    for _ in range(2):
        page = report.Report(tmp_path, _results())
        page.save()
    stem = "suite-nvidia-h100-80gb-hbm3-2000-01-01"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{stem}-2.json", f"{stem}-2.md", f"{stem}.json", f"{stem}.md",
    ]  # fmt: skip
    assert json.loads((tmp_path / f"{stem}.json").read_text())["job"] == "suite"


def test_results_go_where_they_are_wanted(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert report.folder(None) == tmp_path / "out"
    assert report.folder(str(tmp_path / "given")) == tmp_path / "given"
    monkeypatch.delenv("OUT")
    assert report.folder(None).parts[-3:] == ("docs", "results", "gpu")


def test_counters_are_read_from_among_other_lines() -> None:
    text = """==PROF== Connected to process 1
something that the program printed
"ID","Kernel Name","gpu__time_duration.sum","sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak","unwanted"
"","","ms","%",""
"0","retrieve_forward","5.123","61.2","7"
"1","retrieve_key_grad","9.5","55.0","8"
==PROF== Disconnected
"""
    assert counters.parse(text) == [
        {"kernel": "retrieve_forward", "values": {
            "gpu__time_duration.sum": "5.123 ms", "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak": "61.2 %",
        }},
        {"kernel": "retrieve_key_grad", "values": {
            "gpu__time_duration.sum": "9.5 ms", "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak": "55.0 %",
        }},
    ]  # fmt: skip
    assert counters.parse("==ERROR== no counters") == []
