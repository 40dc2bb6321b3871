"""Pictures of a `Look`. matplotlib is imported when one is drawn.

Every function returns its figure, and no window is opened: a notebook shows it as the value of a cell.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mosaics_jax.explore.look import Look, answered, weight_by_distance

_COLOURS = ("#1f5aa6", "#c8442f", "#3d8b4f", "#8a5aa8", "#b8862b", "#4a9aa5", "#7d7d7d", "#d07aa2")
_MOST_TICKS = 120
_WORTH_A_WORD = 0.1  # of the heaviest answer's weight
_FAINTEST = 1e-4  # of the greatest weight: far from the text's beginning a mean is of few reads, and may be tiny


def plot_weight_by_distance(look: Look, memories: Sequence[str] | None = None, longest: int | None = None) -> Any:
    """Mean weight against distance, on a logarithmic scale: a thin line for each head, a thick one for each memory."""
    figure, (axes,) = _figure(1, (7, 4))
    greatest = 0.0
    for number, memory in enumerate(look.config.memories if memories is None else memories):
        share_LHN = weight_by_distance(look, memory, longest)
        colour = _COLOURS[number % len(_COLOURS)]
        for share_N in share_LHN.reshape(-1, share_LHN.shape[-1]):
            axes.plot(share_N, color=colour, linewidth=0.7, alpha=0.3)
        greatest = max(greatest, np.nanmax(share_LHN, initial=0))
        axes.plot(share_LHN.mean((0, 1)), color=colour, linewidth=2.2, label=memory)
    axes.set(xlabel="distance t - s, tokens", ylabel="mean weight", yscale="log", title="Where reads look")
    if greatest:
        axes.set_ylim(_FAINTEST * greatest, 2 * greatest)
    axes.legend()
    return figure


def plot_along_text(
    look: Look, layer: int, memory: str, labels: Sequence[str] | None = None, row: int = 0,
    first: int = 0, stop: int | None = None,
) -> Any:  # fmt: skip
    """Bandwidth, gate and decay of every head at the positions [first, stop) of a text; `labels` are its tokens."""
    panels = {
        "bandwidth β": look.bandwidth(layer, memory),
        "gate g": look.gate(layer, memory),
        "decay λ": look.decay(layer, memory),
    }
    labels = _labels(look, labels, row)[first:stop]
    figure, all_axes = _figure(3, (max(6.0, min(0.16 * len(labels), 20)), 6))
    for axes, (name, number_BTH) in zip(all_axes, panels.items(), strict=True):
        for head in range(number_BTH.shape[2]):
            colour = _COLOURS[head % len(_COLOURS)]
            axes.plot(
                np.arange(first, first + len(labels)), number_BTH[row, first:stop, head],
                color=colour, marker=".", markersize=4, linewidth=1, label=f"head {head}",
            )  # fmt: skip
        axes.set_ylabel(name)
        axes.grid(alpha=0.25)
        axes.margins(x=0.01)
    all_axes[0].set_title(f"layer {layer}, {memory}-term memory")
    all_axes[0].legend(fontsize=8)
    all_axes[1].set_yscale("log")
    all_axes[2].set_ylim(-0.05, 1.05)
    _ticks(all_axes[-1], first, labels)
    return figure


def plot_answer(
    look: Look, layer: int, memory: str, head: int, position: int, labels: Sequence[str] | None = None, row: int = 0,
    first: int = 0,
) -> Any:  # fmt: skip
    """The weight of every stored token from `first` on in the read at `position`; the heaviest with what followed."""
    answers = answered(look, layer, memory, head, position, top=position + 1, row=row)
    answers = [answer for answer in answers if answer.stored >= first]
    all_labels = _labels(look, labels, row)
    labels = all_labels[first : position + 1]
    figure, (axes,) = _figure(1, (max(6.0, min(0.16 * len(labels), 20)), 3.2))
    axes.bar([a.stored for a in answers], [a.weight for a in answers], color=_COLOURS[0], width=0.8)
    axes.axvline(position, color=_COLOURS[1], linewidth=1.2)
    for answer in (answer for answer in answers[:3] if answer.weight > _WORTH_A_WORD * answers[0].weight):
        after = "nothing yet" if answer.stored == position else all_labels[answer.stored + 1]
        axes.annotate(
            f"then {after}", (answer.stored, answer.weight), xytext=(0, 3), textcoords="offset points",
            ha="center", fontsize=8,
        )  # fmt: skip
    axes.set(ylabel="weight", title=f"Who answers {all_labels[position]} (red): layer {layer}, {memory}, head {head}")
    axes.margins(x=0.01, y=0.15)
    _ticks(axes, first, labels)
    return figure


def _figure(panels: int, size: tuple[float, float]) -> tuple[Any, Any]:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ValueError(
            "matplotlib is not installed; the plots need it: pip install 'mosaics_jax[notebooks]'"
        ) from error
    figure, axes = plt.subplots(panels, 1, figsize=size, sharex=True, squeeze=False, layout="constrained")
    plt.close(figure)  # else a notebook would show it twice
    return figure, axes[:, 0]


def _labels(look: Look, labels: Sequence[str] | None, row: int) -> list[str]:
    tokens_T = look.tokens_BT[row]
    if labels is None:
        return [str(token) for token in tokens_T]
    if len(labels) != len(tokens_T):
        raise ValueError(f"{len(labels)} labels; legal: one for each of the {len(tokens_T)} tokens")
    # A dollar would begin a formula.
    return [label.replace("$", r"\$") for label in labels]


def _ticks(axes: Any, first: int, labels: Sequence[str]) -> None:
    """Tokens below the picture, as many as can be read."""
    every = -(-len(labels) // _MOST_TICKS)
    axes.set_xticks(range(first, first + len(labels), every), labels[::every], fontsize=8, family="monospace")
