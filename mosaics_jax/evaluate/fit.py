"""Prompts of a wanted length: as many parts as fit, found by bisection with the model's own tokenizer."""

from collections.abc import Callable

import numpy as np


def most_that_fit(least: int, most: int, limit: int, prompt: Callable[[int], np.ndarray]) -> tuple[int, np.ndarray]:
    """The greatest count in [least, most] for which `prompt(count)` has at most `limit` tokens, and that prompt.

    Longer for a greater count, give or take a few tokens: the result fits whatever the tokenizer does. ValueError if
    not even `least` fits.
    """
    best = prompt(least)
    if len(best) > limit:
        raise ValueError(f"the shortest prompt has {len(best)} tokens, and {limit} are free")
    low, high = least, most + 1  # `low` fits, `high` does not
    doubling = True  # so that no prompt is made that is much longer than the limit
    while high - low > 1:
        middle = min(2 * low + 1, high - 1) if doubling else (low + high) // 2
        ids = prompt(middle)
        if len(ids) <= limit:
            low, best = middle, ids
        else:
            high, doubling = middle, False
    return low, best
