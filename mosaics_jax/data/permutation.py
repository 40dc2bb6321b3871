"""A permutation that is computed and not stored, and the keys that tell one from another.

The order of rows and of documents must be the same on every machine and with every version of every library, for
lengths past 2**32; so it is arithmetic of our own.
"""

import hashlib
import json
from typing import Any

import numpy as np

_ROUNDS = 8


def permutation_key(*parts: Any) -> np.ndarray:
    """Round keys [8] uint64 from strings and integers; different parts give unrelated permutations."""
    return np.frombuffer(hashlib.sha512(json.dumps(parts).encode()).digest(), "<u8")


def permute(index: np.ndarray, length: int, key: np.ndarray) -> np.ndarray:
    """Places of `index` (any shape, integers in [0, length)) under the permutation of [0, length) named by `key`.

    A Feistel network of 8 rounds permutes the least power of four that holds `length`; what falls outside is sent
    through again until it falls inside, which it does after fewer than four times on average. O(1) memory.
    """
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)

    def network(value: np.ndarray) -> np.ndarray:
        left, right = value >> half, value & low
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mixed(right + key[number]) & low)
        return left << half | right

    place = network(np.atleast_1d(index).astype(np.uint64))
    while (outside := place >= np.uint64(length)).any():
        place[outside] = network(place[outside])
    return place.astype(np.int64).reshape(np.shape(index))


def _mixed(value: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit of `value` (the finaliser of splitmix64, Steele et al. 2014)."""
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return value ^ value >> np.uint64(31)
