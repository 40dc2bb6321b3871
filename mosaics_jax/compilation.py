"""Compiled programs kept on disk between lives of a run, and what makes them give the same weights twice.

JAX decides what is kept and under which key. How it lies on the disk is ours: JAX writes a program in place, so one
that a kill cut short would be found unreadable, with a warning, by every life after.
"""

import contextlib
import glob
import hashlib
import logging
import os
import pathlib
from collections import Counter
from typing import Any

import jax
from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface

from mosaics_jax import whole
from mosaics_jax.config import RunConfig

_HIT, _MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"
_seen: Counter[str] = Counter()
jax.monitoring.register_event_listener(lambda event, **_: _seen.update([event]))


class Programs(CacheInterface):
    """JAX's cache, of files that are whole or absent: `<key>.program` is a program and its sha256.

    One that is damaged is removed, and compiled anew. A folder that cannot be read or written stops nothing.
    """

    def __init__(self, path: str, *, max_size: int):
        """`max_size`: bytes that the programs may take, -1 for any number; the longest unread go. Raises OSError."""
        self._path = pathlib.Path(path)
        self._most = max_size
        self._warned = False
        self._path.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> bytes | None:
        path = self._file(key)
        try:
            content = path.read_bytes()
            if self._most >= 0:
                os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(error)
            return None
        program, digest = content[:-_DIGEST], content[-_DIGEST:]
        if hashlib.sha256(program).digest() == digest:
            return program
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._warn(error)
        return None

    def put(self, key: str, value: bytes) -> None:
        path = self._file(key)
        try:
            for draft in self._path.glob(f"{glob.escape(path.name)}.*.partial"):  # of a process that was killed
                draft.unlink(missing_ok=True)
            if self._make_room(len(value) + _DIGEST):
                whole.write(path, value + hashlib.sha256(value).digest())
        except FileNotFoundError:
            pass  # another process that compiles the same took this one's draft for a dead one's
        except OSError as error:
            self._warn(error)

    def _make_room(self, size: int) -> bool:
        if self._most < 0 or size > self._most:
            return self._most < 0
        held = []
        for path in self._path.glob("*.program"):
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                held.append((found.st_mtime_ns, found.st_size, path))
        held.sort()
        while held and sum(bytes for _, bytes, _ in held) + size > self._most:
            held.pop(0)[2].unlink(missing_ok=True)
        return True

    def _file(self, key: str) -> pathlib.Path:
        return self._path / f"{key}.program"

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            _warn_of(self._path, error)


_DIGEST = hashlib.sha256().digest_size


def use_cache(config: RunConfig, workdir: pathlib.Path) -> str:
    """Turns jax's persistent cache on, as `run.compilation_cache` says; returns its folder, "" where it is off.

    "auto" is JAX_COMPILATION_CACHE_DIR where that is set, else the folder compilation_cache beside the workdir: on the
    file system that all processes share, and found again by the next run there. A folder that cannot be made is warned
    of, and the cache is off.

    Raises ValueError where this version of JAX does not take our cache.
    """
    folder = config.compilation_cache
    if folder == "auto":
        beside = workdir.absolute().parent / "compilation_cache"
        folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(beside)
    if folder and not _is_ours(folder):
        folder = ""
    changes = (jax.config.jax_compilation_cache_dir or "") != folder
    if compilation_cache._cache_initialized and (changes or not isinstance(compilation_cache._cache, Programs)):
        compilation_cache.reset_cache()  # which else keeps what it was first used with
    jax.config.update("jax_compilation_cache_dir", folder or None)
    if folder:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return folder


def _is_ours(folder: str) -> bool:
    """Has jax make `Programs` of the folder; whether it could."""
    try:
        # What jax makes its cache of: it gives no other way to hand one in.
        if isinstance(getattr(compilation_cache, "LRUCache", None), type):
            compilation_cache.LRUCache = Programs  # type: ignore[misc, assignment]
        _ = compilation_cache._cache, compilation_cache._cache_initialized
        made: Any = compilation_cache.get_file_cache(folder)
        cache = getattr(made[0], "_base_cache", made[0])  # within jax's own check of what the cache holds
    except OSError as error:
        _warn_of(folder, error)
        return False
    except (AttributeError, TypeError, IndexError) as error:
        cache = error
    if not isinstance(cache, Programs):
        raise ValueError(
            f"run.compilation_cache is on, but jax {jax.__version__} makes another cache than compilation.py knows "
            f"({cache!r}); legal: '', or the version of jax in setup.cfg"
        )
    return True


def _warn_of(folder: str | pathlib.Path, error: OSError) -> None:
    logging.getLogger(__name__).warning(
        "compiled programs cannot be kept in %s: %s; the next life compiles anew what is not there", folder, error
    )


def cache_events() -> Counter[str]:
    """Programs that were found in the cache ("hit") and that were not ("miss"), in this process so far."""
    return Counter(hit=_seen[_HIT], miss=_seen[_MISS])


def compiler_options(config: RunConfig) -> dict[str, Any]:
    """`run.deterministic` for jit: no atomics, and no choice of kernels by their timing, which differs between lives.

    The CPU backend takes the flags too, and does the same without them.
    """
    if not config.deterministic:
        return {}
    return {"xla_gpu_deterministic_ops": True, "xla_gpu_autotune_level": 0}
