"""A checkpoint that cannot be looked at is not damaged: it is not moved, and a run that saved nothing says so."""

import errno
import pathlib
import shutil
from typing import Any

import helpers
import pytest
from safetensors import SafetensorError

from mosaics_jax import integrity
from mosaics_jax.checkpoint import Checkpoints, SaveFailed
from mosaics_jax.integrity import UnreadableError
from mosaics_jax.train import train

_FULL_TABLE = (
    'RESOURCE_EXHAUSTED: Error reading local file "/r/manifest.ocdbt": Failed to open: "/r/manifest.ocdbt": Too many '
    "open files [os_error_code='24']"
)


@pytest.fixture(scope="module")
def finished(corpus: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of 8 steps, saved at 3, 6 and 8."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(helpers.tiny_config(corpus), workdir)
    return workdir


def _steps(workdir: pathlib.Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.EACCES, "Permission denied"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ESTALE, "Stale file handle"),
        MemoryError(),
        ImportError("no module"),
        AttributeError("a bug of the reader"),
        ValueError(_FULL_TABLE),
        ValueError(f"an error of another library around it: {_FULL_TABLE}"),
        ValueError("PERMISSION_DENIED: Error opening"),
        SafetensorError("I/O error: Too many open files (os error 24)"),
    ],
    ids=str,
)
def test_errors_of_the_reader_say_nothing_of_the_files(error: Exception) -> None:
    with pytest.raises(UnreadableError):
        integrity.damage_of(error)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOENT, "No such file or directory"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        ValueError("DATA_LOSS: Error decoding local file: CRC-32C checksum verification failed"),
        ValueError("OUT_OF_RANGE: Requested byte range [0, 268713) is not valid for value of size 100"),
        ValueError("FAILED_PRECONDITION: Truncated Zstd-compressed stream"),
        ValueError("Expecting value: line 1 column 1 (char 0)"),
        KeyError("files"),
        SafetensorError("Error while deserializing header: header too small"),
    ],
    ids=str,
)
def test_what_the_files_hold_is_damage(error: Exception) -> None:
    assert integrity.damage_of(error) == str(error)


def _refuse(monkeypatch: pytest.MonkeyPatch, *steps: str) -> None:
    """The reader fails at these checkpoints."""
    real = integrity.read

    def read(item: pathlib.Path, part: slice) -> dict[str, int]:
        if item.parent.name in steps:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(item, part)

    monkeypatch.setattr(integrity, "read", read)


def test_a_save_that_cannot_be_looked_at_stays(
    corpus: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    _refuse(monkeypatch, "6")
    train(helpers.tiny_config(corpus), tmp_path / "run")
    said = "checkpoint 6: it cannot be looked at, and stays where it is, unverified: [Errno 24] Too many open files"
    assert said in capsys.readouterr().out
    assert _steps(tmp_path / "run") == ["3", "6", "8"]
    assert not (tmp_path / "run" / "damaged").exists()


def test_a_run_none_of_whose_saves_is_accepted_fails(
    corpus: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refuse(monkeypatch, "3", "6", "8")
    with pytest.raises(SaveFailed, match="checkpoint 8 is the last of this life, and it cannot be looked at"):
        train(helpers.tiny_config(corpus), tmp_path / "run")
    assert _steps(tmp_path / "run") == ["3", "6", "8"]


def test_a_run_whose_last_save_is_damaged_fails(
    corpus: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = integrity.read
    monkeypatch.setattr(integrity, "read", lambda item, part: {n: v ^ 1 for n, v in real(item, part).items()})
    with pytest.raises(SaveFailed, match="checkpoint 8 is the last of this life, and it is not on the disk"):
        train(helpers.tiny_config(corpus), tmp_path / "run")
    assert _steps(tmp_path / "run") == []


@pytest.mark.parametrize("verified", [True, False])
def test_a_run_that_cannot_look_at_its_checkpoint_stops_and_moves_nothing(
    verified: bool,
    corpus: pathlib.Path,
    finished: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    if not verified:
        (tmp_path / "run" / "checkpoints" / "8" / "verified.json").unlink()
    before = sorted((tmp_path / "run" / "checkpoints").rglob("*"))

    def refuse(*_: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(integrity, "_sum" if verified else "read", refuse)
        with pytest.raises(UnreadableError, match=r"checkpoint 8: it cannot be looked at .*Too many.*nothing"):
            train(helpers.tiny_config(corpus), tmp_path / "run")
        checkpoints = Checkpoints(tmp_path / "run")
        with pytest.raises(UnreadableError):
            checkpoints.params(8, None)
        checkpoints.close()
    assert sorted((tmp_path / "run" / "checkpoints").rglob("*")) == before
    assert not (tmp_path / "run" / "damaged").exists()
    assert train(helpers.tiny_config(corpus), tmp_path / "run") is not None
