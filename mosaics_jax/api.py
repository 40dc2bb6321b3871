"""The ways to get a model: new from a config, or from a training run."""

import pathlib

import jax
import ml_collections

from mosaics_jax import paths
from mosaics_jax.checkpoint import Checkpoints
from mosaics_jax.config import Config, load_config
from mosaics_jax.data.tokenizer import Tokenizer
from mosaics_jax.nn.model import LanguageModel, create, from_values, to_values
from mosaics_jax.record import tokenizer_of


def init(config: ml_collections.ConfigDict | str | pathlib.Path, seed: int) -> LanguageModel:
    """A model with its initial weights. `config` is a `ConfigDict` or the path of a config file."""
    if isinstance(config, str | pathlib.Path):
        config = load_config(str(config))
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(f"config is a {type(config).__name__}; legal: a ConfigDict or the path of a config file")
    return create(Config.from_config_dict(config).model, seed)


def load(workdir: str | pathlib.Path) -> tuple[LanguageModel, Tokenizer]:
    """The model of a training run's newest checkpoint, and its tokenizer. Raises ValueError where one is damaged."""
    workdir = paths.absolute(workdir)
    checkpoints = Checkpoints(workdir)
    try:
        step = checkpoints.chosen(None)
        record = checkpoints.record(step)  # what these weights were trained with, whatever the workdir says of itself
        config = Config.from_dict(record.config).model
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.eval_shape(lambda: to_values(LanguageModel(config, 0)))
        here = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), shapes)
        values = checkpoints.params(step, here)
    finally:
        checkpoints.close()
    return from_values(config, values), tokenizer_of(workdir, record)
