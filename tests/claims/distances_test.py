"""What is said of distances is what the explorer says, in bins."""

import pathlib

import helpers
import numpy as np

from mosaics_jax.claims.distances import Distances
from mosaics_jax.data.corpus import Manifest
from mosaics_jax.explore import look, weight_by_distance
from mosaics_jax.nn.model import LanguageModel


def test_bins_hold_the_mean_weight_and_nothing_that_no_read_sees(tmp_path: pathlib.Path) -> None:
    helpers.make_corpus(tmp_path)
    distances = Distances(Manifest.load(tmp_path / "corpus"), 48, count=2)
    model = LanguageModel(helpers.tiny_config(tmp_path / "corpus").model, 0)
    records = [distances._seen(model, example.payload) for example in distances.examples()]
    assert len(records) == len(distances) == 2
    found = distances.by_memory(records)
    assert set(found) == {"short", "long"}
    window, delay = model.config.window, model.config.delay_min
    assert max(found["short"]) < window
    assert min(found["long"]) >= delay - 1
    ids = next(distances.examples()).payload
    for memory, by_distance in found.items():
        weight_N = weight_by_distance(look(model, ids), memory).mean((0, 1))
        for first, weights in by_distance.items():
            if first < 4:  # a bin of one distance
                np.testing.assert_allclose(weights[0], weight_N[first], rtol=1e-6)


def test_uniform_reads_share_alike(tmp_path: pathlib.Path) -> None:
    """A window that is full has 1/(h-1) a pair; the pair before of the whole memory's t-th read has 1/t."""
    helpers.make_corpus(tmp_path)
    distances = Distances(Manifest.load(tmp_path / "corpus"), 48, count=1)
    config = helpers.tiny_config(tmp_path / "corpus").model
    short = distances.uniform("short", config)
    assert max(short) < config.window
    assert all(value >= 1 / (config.window - 1) for values in short.values() for value in values)
    long = distances.uniform("long", config)
    assert min(long) >= config.delay_min - 1
    np.testing.assert_allclose(distances.uniform("full", config)[1], [np.mean(1 / np.arange(2, 49))], rtol=1e-6)
