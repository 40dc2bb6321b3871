"""The corpora of a run: one, or several in given proportions, and the rows taken of them."""

import hashlib
import json
import pathlib
from collections.abc import Mapping

from mosaics_jax.config import DataConfig
from mosaics_jax.data.corpus import Manifest
from mosaics_jax.data.mixture import Mixture, Phase, Source
from mosaics_jax.data.packing import BestFitRows
from mosaics_jax.data.source import ConcatRows, Rows, Tokens

PACKINGS: Mapping[str, type[ConcatRows] | type[BestFitRows]] = {"concat": ConcatRows, "best_fit": BestFitRows}


class Corpora:
    """What `config.data` names, opened and checked.

    Attributes:
      manifests: by name; a single corpus has the name "".
      fingerprint: equal for the same tokens under the same names, wherever they lie.
    """

    def __init__(self, config: DataConfig):
        """ValueError for a corpus that is missing, damaged or too short, or whose tokenizer is not the others'."""
        self._config = config
        changes = sorted((int(step), weights) for step, weights in config.mixture_changes.items())
        self._weights = [(0, config.mixture or {"": 1.0}), *changes]
        names = sorted({name for _, weights in self._weights for name in weights})  # no matter how they are written
        root = pathlib.Path(config.path)
        self.manifests = {name: Manifest.load(root / name if name else root) for name in names}
        self._any = next(iter(self.manifests.values()))
        for name, manifest in self.manifests.items():
            if manifest.tokenizer_fingerprint != self._any.tokenizer_fingerprint:
                raise ValueError(
                    f"data.mixture has corpora of different tokenizers: {str(self._any.directory)!r} "
                    f"({self._any.tokenizer_kind}) and {name!r} ({manifest.tokenizer_kind}); prepare them with one, as "
                    f"with --tokenizer={self._any.tokenizer_directory}"
                )
        self._train = {name: self._rows(name, "train") for name in names}
        self._valid = {name: self._rows(name, "valid") for name in names}
        for name, rows in self._valid.items():
            if len(rows) < config.batch:
                raise ValueError(
                    f"split 'valid' of {str(self.manifests[name].directory)!r} has {len(rows)} rows of context "
                    f"{config.context}, fewer than one batch of {config.batch}; "
                    "take a smaller batch or context, or prepare more text"
                )

    def _rows(self, name: str, split: str) -> Rows:
        return PACKINGS[self._config.packing](self.manifests[name], split, self._config.context)

    @property
    def begin(self) -> int:
        return self._any.begin

    @property
    def vocabulary(self) -> int:
        return self._any.vocabulary

    @property
    def tokenizer_fingerprint(self) -> str:
        return self._any.tokenizer_fingerprint

    @property
    def tokenizer_directory(self) -> pathlib.Path:
        return self._any.tokenizer_directory

    @property
    def fingerprint(self) -> str:
        if list(self.manifests) == [""]:
            return self._any.fingerprint
        prints = {name: manifest.fingerprint for name, manifest in self.manifests.items()}
        return hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()

    @property
    def shares(self) -> dict[str, float]:
        """The share of rows that each corpus has at the start."""
        weights = self._weights[0][1]
        return {name: weights.get(name, 0.0) / sum(weights.values()) for name in self.manifests}

    @property
    def bytes_per_prediction(self) -> float:
        """UTF-8 bytes of a predicted token of the mixture that the run starts with."""
        return sum(
            share * self.manifests[name].split("train").bytes_per_prediction for name, share in self.shares.items()
        )

    def training(self) -> Mixture:
        """The rows of the run, for ever."""
        sources = [
            Source(rows, f"{self.manifests[name].fingerprint} {self._config.seed}")
            for name, rows in self._train.items()
        ]
        phases = [
            Phase(step * self._config.batch, [weights.get(name, 0.0) for name in self.manifests])
            for step, weights in self._weights
        ]
        return Mixture(sources, phases)

    def places(self, rows: range) -> list[tuple[str, int]]:
        """Of rows of the run: the corpus of each, and its number there, which `launch.prepare --inspect` takes."""
        mixture, names = self.training(), list(self.manifests)
        found = [mixture.lies(row) for row in rows]
        return [(names[source], index) for source, index in found]

    def tokens(self, name: str) -> Tokens:
        """The training tokens of one corpus, laid end to end."""
        return Tokens(self.manifests[name], "train")

    def validation(self, name: str) -> Rows:
        """The held-out rows of one corpus, in order."""
        return self._valid[name]

    def realised(self, steps: int) -> dict[str, float]:
        """The share of rows that each corpus has given in the first `steps` steps."""
        given = self.training().given(steps * self._config.batch)
        return {name: count / max(1, sum(given)) for name, count in zip(self.manifests, given, strict=True)}
