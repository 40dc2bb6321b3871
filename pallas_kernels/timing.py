"""Timing of compiled functions for the benchmarks: interleaved runs and medians, so that drift hits all alike."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax


def interleaved(calls: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds of every call in every round, after one warm-up each; the calls take turns."""
    for call in calls:
        jax.block_until_ready(call())
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for record, call in zip(seconds, calls, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            record.append(time.perf_counter() - start)
    return seconds


def median_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Median over rounds of first / second, each pair measured one after the other."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))
