"""The export: names and shapes written out, bit-exact round trips, and errors."""

import dataclasses
import hashlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mosaics_jax import export
from mosaics_jax.config import ModelConfig
from mosaics_jax.nn.model import LanguageModel, from_values, to_values

MOSAIC = ModelConfig(
    vocabulary=50, layers=1, width=32, heads=2, ffn_width=48, window=8, delay_min=3, delay_max=6,
    compute_dtype="float32", remat="none",
)  # fmt: skip
SHARED = {
    "embedding": (50, 32),
    "blocks.0.memory_norm": (32,),
    "blocks.0.persistent_norm": (32,),
    "blocks.0.W_1": (32, 48),
    "blocks.0.W_3": (32, 48),
    "blocks.0.W_2": (48, 32),
    "final_norm": (32,),
    "classifier": (32, 50),
}
SHORT = {
    "blocks.0.short.W_phi": (32, 2, 16),
    "blocks.0.short.W_psi": (32, 2, 16),
    "blocks.0.short.W_g": (32, 2),
    "blocks.0.short.W_lambda": (32, 2),
    "blocks.0.short.theta_beta0": (2,),
    "blocks.0.short.theta_beta1": (2,),
    "blocks.0.short.theta_alpha": (2,),
    "blocks.0.short.theta_psi": (2,),
    "blocks.0.short.gamma": (2,),
}
LONG = {
    "blocks.0.long.W_phi": (32, 2, 16),
    "blocks.0.long.W_psi": (32, 2, 16),
    "blocks.0.long.W_g": (32, 2),
    "blocks.0.long.W_lambda": (32, 2),
    "blocks.0.long.theta_beta0": (2,),
    "blocks.0.long.theta_beta1": (2,),
    "blocks.0.long.theta_alpha": (2,),
    "blocks.0.long.theta_psi": (2,),
    "blocks.0.long.gamma": (2,),
}
FULL = {
    "blocks.0.full.W_q": (32, 2, 16),
    "blocks.0.full.W_k": (32, 2, 16),
    "blocks.0.full.W_v": (32, 2, 16),
}
NAMES = {
    "mosaic": SHARED | SHORT | LONG | {"blocks.0.W_o": (2, 2, 16, 32)},
    "without long-term memory": SHARED | SHORT | {"blocks.0.W_o": (1, 2, 16, 32)},
    "transformer": SHARED | FULL | {"blocks.0.W_o": (1, 2, 16, 32)},
}


def _model(kind, layers=1):
    """Random weights of every size that float32 knows."""
    config = dataclasses.replace(MOSAIC, layers=layers)
    if kind == "transformer":
        config = dataclasses.replace(config, architecture="transformer", memories=("full",))
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape) * 10.0 ** rng.integers(-30, 30, size=leaf.shape), jnp.float32)

    model = from_values(config, jax.tree.map(draw, jax.eval_shape(lambda: to_values(LanguageModel(config, 0)))))
    return model.remove_long_term() if kind == "without long-term memory" else model


@pytest.mark.parametrize("kind", NAMES)
def test_names_and_shapes(kind, tmp_path):
    export.save_safetensors(_model(kind), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == NAMES[kind]
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("kind", NAMES)
def test_round_trip_is_exact_to_the_bit(kind, tmp_path):
    model = _model(kind, layers=3)
    export.save_safetensors(model, tmp_path / "a" / "new" / "directory")
    loaded = export.load_safetensors(str(tmp_path / "a" / "new" / "directory"))
    assert loaded.config == model.config

    def same_bits(a, b):
        assert a.dtype == b.dtype == jnp.float32
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    jax.tree.map(same_bits, to_values(loaded), to_values(model))


def test_a_tensor_is_one_layer_of_the_parameter_of_its_name(tmp_path):
    model = _model("mosaic", layers=12)  # 10 comes after 2, and not before it
    export.save_safetensors(model, tmp_path)
    tensors, blocks = load_file(tmp_path / "model.safetensors"), to_values(model)["blocks"]
    for layer in (0, 2, 10, 11):
        np.testing.assert_array_equal(tensors[f"blocks.{layer}.W_o"], blocks["W_o"][layer])
        np.testing.assert_array_equal(tensors[f"blocks.{layer}.W_2"], blocks["persistent"]["W_2"][layer])
        np.testing.assert_array_equal(tensors[f"blocks.{layer}.long.W_phi"], blocks["long"]["key"]["W_phi"][layer])
        np.testing.assert_array_equal(tensors[f"blocks.{layer}.short.gamma"], blocks["short"]["value"]["gamma"][layer])


def test_the_config_lies_beside_and_nothing_else(tmp_path):
    export.save_safetensors(_model("mosaic"), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((tmp_path / "config.json").read_text())
    weights = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    del config["digest"]
    assert config == dataclasses.asdict(MOSAIC) | {"memories": ["short", "long"], "weights_sha256": weights}


def test_a_second_export_replaces_the_first(tmp_path):
    export.save_safetensors(_model("mosaic"), tmp_path)
    export.save_safetensors(_model("transformer"), tmp_path)
    assert export.load_safetensors(tmp_path).config.architecture == "transformer"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(name, tmp_path):
    export.save_safetensors(_model("mosaic"), tmp_path)
    (tmp_path / name).unlink()
    message = f"{tmp_path} holds no {name}; an export has config.json and model.safetensors"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        export.load_safetensors(tmp_path)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(share, tmp_path):
    export.save_safetensors(_model("mosaic"), tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} cannot be read \(.*\); export again"):
        export.load_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"blocks.0.W_1": np.zeros((48, 32), np.float32)},
            "tensor 'blocks.0.W_1' is F32 (48, 32); legal by config.json: F32 (32, 48)",
        ),
        (
            {"blocks.0.short.gamma": None},
            "tensor 'blocks.0.short.gamma' is absent; legal by config.json: F32 (2,)",
        ),
        (
            {"blocks.1.W_1": np.zeros((32, 48), np.float32)},
            "tensor 'blocks.1.W_1' is F32 (32, 48); legal by config.json: absent",
        ),
        (
            {"blocks.0.W_1": np.zeros((32, 48), np.float16)},
            "tensor 'blocks.0.W_1' is F16 (32, 48); legal by config.json: F32 (32, 48)",
        ),
        (
            {"lm_head": np.zeros((), np.float32)},
            "tensor 'lm_head' is F32 (); legal by config.json: absent",
        ),
    ],
    ids=["wrong shape", "missing", "foreign layer", "wrong type", "foreign name"],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    export.save_safetensors(_model("mosaic"), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor for name, tensor in (load_file(path) | change).items() if tensor is not None}
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}$"):
        export.load_safetensors(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"memories": ["short"], "colour": "red"}', '{"memories": ["tall"]}', '{"memories": 3}']
)
def test_a_config_that_is_none_is_named(text, tmp_path):
    export.save_safetensors(_model("mosaic"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is not the config of an export \("):
        export.load_safetensors(tmp_path)
