"""Needles in a haystack: RULER's eight variants, scored by all references, by length and by depth.

Hsieh et al., *RULER*, 2024 (arXiv 2404.06654). A needle states a value for a key; the prompt asks for the values of
one or several keys. The score of an answer is the share of the references that it contains, case aside. Of the needles
that are asked for the first lies at a depth of a grid, in turn; the others lie anywhere.
"""

import random
import re
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mosaics_jax.data.tokenizer import Tokenizer
from mosaics_jax.evaluate import report, suite
from mosaics_jax.evaluate.fit import most_that_fit
from mosaics_jax.evaluate.model import Model
from mosaics_jax.evaluate.words import ADJECTIVES, NOUNS

NEW_TOKENS = 128
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_MOST_WORDS = 50
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_MANY = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{text}\n"
    "What are all the special magic {kind} for {keys} mentioned in the provided text? "
    "The special magic {kind} for {keys} mentioned in the provided text are"
)
_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{text}\n"
    "What is the special magic {kind} for {keys} mentioned in the provided text? "
    "The special magic {kind} for {keys} mentioned in the provided text is"
)


class Variant(NamedTuple):
    """What the haystack is made of (noise, text or needles), what keys and values are, and how many there are."""

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


VARIANTS = {
    "single_1": Variant("noise"),
    "single_2": Variant("text"),
    "single_3": Variant("text", value="uuids"),
    "multikey_1": Variant("text", keys=4),
    "multikey_2": Variant("needles"),
    "multikey_3": Variant("needles", key="uuids", value="uuids"),
    "multivalue": Variant("text", values=4),
    "multiquery": Variant("text", keys=4, queries=4),
}


def all_references(text: str, references: Sequence[str]) -> list[float]:
    """RULER's string_match_all, by reference: 1 where the text contains it, case aside."""
    return [float(reference.lower() in text.lower()) for reference in references]


class Needle:
    name = "needle"

    def __init__(
        self, tokenizer: Tokenizer, lengths: Sequence[int], haystack: str, *, count: int = 20, depths: int = 10,
        seed: int = 0, variants: Sequence[str] = tuple(VARIANTS),
    ):  # fmt: skip
        """`count` prompts of every variant and length; `haystack` is the text that needles are hidden in.

        ValueError for an unknown variant, an empty haystack, or a length that does not hold a variant's needles.
        """
        for variant in variants:
            if variant not in VARIANTS:
                raise ValueError(f"the needle variant {variant!r} is unknown; legal: {', '.join(VARIANTS)}")
        self._sentences = _sentences(haystack)
        if not self._sentences:
            raise ValueError("the haystack is an empty text")
        self._tokenizer, self._lengths, self._variants = tokenizer, sorted(lengths), tuple(variants)
        self._count, self._depths, self._seed = count, depths, seed
        for variant in self._variants:  # a length too short for one is known before others are answered
            self._example(variant, self._lengths[0], 0)

    def __len__(self) -> int:
        return len(self._variants) * len(self._lengths) * self._count

    def examples(self) -> Iterator[suite.Example]:
        for length in self._lengths:
            for name in self._variants:
                for index in range(self._count):
                    yield self._example(name, length, index)

    def _example(self, name: str, length: int, index: int) -> suite.Example:
        variant = VARIANTS[name]
        draw = random.Random(f"{self._seed} {name} {length} {index}")
        keys = _distinct(draw, variant.key, variant.keys)
        values = {key: _distinct(draw, variant.value, variant.values) for key in keys}
        asked = draw.sample(keys, variant.queries)
        # The first that is asked for lies on the grid; depths are shares of the haystack.
        pairs = [(key, value) for key in [*asked, *(k for k in keys if k not in asked)] for value in values[key]]
        grid = index % self._depths / max(1, self._depths - 1)
        depth = {pair: draw.random() if place else grid for place, pair in enumerate(pairs)}
        offset = draw.randrange(len(self._sentences))

        def text(units: int) -> str:
            return self._text(variant, units, depth, offset, draw_seed=f"{self._seed} {name} {length} {index} hay")

        single = variant.queries * variant.values == 1
        kind = variant.value.removesuffix("s") if single else variant.value
        names = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"

        def prompt(units: int) -> str:
            return (_ONE if single else _MANY).format(kind=kind, text=text(units), keys=names)

        try:
            units, ids = most_that_fit(
                1, length, length - NEW_TOKENS, lambda units: suite.row(self._tokenizer, prompt(units))
            )
        except ValueError as error:
            raise ValueError(f"needle {name} at --lengths={length}: {error}; take a longer one") from error
        references = [(pair, value) for pair in pairs for key, value in [pair] if key in asked]
        about = {
            "variant": name, "length": length, "index": index, "tokens": len(ids),
            "references": [value for _, value in references], "depths": [depth[pair] for pair, _ in references],
        }  # fmt: skip
        key = f"{name} {length} {index} {suite.digest(prompt(units), about)}"
        return suite.Example(key, len(ids) + NEW_TOKENS, (ids, about))

    def _text(
        self, variant: Variant, units: int, depth: dict[tuple[str, str], float], offset: int, draw_seed: str
    ) -> str:
        """The haystack of so many units, with the needles at their depths."""
        if variant.haystack == "noise":
            hay = [NOISE] * units
        elif variant.haystack == "text":
            hay = [self._sentences[(offset + place) % len(self._sentences)] for place in range(units)]
        else:
            draw, keys = random.Random(draw_seed), {key for key, _ in depth}
            hay = [_needle(variant, *pair) for pair in _distractors(draw, variant, keys, units)]
        for pair in sorted(depth, key=lambda pair: -depth[pair]):  # the last first: what is before it stays in place
            hay.insert(round(depth[pair] * units), _needle(variant, *pair))
        return (" " if variant.haystack == "text" else "\n").join(hay)

    def answer(self, model: Model, batch: Sequence[suite.Example]) -> list[dict[str, Any]]:
        texts = model.generate([example.payload[0] for example in batch], NEW_TOKENS)
        return [
            {**about, "answer": text, "hits": all_references(text, about["references"])}
            for text, (_, about) in zip(texts, (example.payload for example in batch), strict=True)
        ]

    def report(self, records: Sequence[dict[str, Any]]) -> report.Report:
        def scores(name: str, length: int) -> list[float]:
            return [report.mean(r["hits"]) for r in records if r["variant"] == name and r["length"] == length]

        rows: list[list[Any]] = [
            [name, *(report.percent(scores(name, length)) for length in self._lengths)] for name in self._variants
        ]
        means = [
            report.mean([report.mean(scores(name, length)) for name in self._variants]) for length in self._lengths
        ]
        rows.append(["mean of variants", *(f"{100 * value:.1f}" for value in means)])
        figures = [report.Figure(f"needle_{name}", self._map(name, records)) for name in self._variants]
        every = [report.Figure("needle_all", self._map(None, records))] if len(self._variants) > 1 else []
        table = report.Table("Share of the values found, in percent", ["variant", *map(str, self._lengths)], rows)
        return report.Report([table], [*every, *figures])

    def _map(self, name: str | None, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        last = max(1, self._depths - 1)
        found: dict[tuple[int, int], list[float]] = {}
        for record in records:
            if name in (None, record["variant"]):
                for depth, hit in zip(record["depths"], record["hits"], strict=True):
                    found.setdefault((round(depth * last), record["length"]), []).append(hit)
        values = [
            [report.mean(found[row, length]) if (row, length) in found else None for length in self._lengths]
            for row in range(self._depths)
        ]
        depths = [f"{100 * row / last:.0f}%" for row in range(self._depths)]
        title = f"Needle {name}" if name else "Needle, all variants"
        return report.heatmap(title, "length, tokens", "depth of the needle", self._lengths, depths, values)


def _sentences(text: str) -> list[str]:
    """The sentences of a text; what has no full stop for long is cut every so many words."""
    sentences = (sentence.split() for sentence in re.split(r"(?<=[.!?])\s+", text))
    return [
        " ".join(words[first : first + _MOST_WORDS])
        for words in sentences
        for first in range(0, len(words), _MOST_WORDS)
    ]


def _needle(variant: Variant, key: str, value: str) -> str:
    return _NEEDLE.format(kind=variant.value, key=key, value=value)


def _draw(draw: random.Random, kind: str) -> str:
    if kind == "numbers":
        return str(draw.randint(1000000, 9999999))
    if kind == "words":
        return f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def _distinct(draw: random.Random, kind: str, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_draw(draw, kind)] = None
    return list(found)


def _distractors(draw: random.Random, variant: Variant, keys: set[str], count: int) -> Iterator[tuple[str, str]]:
    while count:
        pair = _draw(draw, variant.key), _draw(draw, variant.value)
        if pair[0] not in keys:  # else the question would have another answer
            count -= 1
            yield pair
