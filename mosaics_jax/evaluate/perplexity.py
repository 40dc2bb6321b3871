"""Held-out loss by position in the document, and of the same tokens from contexts of several lengths.

Documents of at least the greatest length are read from their beginning, so every curve is of the same documents:

- by position: how much a token's loss falls the more of its document has been read; beyond the training length it shows
  what a model does with more than it was trained on.
- by context: the last tokens of each stretch, read with the last L tokens before them only. A stretch inside a document
  begins with the begin token, as a document cut by a row's end does not; the difference is that one token.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mosaics_jax.data.corpus import Manifest, document_ends
from mosaics_jax.data.source import Tokens
from mosaics_jax.evaluate import report, suite
from mosaics_jax.evaluate.model import Model

_TAIL = 256  # tokens whose loss is compared between contexts
_NATS = 1 / math.log(2)


def long_documents(manifest: Manifest, tokens: int, count: int, seed: int) -> list[int]:
    """Where `count` held-out documents of at least `tokens` tokens start: the first of a permutation by seed."""
    ends = document_ends(manifest, "valid")
    starts = np.concatenate([[0], ends[:-1]])
    long = np.flatnonzero(ends - starts >= tokens)
    return [int(starts[i]) for i in np.random.default_rng(seed).permutation(long)[:count]]


class Perplexity:
    name = "perplexity"

    def __init__(self, manifest: Manifest, lengths: Sequence[int], *, count: int = 16, seed: int = 0, context: int = 0):
        """The first `count` held-out documents that have max(lengths) tokens, in the order of a permutation by seed.

        `context` is the length the model was trained on, marked in the figures. ValueError if no document is so long.
        """
        self._lengths, self._context = sorted(lengths), context
        self._bytes_per_token = manifest.split("valid").bytes_per_prediction
        self._tokens = Tokens(manifest, "valid")
        self._begin = manifest.begin
        if self._lengths[0] <= 1:
            raise ValueError(f"--lengths has {self._lengths[0]}; legal: 2 or more")
        self._starts = long_documents(manifest, self._lengths[-1] + 1, count, seed)
        if not self._starts:
            sizes = np.diff(document_ends(manifest, "valid"), prepend=0)
            raise ValueError(
                f"no held-out document of {str(manifest.directory)!r} has {self._lengths[-1]} tokens and one more; the "
                f"longest has {int(sizes.max(initial=0))}: take shorter --lengths, or a corpus of longer documents"
            )

    def __len__(self) -> int:
        return len(self._starts) * len(self._lengths)

    def examples(self) -> Iterator[suite.Example]:
        """For each length, each document's tokens up to the greatest length, the last L of them."""
        most = self._lengths[-1]
        for length in self._lengths:
            for start in self._starts:
                ids = self._tokens.read(start + most - length, length + 1)
                ids[0] = self._begin
                # The tokens before are not read, but decide which ones are.
                yield suite.Example(f"{start} {length} of {most} {suite.digest(ids.tobytes().hex())}", length, ids)

    def answer(self, model: Model, batch: Sequence[suite.Example]) -> list[dict[str, Any]]:
        answers = []
        for example, losses in zip(batch, model.losses([example.payload for example in batch]), strict=True):
            loss_T = losses.loss_T.astype(np.float64)
            record: dict[str, Any] = {"length": example.length, "tail": float(loss_T[-_TAIL:].mean()), "bins": None}
            if example.length == self._lengths[-1]:
                record["bins"] = [float(loss_T[first:stop].mean()) for first, stop in self.bins()]
            answers.append(record)
        return answers

    def bins(self) -> list[tuple[int, int]]:
        """Positions [first, stop): 0, 1, 2 and 3, 4 to 7, ... by powers of two, the later ones halved for detail."""
        edges = [0, 1]
        while edges[-1] < self._lengths[-1]:
            last = edges[-1]
            edges += [last + last // 2, 2 * last] if last >= 64 else [2 * last]
        edges = [edge for edge in edges if edge < self._lengths[-1]] + [self._lengths[-1]]
        return list(itertools.pairwise(edges))

    def report(self, records: Sequence[dict[str, Any]]) -> report.Report:
        whole = [record["bins"] for record in records if record["bins"] is not None]
        places = [(first, stop, [bins[place] for bins in whole]) for place, (first, stop) in enumerate(self.bins())]
        tails = [[r["tail"] for r in records if r["length"] == length] for length in self._lengths]
        by_position = [
            [f"{first:,} to {stop - 1:,}", report.mean(losses), *self._bits(losses)] for first, stop, losses in places
        ]
        by_context = [[f"{n:,}", report.mean(of), *self._bits(of)] for n, of in zip(self._lengths, tails, strict=True)]
        about = f"{len(self._starts)} held-out documents of at least {self._lengths[-1]:,} tokens"
        marks = {str(self._context): "trained length"} if self._context else {}
        units = ["nats a token", "bits per byte", "perplexity"]
        first = report.curve("loss", [math.sqrt(max(1, a) * b) for a, b, _ in places], [of for *_, of in places])
        second = report.curve(f"last {_TAIL} tokens", self._lengths, tails)
        return report.Report(
            [
                report.Table(f"Loss by position: {about}", ["positions", *units], by_position),
                report.Table(f"Loss of the same last {_TAIL} tokens by context", ["context", *units], by_context),
            ],
            [
                report.Figure("perplexity_position", report.lines(
                    "Loss by position in the document", "position, tokens", "nats a token", [first], log_x=True,
                    marks=marks)),
                report.Figure("perplexity_context", report.lines(
                    "Loss of the same tokens by context", "tokens of context", "nats a token", [second], log_x=True,
                    marks=marks)),
            ],
        )  # fmt: skip

    def _bits(self, losses: Sequence[float]) -> tuple[float, float]:
        middle = report.mean(losses)
        return middle * _NATS / self._bytes_per_token, math.exp(min(middle, 700))
