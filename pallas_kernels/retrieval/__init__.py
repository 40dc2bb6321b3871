"""Gaussian-kernel retrieval over intervals of stored pairs."""

from pallas_kernels.retrieval.api import describe, retrieve

__all__ = ["describe", "retrieve"]
