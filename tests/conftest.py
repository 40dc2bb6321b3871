"""Shared by all tests: quick compilation and a small corpus."""

import os
import pathlib
import tempfile

import pytest

# Tiny shapes: nearly all the time of a test is compilation. Before jax is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# And each program is compiled once by a pytest process and all that it starts: one killed in a write harms no other.
_COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# Interpreted kernels wait for one another inside callbacks, which can occupy every thread of a small pool for ever.
os.environ.setdefault("NPROC", "8")


def pytest_unconfigure() -> None:
    _COMPILED.cleanup()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A prepared corpus of a few thousand bytes. Read-only: a test that spoils it copies it first."""
    import helpers  # here, for it imports JAX, which must find the flags set above

    directory = tmp_path_factory.mktemp("corpus")
    helpers.make_corpus(directory)
    return directory / "corpus"
