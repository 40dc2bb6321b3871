"""Gated leaky average of keys, normalised: the recurrence of the key extractor (PAPER eq. 8)."""

from pallas_kernels.leaky_average.api import LeakyState, leaky_average

__all__ = ["LeakyState", "leaky_average"]
