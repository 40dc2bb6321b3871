"""What JAX is not to be told from outside: the numbers of a run depend on its config alone."""

import hashlib
import importlib.metadata
import os
import pathlib
import platform

# The settings of JAX that change numbers, and those under which all lives of a run are computed.
_SETTINGS = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_numpy_dtype_promotion": "standard",
}


def forget() -> list[str]:
    """Takes their variables out of the environment, which JAX reads as it is imported; returns those that were set."""
    return [name for name in map(str.upper, _SETTINGS) if os.environ.pop(name, None)]


def check() -> None:
    """Raises ValueError where this program has set one of them otherwise."""
    import jax  # here, for `forget` comes before it

    for name, legal in _SETTINGS.items():
        if (found := getattr(jax.config, name)) != legal:
            raise ValueError(f"JAX is set to {name}={found}; legal: {legal}, under which a run has the same numbers")


def versions() -> dict[str, str]:
    """Of this program and what it computes with; "code" changes with any line of the program."""
    names = ("mosaics_jax", "jax", "jaxlib", "numpy", "flax", "optax", "orbax-checkpoint")
    found = {name: importlib.metadata.version(name) for name in names}
    packages = (pathlib.Path(__file__).parent, pathlib.Path(__file__).parents[1] / "pallas_kernels")
    code = hashlib.sha256()
    for path in sorted(path for package in packages for path in package.rglob("*.py")):
        code.update(path.read_bytes())
    return found | {"python": platform.python_version(), "code": code.hexdigest()[:12]}
