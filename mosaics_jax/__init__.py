"""Memory Mosaics v2 in JAX. The public names are the ones below; nothing else is promised.

They are imported on first use, so that reading a config does not import JAX.
"""

import importlib
from typing import Any

_PUBLIC = {
    "init": "mosaics_jax.api",
    "load": "mosaics_jax.api",
    "generate": "mosaics_jax.decode",
    "save_safetensors": "mosaics_jax.export",
    "load_safetensors": "mosaics_jax.export",
    "read_metrics": "mosaics_jax.history",
}
_MODULES = ("explore",)

__all__ = ["explore", "generate", "init", "load", "load_safetensors", "read_metrics", "save_safetensors"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"mosaics_jax.{name}")
    raise AttributeError(f"module 'mosaics_jax' has no attribute {name!r}; public: {', '.join(__all__)}")
