"""What is written of an evaluation: tables in markdown and JSON, figures as PNG with their data in JSON beside them."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mosaics_jax import whole


class Table(NamedTuple):
    """A table; cells are numbers, text, or None where nothing was measured."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Figure(NamedTuple):
    """A figure's data, from which alone it is drawn (`figures.draw`)."""

    name: str
    data: Mapping[str, Any]


class Report(NamedTuple):
    tables: Sequence[Table]
    figures: Sequence[Figure]
    notes: Sequence[str] = ()


def lines(title: str, x: str, y: str, series: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """The data of curves: each series has a label, x, y and, where known, error (one standard error).

    A series that is `main` is drawn thicker; it may have a `colour` (a number, else its place) and a `style` of line.
    """
    return {"kind": "lines", "title": title, "x": x, "y": y, "series": list(series), **more}


def heatmap(
    title: str, x: str, y: str, columns: Sequence, rows: Sequence, values: Sequence[Sequence]
) -> dict[str, Any]:
    """The data of a map: values[row][column], each in [0, 1] or None."""
    return {
        "kind": "heatmap", "title": title, "x": x, "y": y, "columns": list(columns), "rows": list(rows),
        "values": [list(row) for row in values],
    }  # fmt: skip


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN for a single value."""
    if len(values) < 2:
        return math.nan
    return math.sqrt(math.fsum((value - mean(values)) ** 2 for value in values) / (len(values) - 1) / len(values))


def percent(values: Sequence[float]) -> str:
    """The mean of values in [0, 1], in percent, with its standard error."""
    return f"{100 * mean(values):.1f}" + (f" ± {100 * standard_error(values):.1f}" if len(values) > 1 else "")


def curve(label: str, x: Sequence[float], values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A series of `lines`: at each x the mean of its values, with the standard error."""
    error = [standard_error(of) if len(of) > 1 else 0.0 for of in values]
    return {"label": label, "x": list(x), "y": [mean(of) for of in values], "error": error}


def save(report: Report, directory: pathlib.Path, suite: str, about: Mapping[str, Any]) -> list[pathlib.Path]:
    """Writes <suite>.json, <suite>.md, and for every figure NAME.json and NAME.png; returns those. Raises OSError."""
    from mosaics_jax.evaluate import figures

    directory.mkdir(parents=True, exist_ok=True)
    body = {
        "suite": suite,
        "about": dict(about),
        "notes": list(report.notes),
        "tables": [table._asdict() for table in report.tables],
        "figures": [figure.name for figure in report.figures],
    }
    written = [directory / f"{suite}.json", directory / f"{suite}.md"]
    whole.write(written[0], (json.dumps(body, indent=1) + "\n").encode())
    whole.write(written[1], markdown(report, suite, about).encode())
    for figure in report.figures:
        paths = [directory / f"{figure.name}.json", directory / f"{figure.name}.png"]
        whole.write(paths[0], (json.dumps(figure.data, indent=1) + "\n").encode())
        figures.draw(figure.data, paths[1])
        written += paths
    return written


def markdown(report: Report, suite: str, about: Mapping[str, Any]) -> str:
    text = [f"# {suite}", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    for table in report.tables:
        text += [f"## {table.title}", ""] if table.title else []
        text += ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
        text += ["| " + " | ".join(map(_cell, row)) + " |" for row in table.rows]
        text += [""]
    text += [line for note in report.notes for line in (note, "")]
    text += [line for figure in report.figures for line in (f"![{figure.name}]({figure.name}.png)", "")]
    return "\n".join(text)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
