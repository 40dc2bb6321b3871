"""Gaussian-kernel retrieval over intervals of stored pairs."""

from pallas_kernels.retrieval.api import retrieve

__all__ = ["retrieve"]
