"""How far back the reads of a trained model look on held-out text (the paper's figure 1)."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mosaics_jax import visibility
from mosaics_jax.config import ModelConfig
from mosaics_jax.data.corpus import Manifest
from mosaics_jax.data.source import Tokens
from mosaics_jax.evaluate import suite
from mosaics_jax.evaluate.model import Model, RunModel
from mosaics_jax.evaluate.perplexity import long_documents
from mosaics_jax.explore import look, weight_by_distance
from mosaics_jax.nn.model import LanguageModel

MEMORIES = ("short", "long", "full")
_EDGES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)


class Distances:
    """The weight of the pair n positions back, mean over layers, heads and reads, for the beginnings of documents."""

    name = "distances"

    def __init__(self, manifest: Manifest, length: int, *, count: int = 8, seed: int = 0):
        """`count` held-out documents of at least `length` tokens, in the order of a permutation by seed."""
        self._tokens, self._length = Tokens(manifest, "valid"), length
        self._starts = long_documents(manifest, length, count, seed)
        edges = [edge for edge in _EDGES if edge < length]
        self._bins = list(itertools.pairwise([*edges, length]))

    def __len__(self) -> int:
        return len(self._starts)

    def examples(self) -> Iterator[suite.Example]:
        for start in self._starts:
            ids = self._tokens.read(start, self._length)
            yield suite.Example(f"{start} {suite.digest(ids.tobytes().hex())}", self._length, ids)

    def answer(self, model: Model, batch: Sequence[suite.Example]) -> list[dict[str, Any]]:
        assert isinstance(model, RunModel), "weights are of a model that can be looked into"
        return [self._seen(model.model, example.payload) for example in batch]

    def _seen(self, model: LanguageModel, ids: np.ndarray) -> dict[str, list[float | None]]:
        """For each memory, the mean weight in each bin, None where no read sees so far."""
        seen = look(model, ids)
        by_memory = {memory: weight_by_distance(seen, memory).mean((0, 1)) for memory in seen.config.memories}
        return {
            memory: [_mean(weight_N[first:stop]) for first, stop in self._bins]
            for memory, weight_N in by_memory.items()
        }

    def by_memory(self, records: Sequence[dict[str, Any]]) -> dict[str, dict[int, list[float]]]:
        """For each memory, by the first distance of each bin, the weight of a pair there, of each document."""
        return {
            memory: {
                first: [record[memory][place] for record in records]
                for place, (first, _) in enumerate(self._bins)
                if first > 0 and records[0][memory][place] is not None
            }
            for memory in records[0]
        }

    def uniform(self, memory: str, config: ModelConfig) -> dict[int, list[float]]:
        """What `by_memory` would have of reads that weigh alike all that the memory shows them."""
        start_1T = jnp.zeros((1, self._length), jnp.int32)
        first_1T, stop_1T = {
            "short": visibility.short_term(start_1T, config.window),
            "long": visibility.long_term(start_1T, config.delay_min),
            "full": visibility.causal(start_1T),
        }[memory]
        stored_S = np.arange(self._length)
        visible_TS = (stored_S >= np.asarray(first_1T).T) & (stored_S < np.asarray(stop_1T).T)
        share_TS = visible_TS / np.maximum(visible_TS.sum(1, keepdims=True), 1)
        found = {}
        for first, stop in self._bins:
            of_N = [share_TS.diagonal(-n)[visible_TS.diagonal(-n)] for n in range(first, stop)]
            if first > 0 and any(of_T.size for of_T in of_N):
                found[first] = [float(np.mean([of_T.mean() for of_T in of_N if of_T.size]))]
        return found


def _mean(weight_N: np.ndarray) -> float | None:
    return float(np.nanmean(weight_N)) if np.isfinite(weight_N).any() else None
