"""Which documents are held out: by a hash of their text, so that equal ones are on one side, wherever they lie."""

import dataclasses
import fractions
import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from mosaics_jax.data.documents import Broken, Part

# A document is held out by the hash of so much of its beginning: the end of a long one is not known when it is written.
_HASHED_BYTES = 1 << 20
_HASHES = 1 << 64


@dataclasses.dataclass(frozen=True)
class Rule:
    """What decides it.

    Attributes:
      below: a document is held out where its hash, of 64 bits, is below this.
      cut: the byte of the only document near which it is cut in two, of which the second is held out; None cuts none.
    """

    below: int
    cut: int | None = None

    @classmethod
    def of_share(cls, share: float) -> "Rule":
        return cls(math.ceil(fractions.Fraction(share) * _HASHES))


class Piece(NamedTuple):
    """A part of a document, and where it goes; `ends`: with it a document of the input ends."""

    split: str
    part: Part
    hash: int
    ends: bool


def assigned(parts: Iterable[Part | Broken], rule: Rule) -> Iterator[Piece | Broken]:
    """The parts of documents in turn, with their splits. Empty documents are pieces of split ""."""
    split, number, place = "", 0, 0
    for part in parts:
        if isinstance(part, Broken):
            yield part
            continue
        if not split and not part.text:
            yield Piece("", part, 0, True)
            continue
        if not split:
            number, place = hash_of(part.utf8), 0
            split = "valid" if rule.cut is None and number < rule.below else "train"
        if rule.cut is not None and split == "train" and place + len(part.utf8) > rule.cut:
            at = _line_end(part.utf8, rule.cut - place)
            if at:
                yield Piece("train", _piece(part.utf8[:at], True), number, False)
                split, part = "valid", _piece(part.utf8[at:], part.last)
        place += len(part.utf8)
        yield Piece(split, part, number, part.last)
        if part.last:
            split = ""


def other_rule(share: float, documents: dict[str, int], size: int, hashes: tuple[int, int]) -> tuple[Rule, str] | None:
    """A rule that fills both splits where `share` leaves one empty, and what it does, in words; None if there is none.

    Args:
      documents: of each split.
      size: UTF-8 bytes of all.
      hashes: the least and the greatest of all documents.
    """
    least, greatest = hashes
    if sum(documents.values()) == 1 and size > 1:
        cut = min(max(1, round(size * (1 - share))), size - 1)
        so = f"so that about {1 - cut / size:.1%} is held out"
        return Rule(0, cut), f"there is one document: it is cut in two, at a line end if it has one, {so}"
    if least == greatest:
        return None
    at = f"by their hash at valid_fraction {share}"
    if not documents["valid"]:
        return Rule(least + 1), f"no document is held out {at}: the one of the least hash is"
    return Rule(greatest), f"all documents are held out {at}: the one of the greatest hash is not"


def hash_of(utf8: bytes) -> int:
    """64 bits of a document's hash; its beginning is enough."""
    return int.from_bytes(hashlib.sha256(utf8[:_HASHED_BYTES]).digest()[:8], "big")


def _piece(utf8: bytes, last: bool) -> Part:
    return Part(utf8.decode(), utf8, last)


def _line_end(utf8: bytes, at: int) -> int:
    """The place after the first line end from `at` on, else after the last before it, else a character's; 0: none."""
    at = min(max(at, 1), len(utf8) - 1)
    for found in (utf8.find(b"\n", at - 1, len(utf8) - 1), utf8.rfind(b"\n", 0, at)):
        if found >= 0:
            return found + 1
    while at and utf8[at] & 0xC0 == 0x80:
        at -= 1
    return at
