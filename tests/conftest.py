"""Shared by all tests: quick compilation and a small corpus."""

import os
import pathlib

import pytest

# Tiny shapes: nearly all the time of a test is compilation. Before jax is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Interpreted kernels wait for one another inside callbacks, which can occupy every thread of a small pool for ever.
os.environ.setdefault("NPROC", "8")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A prepared corpus of a few thousand bytes. Read-only: a test that spoils it copies it first."""
    import helpers  # here, for it imports JAX, which must find the flags set above

    directory = tmp_path_factory.mktemp("corpus")
    helpers.make_corpus(directory)
    return directory / "corpus"
