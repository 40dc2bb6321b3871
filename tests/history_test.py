"""metrics.jsonl after a disk, a clock or a hand has spoiled it; and what is drawn of it replaces nothing else."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from mosaics_jax import goodput
from mosaics_jax.history import read_metrics, records

ROOT = pathlib.Path(__file__).parent.parent

_Record = dict[str, Any]
_START: _Record = {"kind": "start", "time": 1005.0, "up": 5.0, "interval": 10}
_INIT: _Record = {"kind": "init", "time": 1006.0, "up": 6.0, "step": 0, "seconds": 1.0}
_TRAIN: _Record = {
    "kind": "train", "time": 1016.0, "up": 16.0, "step": 10, "steps": 10, "seconds": 10.0, "data_wait": 0.1,
}  # fmt: skip
_SAVE: _Record = {"kind": "save", "time": 1017.0, "up": 17.0, "step": 10, "blocking": 1.0}
_WRONG: tuple[Any, ...] = (None, "1.0", [], -1.0, float("nan"), float("inf"), 10**400, True)
_WHOLE = (_START, _INIT, _TRAIN, _SAVE)


def _lines(*told: Any) -> bytes:
    return b"".join(one if isinstance(one, bytes) else json.dumps(one).encode() + b"\n" for one in told)


NO_RECORDS = [
    b"3\n", b"[1, 2]\n", b'"train"\n', b"null\n", b"true\n", b"\n", b"{\n", b"{}\n", b'{"step": 3}\n',
    b'{"kind": null, "step": 3}\n', b'{"kind": ["train"]}\n', b'{"kind": "resume"}\n',
    b'{"kind": "init", "step": "0"}\n', b'{"kind": "train", "step": 1.5}\n', b'{"kind": "train", "step": true}\n',
    b'{"kind": "train", "step": ' + b"9" * 40 + b"}\n", b'{"kind": "train", "step": ' + b"9" * 9000 + b"}\n",
    b"[" * 100_000 + b"\n", b'{"a":' * 100_000 + b"\n", b"\xff\xfe\xfa\n", bytes(100) + b"\n",
    "ü\ud800".encode(errors="surrogatepass") + b"\n",
]  # fmt: skip


@pytest.mark.parametrize("line", NO_RECORDS, ids=lambda line: repr(line[:30]))
def test_what_is_no_record_is_passed_over(line: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(_lines(line, _START, line, _INIT, line, _TRAIN, _SAVE, line[:-1]))
    assert records(tmp_path / "metrics.jsonl") == list(_WHOLE)
    assert read_metrics(tmp_path) == [_TRAIN]
    found = goodput.measure(tmp_path)
    assert found.seconds["train"] == pytest.approx(9)
    assert found.total == pytest.approx(17)


@pytest.mark.parametrize("what", ["folder", "nothing"])
def test_no_file_is_one_line(what: str, tmp_path: pathlib.Path) -> None:
    if what == "folder":
        (tmp_path / "metrics.jsonl").mkdir()
    for read in (read_metrics, goodput.measure):
        with pytest.raises(ValueError, match=r"holds no metrics.jsonl; legal: the workdir of a run"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("record", "field", "value"),
    [
        (record, field, value)
        for record, fields in (
            (_START, ("up", "time", "interval")), (_INIT, ("seconds",)), (_SAVE, ("blocking", "up")),
            (_TRAIN, ("seconds", "data_wait", "steps")),
        )
        for field in fields
        for value in _WRONG
    ],
)  # fmt: skip
def test_a_record_that_lacks_a_number_is_one_line(
    record: dict[str, Any], field: str, value: Any, tmp_path: pathlib.Path
) -> None:
    told = [one | {field: value} if one is record else one for one in _WHOLE]
    (tmp_path / "metrics.jsonl").write_bytes(_lines(*told))
    with pytest.raises(ValueError, match=rf"metrics.jsonl cannot be summed: .* kind '{record['kind']}' has {field} "):
        goodput.measure(tmp_path)


def test_a_life_of_no_time_is_summed(tmp_path: pathlib.Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(_lines({"kind": "start", "time": 0, "up": 0, "interval": 1}))
    found = goodput.measure(tmp_path)
    assert (found.total, found.goodput, found.best) == (0, 0, 0)
    assert "1 lives (1 killed)" in goodput.table(found)


def test_a_clock_that_goes_back_between_lives_takes_no_time_away(tmp_path: pathlib.Path) -> None:
    back = [one | {"time": one["time"] - 900} for one in (_START, _INIT | {"kind": "resume", "step": 10})]
    (tmp_path / "metrics.jsonl").write_bytes(_lines(*_WHOLE, *back))
    found = goodput.measure(tmp_path)
    assert found.seconds["idle"] == 0
    assert found.total == pytest.approx(17 + 6)


def _goodput(*words: str, **more: Any) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launch.goodput", *words], cwd=ROOT, text=True, stderr=subprocess.PIPE, timeout=500,
        check=False, **{"stdout": subprocess.PIPE} | more,
    )  # fmt: skip


def test_a_figure_replaces_nothing_but_a_figure(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_bytes(_lines(*_WHOLE))
    (run / "folder.png").mkdir()
    (run / "text.png").write_text("mine")
    (run / "link.png").symlink_to(run / "metrics.jsonl")
    (run / "nowhere.png").symlink_to(run / "absent")
    os.mkfifo(run / "pipe.png")
    for name in ("metrics.jsonl", "folder.png", "text.png", "link.png", "nowhere.png", "pipe.png", "absent/new.png"):
        before = {path.name: path.lstat() for path in run.iterdir()}
        done = _goodput(str(run), f"--figure={run / name}")
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
        assert done.stderr.startswith(f"error: --figure is '{run / name}'")
        assert {path.name: path.lstat().st_mtime_ns for path in run.iterdir()} == {
            name: stat.st_mtime_ns for name, stat in before.items()
        }
    for _ in range(2):
        done = _goodput(str(run), f"--figure={run / 'new.png'}")
        assert (done.returncode, done.stderr) == (0, "")
        assert (run / "new.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.glob("*.partial"))


def test_a_reader_of_goodput_that_is_gone_ends_nothing(tmp_path: pathlib.Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(_lines(*_WHOLE))
    reads, writes = os.pipe()
    os.close(reads)
    try:
        done = _goodput(str(tmp_path), stdout=writes)
    finally:
        os.close(writes)
    assert (done.returncode, done.stderr) == (0, "")
