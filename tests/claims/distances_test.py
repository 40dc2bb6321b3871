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
