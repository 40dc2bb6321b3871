"""Byte-level BPE: how text is split, how ranks are learned, and how they lie on disk."""

import base64
import binascii
import concurrent.futures
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator

import tokenizers

TRAINING_BYTES = 50_000_000
_TRIAL_BYTES = 1_000_000
_LONGEST_WORD = 1000
# What is reported of, and in which unit: bytes, seconds, seconds.
READING, TIMING, LEARNING = "reading for the tokenizer", "timing the tokenizer", "learning the tokenizer"
Report = Callable[[str, int, int], None]

# The split of Llama-3; our own BPE is trained under the same one.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tiktoken's regex engine overflows its stack in one run of some hundred thousand spaces, so long texts go in pieces.
# `SPLIT` always ends a word between a letter and a space, line end or full-width mark, and after a lone line end:
# cutting there changes no id. Only letters that every version of Unicode knows count: ASCII's, kana, Han and Hangul.
_PIECE = 100_000
_LETTER = "[A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3]"
SAFE_CUT = re.compile(rf"{_LETTER}(?=[ \r\n\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])|\S\r?\n(?=\S)")


def pieces(text: str) -> Iterator[str]:
    """Cuts `text` where no id changes; only in a run of more than 100,000 spaces (any whitespace) may ids differ."""
    start = 0
    while start < len(text):
        cut = SAFE_CUT.search(text, start + _PIECE)
        stop = cut.end() if cut else len(text)
        if stop - start > 2 * _PIECE:
            yield from _cut_long_space(text[start:stop])
        else:
            yield text[start:stop]
        start = stop


def _cut_long_space(text: str) -> Iterator[str]:
    start = 0
    for run in re.finditer(r"\s++", text):
        for cut in range(run.start() + _PIECE, run.end(), _PIECE):
            yield text[start:cut]
            start = cut
    yield text[start:]


def train_ranks(size: int, texts: Iterable[str], report: Report = lambda what, done, total: None) -> dict[bytes, int]:
    """Learns `size` ranks, or as many as there are to find, from the first 50 MB of `texts`. Deterministic.

    The merges are learned by tokenizers and meant for tiktoken, which gives the same ids several times faster. Words of
    more than 1,000 bytes (a genome is one) are cut there: learning takes the square of a word's length.

    Args:
      report: called at least every second with what is done, and how much of how much of it (0: not known).
    """
    held, taken = [], 0
    for text in texts:
        if taken >= TRAINING_BYTES:
            break
        held.append(text)
        taken += len(text.encode())
        report(READING, min(taken, TRAINING_BYTES), TRAINING_BYTES)
    with concurrent.futures.ThreadPoolExecutor(1, "tokenizer") as executor:

        def learn(what: str, texts: list[str], about: float) -> dict[bytes, int]:
            began, learning = time.monotonic(), executor.submit(_learn, size, texts)
            while not concurrent.futures.wait([learning], 1).done:
                seconds = time.monotonic() - began
                report(what, int(min(seconds, about) if about else seconds), int(about))
            return learning.result()

        about = 0.0
        if taken > _TRIAL_BYTES:
            first, size_of_first = _first_bytes(held)
            began = time.monotonic()
            learn(TIMING, first, 0)
            about = (time.monotonic() - began) * taken / size_of_first
        return learn(LEARNING, held, about)


def _learn(size: int, texts: list[str]) -> dict[bytes, int]:
    kinds = tokenizers.pre_tokenizers
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = kinds.Sequence(
        [
            kinds.Split(tokenizers.Regex(SPLIT), behavior="isolated"),
            kinds.ByteLevel(add_prefix_space=False, use_regex=False),
            kinds.FixedLength(length=_LONGEST_WORD),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=kinds.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    byte_of = _byte_of_character()
    return {bytes(byte_of[c] for c in token): rank for token, rank in inner.get_vocab().items()}


def _first_bytes(texts: list[str]) -> tuple[list[str], int]:
    """The first megabyte, of which the time of all is told, and its exact size."""
    found, taken = [], 0
    for text in texts:
        found.append(text[: _TRIAL_BYTES - taken])
        taken += len(found[-1].encode())
        if taken >= _TRIAL_BYTES:
            break
    return found, taken


def _byte_of_character() -> dict[str, int]:
    """Inverse of GPT-2's byte alphabet: printable bytes stand for themselves, the others for U+0100 onwards."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    shifted = itertools.count(256)
    return {chr(b if b in printable else next(shifted)): b for b in range(256)}


def ranks_to_bytes(ranks: dict[bytes, int]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(t), r) for t, r in sorted(ranks.items(), key=lambda item: item[1]))


def ranks_from_bytes(content: bytes) -> dict[bytes, int]:
    """Reads tiktoken's format, a line `base64 rank` for each id. ValueError says what is wrong with it."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"line {number} is not 'base64 rank', as in a Llama-3 tokenizer.model") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("its ranks are not 0, 1, 2, ..., each once")
    if any(bytes([b]) not in ranks for b in range(256)):
        raise ValueError("it lacks some of the 256 single bytes")
    return ranks
