"""What the GPU suite has measured, as JSON and as a markdown table; both are rewritten as the run goes on."""

import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

OUT_OF_TIME = "not measured: out of time"
READERS = ("hopper", "cudnn", "flex", "tokamax", "xla")  # the columns, beside which our kernels stand
AVERAGERS = ("hopper", "xla")
WHAT = ("forward", "forward + backward")
_NOT = "not measured"
Results = dict[str, Any]
Record = dict[str, Any]


class Report:
    """The two files of a run: `<device>-<date>.json` and `.md`, numbered where that date has some already."""

    def __init__(self, directory: pathlib.Path, results: Results):
        self.results = results
        device = re.sub(r"[^a-z0-9]+", "-", results["device"].lower()).strip("-")
        name = f"{device}-{results['date']}"
        self._stem, number = directory / name, 1
        while self._stem.with_name(self._stem.name + ".json").exists():
            number += 1
            self._stem = directory / f"{name}-{number}"

    def save(self) -> None:
        self._stem.parent.mkdir(parents=True, exist_ok=True)
        for suffix, text in ((".json", json.dumps(self.results, indent=1) + "\n"), (".md", markdown(self.results))):
            path = self._stem.with_name(self._stem.name + suffix)
            partial = path.with_name(path.name + ".partial")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)

    def __str__(self) -> str:
        return f"{self._stem}.md"


def markdown(results: Results) -> str:
    parts = [
        f"# GPU suite: {results['device']}, {results['date']}",
        f"jax {results['jax']}; {'quick run; ' if results['quick'] else ''}{results['seconds']:.0f} seconds in all.",
        _cases(results),
        _reads(results),
        _averages(results),
        _train(results),
        _checks(results),
        _failures(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def failures(results: Results) -> list[str]:
    """One line for everything that went wrong. What is not installed or was out of time did not go wrong."""
    lines = []
    for name, section in results["sections"].items():
        if section["state"].startswith("failed: "):
            lines.append(f"{name}: {section['state'].removeprefix('failed: ')}")
        ended = {record["name"] for record in _of(section, "case") if record["outcome"] != "started"}
        for record in section["records"]:
            kind = record["kind"]
            if kind == "error":
                lines.append(f"{name}: {record['message']}")
            elif kind == "case" and record["outcome"] == "failed":
                lines.append(f"{record['name']}: {record['message']}")
            elif kind == "case" and record["name"] not in ended:
                lines.append(f"{record['name']}: began and did not end")
            elif kind == "check" and not record["ok"]:
                lines.append(f"{record['by']}, {record['memory']}: wrong values, {record['errors']}")
            elif record.get("failed"):
                lines.append(f"{record['by']}, {_place(record)}: {record['missing']}")
    return lines


def _place(record: Record) -> str:
    return f"{record['memory']}, {record['rows']}, T = {record['time']:,}, {record['what']}"


def _of(section: Results, kind: str) -> list[Record]:
    return [record for record in section["records"] if record["kind"] == kind]


def _all(results: Results, kind: str) -> Iterator[Record]:
    for section in results["sections"].values():
        yield from _of(section, kind)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cases(results: Results) -> str:
    rows = []
    for name, section in results["sections"].items():
        if name.endswith("_cases"):
            outcomes = [record["outcome"] for record in _of(section, "case")]
            counts = [str(outcomes.count(outcome)) for outcome in ("passed", "failed", "skipped")]
            rows.append([name, *counts, section["state"].split(":")[0]])
    return "## Kernel cases against float64\n\n" + _table(["", "passed", "failed", "skipped", "state"], rows)


def _places(records: list[Record]) -> list[tuple[Any, ...]]:
    places = {(r["memory"], r["rows"], r["time"]) for r in records}
    return sorted(((*place, what) for place in places for what in WHAT), key=lambda place: (*place[:3], len(place[3])))


def _grid(records: list[Record], columns: tuple[str, ...], show: Callable[[Record], str]) -> str:
    """One line for each place, one column for each implementation; a missing figure says why."""
    found = {(r["memory"], r["rows"], r["time"], r["what"], r["by"]): r for r in records}
    rows = []
    for place in _places(records):
        memory, kind, time, what = place
        cells = []
        for by in columns:
            record = found.get((*place, by), {"missing": _NOT})
            missing = "failed" if record.get("failed") else record.get("missing")
            cells.append(missing or show(record))
        rows.append([memory, kind, f"{time:,}", what, *cells])
    return _table(["", "rows", "T", "", *columns], rows) if rows else _NOT.capitalize() + "."


def _reads(results: Results) -> str:
    figures = [r for r in _all(results, "figure") if r["memory"] != "recurrence"]
    kernels = list(_all(results, "kernels"))
    text = (
        "## `retrieve`: TFLOP/s on visible pairs (milliseconds)\n\n"
        "Forward 4 K FLOPs for each visible pair and head, backward 2.5 times that; medians of rounds of calls sent "
        "one after the other. Peers are timed for the attention alone: their inputs are made ready and rows that see "
        "nothing are mended outside the clock.\n\n"
    )
    text += _grid(figures, READERS, lambda r: f"{r['tflops']:.0f} ({r['milliseconds']:.3f} ms)")
    if kernels:
        text += "\n\nThe same by the device's own account: the kernels' times added up, gaps between them left out.\n\n"
        text += _grid(kernels, READERS, lambda r: f"{r['tflops']:.0f} ({r['milliseconds']:.3f} ms)")
    return text


def _averages(results: Results) -> str:
    figures = [r for r in _all(results, "figure") if r["memory"] == "recurrence"]
    text = "## `leaky_average`: share of the speed of a copy of the least bytes (milliseconds)\n\n"
    return text + _grid(figures, AVERAGERS, lambda r: f"{r['share']:.0%} ({r['milliseconds']:.3f} ms)")


def _train(results: Results) -> str:
    text = "## Train step of configs/small.py on one GPU\n\n"
    records = list(_all(results, "train"))
    if not records:
        return text + _NOT.capitalize() + "."
    rows = [[key.replace("_", " "), str(value)] for key, value in records[-1].items() if key != "kind"]
    return text + _table(["", ""], rows)


def _checks(results: Results) -> str:
    """Greatest error against float64, as a share of the greatest number or of 1."""
    names = ("output", "d_key", "d_value", "d_bandwidth")
    rows = []
    for record in _all(results, "check"):
        shown = (record["errors"].get(name, "") for name in names)
        cells = [f"{error:.1e}" if isinstance(error, float) else str(error) for error in shown]
        rows.append([record["by"], record["memory"], record.get("rows", ""), *cells, "yes" if record["ok"] else "NO"])
    head = ["", "", "rows", *names, "within bfloat16"]
    return "## Values of all that is timed\n\n" + _table(head, rows) if rows else ""


def _failures(results: Results) -> str:
    lines = failures(results)
    late = [name for name, section in results["sections"].items() if section["state"] == OUT_OF_TIME]
    text = "## Failed\n\n" + ("\n".join(f"- {' '.join(line.split())}" for line in lines) if lines else "Nothing.")
    return text + (f"\n\nOut of time: {', '.join(late)}." if late else "")
