"""Compiled programs on the disk: whole, or absent and compiled anew; and no folder of them stops a run."""

import os
import pathlib
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import jax
import pytest
from jax._src import compilation_cache as of_jax

from mosaics_jax import compilation
from mosaics_jax.compilation import Programs
from mosaics_jax.config import RunConfig

ROOT = pathlib.Path(__file__).parent.parent


def _cache(folder: pathlib.Path, most: int = -1) -> Programs:
    return Programs(str(folder), max_size=most)


def test_what_was_put_is_found(tmp_path: pathlib.Path) -> None:
    _cache(tmp_path / "a" / "b").put("jit_[step]-1f", b"program")
    assert _cache(tmp_path / "a" / "b").get("jit_[step]-1f") == b"program"
    assert _cache(tmp_path / "a" / "b").get("jit_[step]-2f") is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:5],
        lambda whole: b"",
        lambda whole: whole + b"x",
        lambda whole: bytes(len(whole)),
        *(lambda whole, at=at: whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (0, 500, -1 - 5)),
    ],
)
def test_what_is_damaged_is_removed_and_put_anew(spoil: Callable[[bytes], bytes], tmp_path: pathlib.Path) -> None:
    cache, program = _cache(tmp_path), bytes(range(250)) * 4
    cache.put("key", program)
    (path,) = tmp_path.iterdir()
    path.write_bytes(spoil(path.read_bytes()))
    assert cache.get("key") is None
    assert not list(tmp_path.iterdir())
    cache.put("key", program)
    assert cache.get("key") == program


def test_a_process_that_is_killed_as_it_writes_leaves_nothing_that_is_found(tmp_path: pathlib.Path) -> None:
    code = (
        "import os, signal, sys; from mosaics_jax.compilation import Programs; "
        "os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL); "
        "Programs(sys.argv[1], max_size=-1).put('key', b'program')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False, timeout=500)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1  # its draft
    cache = _cache(tmp_path)
    assert cache.get("key") is None
    cache.put("key", b"program")
    assert [path.name for path in tmp_path.iterdir()] == ["key.program"]
    assert cache.get("key") == b"program"


def test_of_a_full_cache_the_longest_unread_go(tmp_path: pathlib.Path) -> None:
    cache = _cache(tmp_path, most=3 * 132)
    for number, name in enumerate("abc"):
        cache.put(name, bytes(100))
        os.utime(tmp_path / f"{name}.program", (number, number))
    assert cache.get("a") is not None
    cache.put("d", bytes(100))
    assert {path.name[0] for path in tmp_path.iterdir()} == {"a", "c", "d"}
    cache.put("e", bytes(1000))  # finds no place at all
    assert {path.name[0] for path in tmp_path.iterdir()} == {"a", "c", "d"}


def test_a_folder_that_takes_nothing_is_one_warning(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = _cache(tmp_path)
    cache.put("kept", b"program")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for name in ("a", "b", "c"):
        cache.put(name, b"program")
        assert cache.get(name) is None
    assert cache.get("kept") == b"program"
    assert [path.name for path in tmp_path.iterdir()] == ["kept.program"]
    (said,) = caplog.messages
    assert "cannot be kept" in said
    assert "No space left on device" in said


def test_a_folder_that_cannot_be_read_is_one_warning(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = _cache(tmp_path)
    (tmp_path / "a.program").mkdir()
    assert cache.get("a") is None
    cache.put("a", b"program")
    assert len(caplog.messages) == 1


def test_a_folder_that_cannot_be_made_turns_the_cache_off(
    jax_as_it_was: None, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert compilation.use_cache(RunConfig(compilation_cache=str(tmp_path / "file" / "cache")), tmp_path) == ""
    assert not jax.config.jax_compilation_cache_dir
    (said,) = caplog.messages
    assert str(tmp_path / "file" / "cache") in said


_CONFIG = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs", "persistent_cache_min_entry_size_bytes")


@pytest.fixture
def jax_as_it_was() -> Iterator[None]:
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in _CONFIG}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    of_jax.reset_cache()


def _compiled() -> Counter[str]:
    """How the compiled form of a small program was come by."""
    before = compilation.cache_events()
    assert int(jax.jit(lambda x: x * 3 + 1)(2)) == 7
    return compilation.cache_events() - before


def test_jax_keeps_its_programs_there(jax_as_it_was: None, tmp_path: pathlib.Path) -> None:
    """A program that was damaged is compiled anew once, without a word (warnings are errors here)."""
    folder = tmp_path / "cache"
    assert compilation.use_cache(RunConfig(compilation_cache=str(folder)), tmp_path) == str(folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    assert _compiled()["miss"] == 1
    assert _compiled() == {"hit": 1}
    (path,) = [path for path in folder.glob("*.program") if "lambda" in path.name]
    whole = path.read_bytes()
    for spoilt in (whole[: len(whole) // 2], whole[:100] + bytes([whole[100] ^ 4]) + whole[101:]):
        path.write_bytes(spoilt)
        assert _compiled() == {"miss": 1}
        assert _compiled() == {"hit": 1}
    assert {path.suffix for path in folder.iterdir()} == {".program"}


@pytest.mark.parametrize(
    "move",
    [
        lambda patch: patch.setattr(of_jax, "get_file_cache", lambda path: (object(), path)),
        lambda patch: patch.delattr(of_jax, "get_file_cache"),
        lambda patch: patch.setattr(of_jax, "get_file_cache", lambda path: None),
        lambda patch: patch.delattr(of_jax, "_cache_initialized"),
    ],
)
def test_another_jax_is_told(
    move: Callable[[pytest.MonkeyPatch], None], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move(monkeypatch)
    with pytest.raises(ValueError, match=r"run.compilation_cache is on, but jax .*; legal: '', or the version of jax"):
        compilation.use_cache(RunConfig(compilation_cache=str(tmp_path / "cache")), tmp_path)
