"""A corpus and a config small enough that a training step takes milliseconds."""

import os
import pathlib
import random
from collections.abc import Iterable
from typing import Any

import pytest

from mosaics_jax import config as config_lib
from mosaics_jax.data.corpus import Manifest
from mosaics_jax.data.prepare import prepare

# For processes that compute much: conftest.py has programs compiled for little compilation.
OPTIMISED = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}

_WORDS = ("the", "memory", "reads", "a", "key", "and", "value", "from", "past", "it", "keeps", "what", "has", "seen")


def make_corpus(directory: pathlib.Path, documents: int = 60, seed: int = 0) -> Manifest:
    """Short documents of made-up sentences, with a sixth of them held out."""
    draw = random.Random(seed)
    text = directory / "text.txt"
    folder = directory / "documents"
    folder.mkdir(parents=True)
    for number in range(documents):
        words = (draw.choice(_WORDS) for _ in range(draw.randint(1, 40)))
        (folder / f"{number}.txt").write_text(" ".join(words), encoding="utf-8")
    assert not text.exists()
    return prepare([str(folder)], str(directory / "corpus"), valid_fraction=1 / 6)


def tiny_config(corpus: pathlib.Path | str = "", **changes: Any) -> config_lib.Config:
    """One layer of width 16 on rows of 32; `changes` are "section.field": value."""
    values = config_lib.Config().to_dict()
    values["model"] |= {
        "vocabulary": 258, "layers": 2, "width": 16, "heads": 2, "ffn_width": 24, "window": 8, "delay_min": 2,
        "delay_max": 6, "compute_dtype": "float32", "remat": "none",
    }  # fmt: skip
    values["data"] |= {"path": str(corpus), "context": 32, "batch": 4}
    values["optimizer"] |= {"peak_learning_rate": 1e-2, "warmup_steps": 2}
    values["run"] |= {
        "compilation_cache": "auto" if "JAX_COMPILATION_CACHE_DIR" in os.environ else "",
        "steps": 8,
        "log_every": 2,
        "eval_every": 4,
        "eval_batches": 2,
        "loss_chunk": 64,
    }
    values["checkpoint"] |= {"every": 3}
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        holder = values[section] if section else values
        assert field in holder, name
        holder[field] = value
    return config_lib.Config.from_dict(values)


def long_but(quick: Iterable[str], names: Iterable[str]) -> list[Any]:
    """`names` as parameters of a test, of which all but the `quick` are left to `make test-long`."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.long) for name in names]


def command_line(config: config_lib.Config) -> list[str]:
    """A recipe, and every field of `config` as an override of it."""
    return ["--config=configs/tiny.py"] + [
        f"--config.{name}={value}" for name, value in config_lib.flat(config.to_dict()).items()
    ]
