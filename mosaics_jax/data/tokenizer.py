"""Text to token ids and back, exactly.

A tokenizer encodes ordinary text only: the characters `<|begin_of_text|>` in a document are characters. The two ids
that mark a document's ends are placed by `prepare`, never by `encode`.
"""

import functools
import hashlib
import itertools
import os
import pathlib
import re
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import tiktoken
import tokenizers

from mosaics_jax import paths, whole
from mosaics_jax.data import files
from mosaics_jax.data.bpe import SPLIT, Report, pieces, ranks_from_bytes, ranks_to_bytes, train_ranks

BEGIN_TEXT = "<|begin_of_text|>"
END_TEXT = "<|end_of_text|>"
LEGAL_SPECS = (
    "bytes; bpe:N (a byte-level BPE of N ids, trained on the texts); the tokenizer/ folder of a prepared corpus; "
    "the path of a Hugging Face tokenizer.json; "
    "the path of a Llama-3 tokenizer.model"
)
DESCRIPTOR = "tokenizer_config.json"
_FORMAT = 1
_LLAMA3_SPECIALS = 256
_BPE_SPECIALS = 2
_MOST_BPE = 1 << 20  # training one takes memory for so many


class Tokenizer(Protocol):
    """What the rest of the package knows of a tokenizer.

    Attributes:
      kind: bytes, bpe, llama3 or huggingface.
      vocabulary: number of ids, specials included; every id is in [0, vocabulary).
      begin, end: ids that open and close a document; `encode` never returns them.
      fingerprint: sha256 of everything that decides the ids.
      divisible: a text cut at `bpe.SAFE_CUT` has the same ids as the whole.
    """

    kind: str
    divisible: bool
    vocabulary: int
    begin: int
    end: int
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Token ids [N] int32 of ordinary text; nothing is added at the ends."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; specials are dropped, broken UTF-8 becomes U+FFFD. ValueError for an id out of range."""

    def save(self, directory: str | pathlib.Path) -> None:
        """Writes what `load_tokenizer` needs into `directory`, which is made if absent."""


class ByteTokenizer:
    """An id is a byte of the text's UTF-8; 256 and 257 open and close a document."""

    kind = "bytes"
    divisible = True
    vocabulary = 258
    begin = 256
    end = 257
    fingerprint = hashlib.sha256(b"utf-8 bytes, begin 256, end 257").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_checked_text(text), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        array = _checked_ids(ids, self.vocabulary)
        return array[array < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def save(self, directory: str | pathlib.Path) -> None:
        _write_descriptor(self, directory)


class RankTokenizer:
    """Byte-level BPE given by the rank of every byte string, run by tiktoken (`kind` bpe or llama3).

    Ids: the ranks first, then the specials, of which the first two open and close a document.
    """

    FILE = "ranks.tiktoken"
    divisible = True

    def __init__(self, ranks: dict[bytes, int], kind: str):
        specials = {"bpe": _BPE_SPECIALS, "llama3": _LLAMA3_SPECIALS}[kind]
        self.kind = kind
        self._ranks = ranks
        self.begin = len(ranks)
        self.end = self.begin + 1
        self.vocabulary = self.begin + specials
        self.fingerprint = hashlib.sha256(f"{SPLIT} {specials}\n".encode() + ranks_to_bytes(ranks)).hexdigest()
        self._encoding = tiktoken.Encoding(
            kind, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={BEGIN_TEXT: self.begin, END_TEXT: self.end}
        )

    def encode(self, text: str) -> np.ndarray:
        _checked_text(text)
        encode = functools.partial(self._encoding.encode_to_numpy, allowed_special=set(), disallowed_special=())
        return np.concatenate([np.zeros(0, np.uint32), *map(encode, pieces(text))]).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        array = _checked_ids(ids, self.vocabulary)
        return self._encoding.decode_bytes(array[array < self.begin].tolist()).decode("utf-8", errors="replace")

    def save(self, directory: str | pathlib.Path) -> None:
        _write_descriptor(self, directory)
        whole.write(pathlib.Path(directory) / self.FILE, ranks_to_bytes(self._ranks))


class HuggingFaceTokenizer:
    """A `tokenizer.json`, whose text is kept as it came. Missing begin and end specials are added after the last id."""

    FILE = "tokenizer.json"
    kind = "huggingface"
    divisible = False
    begin: int
    end: int

    def __init__(self, definition: str):
        """ValueError if `definition` is not the text of a tokenizer.json."""
        try:
            inner = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not a Hugging Face tokenizer.json: {error}") from error
        self._definition = definition
        inner.no_truncation()
        inner.no_padding()
        # Also marks them special where the file has them as plain words, so that `encode` treats them as text.
        inner.add_special_tokens(
            [tokenizers.AddedToken(t, special=True, normalized=False) for t in (BEGIN_TEXT, END_TEXT)]
        )
        inner.encode_special_tokens = True
        self._inner = inner
        ids = inner.get_vocab(with_added_tokens=True)
        self.begin, self.end, self.vocabulary = ids[BEGIN_TEXT], ids[END_TEXT], max(ids.values()) + 1
        self.fingerprint = hashlib.sha256(definition.encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        _checked_text(text)
        try:
            return np.asarray(self._inner.encode(text, add_special_tokens=False).ids, np.int32)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"the tokenizer.json cannot encode {reprlib.repr(text)}: {error}") from error

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._inner.decode(_checked_ids(ids, self.vocabulary).tolist(), skip_special_tokens=True)

    def save(self, directory: str | pathlib.Path) -> None:
        _write_descriptor(self, directory)
        whole.write(pathlib.Path(directory) / self.FILE, self._definition.encode())


def make_tokenizer(spec: str, texts: Iterable[str] = (), report: Report = lambda what, done, total: None) -> Tokenizer:
    """The tokenizer that `spec` names (`LEGAL_SPECS`).

    `texts` is read for `bpe:N` only, and of it no more than the first 50 MB; `report` is as of `train_ranks`.
    Raises ValueError for a bad spec, an unreadable file, or too little text to find N ids in.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith("bpe:"):
        size = spec.removeprefix("bpe:")
        if not re.fullmatch("[0-9]{1,9}", size) or not 256 + _BPE_SPECIALS <= int(size) <= _MOST_BPE:
            raise ValueError(
                f"tokenizer is {spec!r}; in bpe:N, N is an integer from {256 + _BPE_SPECIALS} to {_MOST_BPE}"
            )
        ranks = train_ranks(int(size) - _BPE_SPECIALS, texts, report)
        if (found := len(ranks) + _BPE_SPECIALS) < int(size):
            raise ValueError(f"tokenizer is {spec!r}, but these texts hold only {found} ids; use bpe:{found} or fewer")
        return RankTokenizer(ranks, "bpe")
    path = paths.absolute(spec) if spec else pathlib.Path()
    if spec and os.path.isdir(path):
        return load_tokenizer(path)
    if not os.path.isfile(path):  # False also for what can be no path
        raise ValueError(f"tokenizer is {spec!r}, which is no file; legal: {LEGAL_SPECS}")
    try:
        if path.suffix == ".json":
            return HuggingFaceTokenizer(path.read_bytes().decode())
        return RankTokenizer(ranks_from_bytes(path.read_bytes()), "llama3")
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer file {spec!r}: {error}") from error


def load_tokenizer(directory: str | pathlib.Path) -> Tokenizer:
    """Restores what `save` wrote. ValueError if the directory holds no tokenizer, or one that was changed since."""
    path = pathlib.Path(directory) / DESCRIPTOR
    try:
        described = whole.opened(whole.load_json(path))
        kind = described.get("kind")
        if described.get("format") != _FORMAT:
            raise ValueError(f"format {described.get('format')!r}, this version reads {_FORMAT}")
        made: Tokenizer
        if kind == "bytes":
            made = ByteTokenizer()
        elif kind == "huggingface":
            path = path.with_name(HuggingFaceTokenizer.FILE)
            made = HuggingFaceTokenizer(path.read_bytes().decode())
        elif kind in ("bpe", "llama3"):
            path = path.with_name(RankTokenizer.FILE)
            made = RankTokenizer(ranks_from_bytes(path.read_bytes()), kind)
        else:
            raise ValueError(f"unknown kind {kind!r}")
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename!r} is missing; a tokenizer's folder is written by Tokenizer.save") from error
    except OSError as error:
        raise files.cannot_read(error.filename or path, error, "restore it from a copy") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} does not describe a tokenizer: {reason}") from error
    for name, value in _described(made).items():
        if described.get(name) != value:
            raise ValueError(
                f"the tokenizer in {str(path.parent)!r} is not the one that was saved there: its {name} is {value!r}, "
                f"{DESCRIPTOR} says {reprlib.repr(described.get(name))}; prepare again"
            )
    return made


def continuation(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, before: np.ndarray | None = None) -> str:
    """The text of `ids` as it follows the ids `before`; None: some letter.

    Both are decoded together, and the text is what they have more than `before` alone: a tokenizer.json may drop the
    space that a text begins with, and a character may lie in the ids of both.
    """
    before = tokenizer.encode("a") if before is None else before
    whole, known = tokenizer.decode(np.concatenate([before, ids]).astype(np.int64)), tokenizer.decode(before)
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(whole, known, strict=False))
    return whole[sum(1 for _ in shared) :]


def _checked_text(text: str) -> bytes:
    """The UTF-8 of `text`. ValueError for what is no text: another type, or half of a surrogate pair."""
    if not isinstance(text, str):
        raise ValueError(f"a text is {reprlib.repr(text)}; legal: a str")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text {reprlib.repr(text)} has half of a surrogate pair, {text[error.start]!r}, at character "
            f"{error.start}; legal: what UTF-8 can write"
        ) from error


def _checked_ids(ids: Sequence[int] | np.ndarray, vocabulary: int) -> np.ndarray:
    array = np.asarray(ids, np.int64).reshape(-1)
    if array.size and not 0 <= array.min() <= array.max() < vocabulary:
        raise ValueError(f"token ids reach from {array.min()} to {array.max()}; legal: 0 to {vocabulary - 1}")
    return array


def _write_descriptor(tokenizer: Tokenizer, directory: str | pathlib.Path) -> None:
    path = pathlib.Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    whole.write_json(path / DESCRIPTOR, _described(tokenizer))


def _described(tokenizer: Tokenizer) -> dict[str, Any]:
    names = ("kind", "vocabulary", "begin", "end", "fingerprint")
    return {"format": _FORMAT} | {name: getattr(tokenizer, name) for name in names}
