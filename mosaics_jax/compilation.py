"""Compiled programs kept on disk between lives of a run, and what makes them give the same weights twice."""

import os
import pathlib
from collections import Counter
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from mosaics_jax.config import RunConfig

_HIT, _MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"
_seen: Counter[str] = Counter()
jax.monitoring.register_event_listener(lambda event, **_: _seen.update([event]))


def use_cache(config: RunConfig, workdir: pathlib.Path) -> str:
    """Turns jax's persistent cache on, as `run.compilation_cache` says; returns its folder, "" where it is off.

    "auto" is JAX_COMPILATION_CACHE_DIR where that is set, else the folder compilation_cache beside the workdir: on the
    file system that all processes share, and found again by the next run there.
    """
    folder = config.compilation_cache
    if folder == "auto":
        beside = workdir.absolute().parent / "compilation_cache"
        folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(beside)
    if (jax.config.jax_compilation_cache_dir or "") != folder:
        if jax.config.jax_compilation_cache_dir:
            compilation_cache.reset_cache()  # which else keeps the folder that it was first used with
        jax.config.update("jax_compilation_cache_dir", folder or None)
    if folder:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return folder


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
