"""The public names, used as a reader of the first page would use them."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mosaics_jax
from mosaics_jax import decode
from mosaics_jax.checkpoint import Checkpoints
from mosaics_jax.config import Config, default_config, load_config
from mosaics_jax.data.tokenizer import ByteTokenizer
from mosaics_jax.nn.model import from_values, to_values
from mosaics_jax.record import RunRecord, write_run_record
from mosaics_jax.step import TrainState

ROOT = pathlib.Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.py"


def _small():
    config = default_config()
    config.model.update(
        vocabulary=258, layers=1, width=16, heads=2, ffn_width=24, window=8, delay_min=3, delay_max=6,
        memories=("short",), compute_dtype="float32", remat="none", implementation="reference",
    )  # fmt: skip
    config.data.update(context=16)
    return config


def _same(a, b):
    jax.tree.map(np.testing.assert_array_equal, to_values(a), to_values(b))


@pytest.fixture(scope="module")
def model():
    return mosaics_jax.init(_small(), seed=3)


def test_init_reads_the_path_of_a_config_file(monkeypatch):
    made = []
    monkeypatch.setattr("mosaics_jax.api.create", lambda config, seed: made.append((config, seed)))
    for path in (TINY, str(TINY)):
        mosaics_jax.init(path, seed=7)
    assert made == [(Config.from_config_dict(load_config(str(TINY))).model, 7)] * 2


def test_init_from_a_config_dict_and_a_call(model):
    assert model.config == Config.from_config_dict(_small()).model
    tokens_BT = np.random.default_rng(0).integers(258, size=(2, 12))
    logits_BTV = model(tokens_BT)
    assert (logits_BTV.shape, logits_BTV.dtype) == ((2, 12, 258), jnp.float32)
    assert np.isfinite(logits_BTV).all()


def test_save_and_load_safetensors(model, tmp_path):
    mosaics_jax.save_safetensors(model, tmp_path)
    loaded = mosaics_jax.load_safetensors(tmp_path)
    assert loaded.config == model.config
    _same(loaded, model)


def test_load_takes_the_newest_checkpoint_of_a_run(model, tmp_path):
    config = Config.from_config_dict(_small())
    record = RunRecord(config.to_dict(), "0" * 64, 0)
    with pytest.raises(ValueError, match=r"holds no run \(no config.json\)"):
        mosaics_jax.load(tmp_path)
    write_run_record(tmp_path, record)
    ByteTokenizer().save(tmp_path / "tokenizer")
    checkpoints = Checkpoints(tmp_path, config.checkpoint)
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        mosaics_jax.load(tmp_path)
    older = jax.tree.map(jnp.zeros_like, to_values(model))
    for step, params in ((2, older), (10, to_values(model))):
        state = TrainState(
            jnp.int32(step), jnp.int32(0), jnp.int32(0), jnp.zeros((2, 128)), params, {"moment": jnp.zeros(3)}
        )
        checkpoints.save(state, step, record)
        checkpoints.wait()
    checkpoints.close()

    loaded, tokenizer = mosaics_jax.load(str(tmp_path))
    assert loaded.config == model.config
    assert tokenizer.fingerprint == ByteTokenizer().fingerprint
    _same(loaded, model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layers": 2}, "config is a dict; legal: a ConfigDict or the path of a config file"),
        (Config(), "config is a Config; legal: a ConfigDict or the path of a config file"),
        ("configs/gigantic.py", "no config file 'configs/gigantic.py'; the shipped ones are in configs/"),
    ],
)
def test_init_names_what_is_no_config(config, message):
    with pytest.raises(ValueError, match=message):
        mosaics_jax.init(config, seed=0)


def test_init_names_a_bad_field():
    config = _small()
    config.model.heads = 3
    with pytest.raises(ValueError, match=r"model.heads is 3, which does not divide model.width = 16"):
        mosaics_jax.init(config, seed=0)


def test_the_public_names_are_these():
    functions = ["generate", "init", "load", "load_safetensors", "read_metrics", "save_safetensors"]
    assert mosaics_jax.__all__ == ["explore", *functions]
    for name in functions:
        assert callable(getattr(mosaics_jax, name))
    assert callable(mosaics_jax.explore.look)
    assert mosaics_jax.generate is decode.generate
    with pytest.raises(AttributeError, match=r"has no attribute 'train_model'; public: explore, generate, init, load"):
        _ = mosaics_jax.train_model


def test_a_config_is_read_without_importing_jax():
    program = "import sys, mosaics_jax, mosaics_jax.config as c; c.default_config(); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_model_is_a_tree_of_arrays(model):
    doubled = jax.tree.map(lambda array: 2 * array, to_values(model))
    _same(from_values(model.config, jax.tree.map(lambda array: array / 2, doubled)), model)
