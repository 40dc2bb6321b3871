"""Weights to safetensors under the paper's names, and back, bit for bit. `docs/safetensors.md` lists the names."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mosaics_jax import paths
from mosaics_jax.config import ModelConfig, model_from_dict
from mosaics_jax.nn.model import LanguageModel, from_values, to_values

WEIGHTS, CONFIG = "model.safetensors", "config.json"

# Modules that group parameters in the code and have no part in the paper's names.
_SILENT = {"key", "value", "bandwidth", "persistent"}


def save_safetensors(model: LanguageModel, directory: str | pathlib.Path) -> None:
    """Writes `directory`/model.safetensors (float32, one tensor for every layer's parameter) and config.json.

    ValueError where the disk refuses; each file is then whole, the new one or the old.
    """
    directory = paths.absolute(directory)
    tensors = {name: np.asarray(array) for name, array in _named(to_values(model)).items()}
    drafts = [directory / f"{name}.tmp" for name in (WEIGHTS, CONFIG)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, drafts[0])
        paths.give_usual_mode(drafts[0])
        drafts[1].write_text(_config_text(model.config), encoding="utf-8")
        for draft in drafts:
            draft.replace(draft.with_suffix(""))
    except (OSError, SafetensorError, ValueError) as error:  # a ValueError for what can be no path
        raise ValueError(f"{str(directory)!r} cannot be written ({_line(error)}); make room or name another") from error
    finally:
        for draft in drafts:
            with contextlib.suppress(OSError, ValueError):
                draft.unlink()


def load_safetensors(directory: str | pathlib.Path) -> LanguageModel:
    """The model that `save_safetensors` wrote. ValueError names a missing file, and tensors that are missing, foreign
    or of another shape or type."""
    directory = paths.absolute(directory)
    for name in (WEIGHTS, CONFIG):
        if not os.path.isfile(directory / name):
            raise ValueError(f"{directory} holds no {name}; an export has {CONFIG} and {WEIGHTS}")
    try:
        config = model_from_dict(json.loads((directory / CONFIG).read_bytes()))
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(f"{directory / CONFIG} is not the config of an export ({_line(error)})") from error
    try:
        with safe_open(directory / WEIGHTS, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            found = {name: _described(one.get_dtype(), one.get_shape()) for name, one in slices.items()}
            shapes = _checked_shapes(config, found, directory)
            tensors = {name: file.get_tensor(name) for name in found}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{directory / WEIGHTS} cannot be read ({_line(error)}); export again") from error
    return from_values(config, _nested(tensors, shapes))


def _checked_shapes(config: ModelConfig, found: dict[str, str], directory: pathlib.Path) -> dict[str, Any]:
    """The shapes of the model's parameters. ValueError where the tensors that were `found` are not those."""
    if config.layers > len(found):  # or the shapes of any number of layers would be worked out
        raise ValueError(f"{directory / CONFIG} has {config.layers} layers, {WEIGHTS} only {len(found)} tensors")
    shapes = jax.eval_shape(lambda: to_values(LanguageModel(config, 0)))
    expected = {name: _described("F32", array.shape) for name, array in _named_shapes(shapes).items()}
    for name in sorted({*expected, *found}):
        one, legal = found.get(name, "absent"), expected.get(name, "absent")
        if one != legal:
            raise ValueError(f"{directory / WEIGHTS}: tensor {name!r} is {one}; legal by {CONFIG}: {legal}")
    return shapes


def _line(error: Exception) -> str:
    """A library's words, which quote the names in a file as they are."""
    return " ".join(str(error).split())


def _described(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype} {tuple(shape)}"


def _config_text(config: ModelConfig) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def _public_name(path: tuple[str, ...], layer: int | str = "{l}") -> str:
    """("blocks", "short", "key", "W_phi") -> "blocks.{l}.short.W_phi"."""
    parts = [part for part in path if part not in _SILENT]
    if parts[0] == "blocks":
        parts.insert(1, str(layer))
    return ".".join(parts)


def _named(values: dict[str, Any]) -> dict[str, Any]:
    """Public name -> tensor; the stacked layers of a block's parameter become one tensor each."""
    named: dict[str, Any] = {}
    for path, array in flatten_dict(values).items():
        if path[0] == "blocks":
            named |= {_public_name(path, layer): array[layer] for layer in range(array.shape[0])}
        else:
            named[_public_name(path)] = array
    return named


def _named_shapes(shapes: dict[str, Any]) -> dict[str, Any]:
    """`_named` of shapes, which cannot be indexed."""
    return _named(jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes))


def _nested(tensors: dict[str, np.ndarray], shapes: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_named`."""
    flat = {}
    for path, shape in flatten_dict(shapes).items():
        if path[0] == "blocks":
            array = np.stack([tensors[_public_name(path, layer)] for layer in range(shape.shape[0])])
        else:
            array = tensors[_public_name(path)]
        flat[path] = jnp.asarray(array)
    return unflatten_dict(flat)
