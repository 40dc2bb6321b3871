"""Looking inside a model: which stored token answered, with how much weight, under which bandwidth, gate and decay."""

from mosaics_jax.explore.look import (
    Answer,
    Look,
    answered,
    kernel_regression,
    look,
    token_labels,
    weight_by_distance,
)
from mosaics_jax.explore.plots import plot_along_text, plot_answer, plot_weight_by_distance

__all__ = [
    "Answer",
    "Look",
    "answered",
    "kernel_regression",
    "look",
    "plot_along_text",
    "plot_answer",
    "plot_weight_by_distance",
    "token_labels",
    "weight_by_distance",
]
