"""Weights to safetensors under the paper's names, and back, bit for bit. `docs/safetensors.md` lists the names."""

import dataclasses
import hashlib
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mosaics_jax import lock, paths, place, whole
from mosaics_jax.config import ModelConfig, model_from_dict
from mosaics_jax.data.tokenizer import DESCRIPTOR, HuggingFaceTokenizer, RankTokenizer, Tokenizer
from mosaics_jax.nn.model import LanguageModel, from_values, to_values

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer"
_OWN = {WEIGHTS, CONFIG, TOKENIZER} | {
    f"{TOKENIZER}/{name}" for name in (DESCRIPTOR, RankTokenizer.FILE, HuggingFaceTokenizer.FILE)
}
_SHA256 = "weights_sha256"  # the field of config.json that belongs to the weights

# Modules that group parameters in the code and have no part in the paper's names.
_SILENT = {"key", "value", "bandwidth", "persistent"}


def save_safetensors(
    model: LanguageModel, directory: str | pathlib.Path, tokenizer: Tokenizer | None = None
) -> None:  # fmt: skip
    """Makes the folder `directory`: model.safetensors (float32, one tensor for every layer's parameter), config.json
    and, where one is given, tokenizer/.

    An export that lies there is replaced as a whole. ValueError where something else does, where another process
    writes there, and where the disk refuses: what was there is there then.
    """
    try:
        target = pathlib.Path(os.path.realpath(paths.absolute(directory)))
    except ValueError as error:  # it can be no path
        raise ValueError(f"{str(directory)!r} cannot be written ({_line(error)}); name another") from error
    place.check(target, (place.EMPTY, place.EXPORT), "the folder of the export")
    if others := {str(path.relative_to(target)) for path in target.rglob("*")} - _OWN:
        raise ValueError(f"{str(target)!r} holds {min(others)!r} too, which a new export would remove; name another")
    partial = target.with_name(f"{target.name}.partial")
    draft = partial / "export"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with lock.hold(partial / "lock", str(target)):
            shutil.rmtree(draft, ignore_errors=True)
            _write(model, draft, tokenizer)
            place.check(target, (place.EMPTY, place.EXPORT), "the folder of the export")
            whole.replace_folder(draft, target)
            shutil.rmtree(partial)
    except lock.HeldError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"{str(target)!r} cannot be written ({_line(error)}); make room or name another") from error


def _write(model: LanguageModel, folder: pathlib.Path, tokenizer: Tokenizer | None) -> None:
    folder.mkdir()
    tensors = {name: np.asarray(array) for name, array in _named(to_values(model)).items()}
    save_file(tensors, folder / WEIGHTS)
    paths.give_usual_mode(folder / WEIGHTS)
    with open(folder / WEIGHTS, "rb") as stream:
        os.fsync(stream.fileno())
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    whole.write_json(folder / CONFIG, {**dataclasses.asdict(model.config), _SHA256: sha256})
    if tokenizer is not None:
        tokenizer.save(folder / TOKENIZER)


def load_safetensors(directory: str | pathlib.Path) -> LanguageModel:
    """The model that `save_safetensors` wrote. ValueError names a missing file, one that is damaged, and tensors that
    are missing, foreign or of another shape or type."""
    directory = paths.absolute(directory)
    for name in (WEIGHTS, CONFIG):
        if not os.path.isfile(directory / name):
            raise ValueError(f"{directory} holds no {name}; an export has {CONFIG} and {WEIGHTS}")
    try:
        fields = whole.read_json(directory / CONFIG)
        sha256 = fields.pop(_SHA256, None)  # None: of a version that wrote none
        config = model_from_dict(fields)
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory / CONFIG} is not the config of an export ({_line(error)})") from error
    try:
        with safe_open(directory / WEIGHTS, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            found = {name: _described(one.get_dtype(), one.get_shape()) for name, one in slices.items()}
            shapes = _checked_shapes(config, found, directory)
            with open(directory / WEIGHTS, "rb") as stream:
                if sha256 is not None and hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
                    raise OSError(f"it is not what {CONFIG} was written beside")
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
