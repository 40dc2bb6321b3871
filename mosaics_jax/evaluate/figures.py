"""Draws a figure from its data, alone or beside another model's of the same name."""

import io
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from mosaics_jax import whole

_COLOURS = ("#1f5aa6", "#c8442f", "#3d8b4f", "#8a5aa8", "#b8862b", "#4a9aa5", "#7d7d7d", "#d07aa2", "#222222")
_STYLES = ("-", "--", "-.", ":")
_MOST_INSIDE = 5  # curves of which the legend stands among them


def draw(data: Mapping[str, Any], path: pathlib.Path, other: Mapping[str, Any] | None = None) -> None:
    """Writes a PNG. `other` is the same figure of another model: its curves are dashed, its map stands to the right."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["text.parse_math"] = False  # a name may hold a $
    import matplotlib.pyplot as plt

    both = [data] if other is None else [data, other]
    if data["kind"] == "lines":
        many = sum(len(one["series"]) for one in both) > _MOST_INSIDE
        figure, axes = plt.subplots(figsize=(8.4 if many else 6.4, 4), layout="constrained")
        _draw_lines(axes, both)
        if many:
            figure.legend(fontsize=8, loc="outside right upper")
        else:
            axes.legend(fontsize=8)
    else:
        figure, panels = plt.subplots(1, len(both), figsize=(6.4 * len(both), 3.6), layout="constrained", squeeze=False)
        for axes, one in zip(panels[0], both, strict=True):
            _draw_heatmap(figure, axes, one)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    whole.write(path, buffer.getvalue())


def check(data: Any) -> None:
    """Raises ValueError where this is no figure's data that `draw` can draw, as of a file that is damaged."""
    try:
        texts = [data["title"], data["x"], data["y"]]
        if data["kind"] == "lines":
            for series in data["series"]:
                texts.append(series["label"])
                x, y, error = series["x"], series["y"], series.get("error")
                error = y if error is None else error
                if not len(x) == len(y) == len(error):
                    raise ValueError(f"the curve {series['label']!r} has lists of several lengths")
                _check_numbers([*x, *y, *error])
                if series.get("style", "-") not in _STYLES or not isinstance(series.get("colour", 0), int):
                    raise ValueError(f"the curve {series['label']!r} has another style or colour than it may")
            marks, levels = data.get("marks", {}), data.get("levels", {})
            texts += [*marks.values(), *levels]
            _check_numbers([*map(float, marks), *levels.values()])
        elif data["kind"] == "heatmap":
            rows = data["values"]
            if len(rows) != len(data["rows"]) or any(len(row) != len(data["columns"]) for row in rows):
                raise ValueError("the map has another number of values than rows and columns")
            _check_numbers([value for row in rows for value in row if value is not None])
        else:
            raise ValueError(f"the kind is {data['kind']!r}; legal: lines, heatmap")
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"{wrong[0]!r} stands where a text is legal")
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__} {error}") from error


def _check_numbers(values: Iterable[Any]) -> None:
    if wrong := [value for value in values if isinstance(value, bool) or not isinstance(value, int | float)]:
        raise ValueError(f"{wrong[0]!r} stands where a number is legal")


def _draw_lines(axes: Any, both: list[Mapping[str, Any]]) -> None:
    for number, data in enumerate(both):
        for place, series in enumerate(data["series"]):
            name = f"{series['label']} ({data['model']})" if "model" in data else series["label"]
            colour = _COLOURS[series.get("colour", place) % len(_COLOURS)]
            axes.errorbar(
                series["x"], series["y"], series.get("error"), label=name, color=colour,
                linestyle="--" if number else series.get("style", "-"), linewidth=2.4 if series.get("main") else 1.2,
                marker="o", markersize=3, capsize=2,
            )  # fmt: skip
    data = both[0]
    axes.set(title=data["title"], xlabel=data["x"], ylabel=data["y"])
    if data.get("log_x"):
        axes.set_xscale("log", base=2)
    if data.get("log_y"):
        axes.set_yscale("log")
    for place, label in data.get("marks", {}).items():
        axes.axvline(float(place), color="#999999", linewidth=1, linestyle=":")
        axes.annotate(label, (float(place), 1), xycoords=("data", "axes fraction"), fontsize=8, va="top", rotation=90)
    for label, level in data.get("levels", {}).items():
        axes.axhline(level, color="#999999", linewidth=1, linestyle=":", label=label)
    axes.grid(alpha=0.25)


def _draw_heatmap(figure: Any, axes: Any, data: Mapping[str, Any]) -> None:
    values = [[float("nan") if value is None else value for value in row] for row in data["values"]]
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="upper")
    axes.set_xticks(range(len(data["columns"])), [str(column) for column in data["columns"]])
    axes.set_yticks(range(len(data["rows"])), [str(row) for row in data["rows"]])
    title = f"{data['title']} ({data['model']})" if "model" in data else data["title"]
    axes.set(title=title, xlabel=data["x"], ylabel=data["y"])
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value == value:
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color="w" if value < 0.6 else "k")
    figure.colorbar(image, ax=axes, label="score")
