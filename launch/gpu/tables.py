"""What a run on a GPU has found, as markdown tables."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from launch.gpu import problem, suite
from launch.gpu.bundle.read import CARRIED, COMPILED
from launch.gpu.programs import WHAT

NOT = "not measured"
# The columns of the reads; ours with the bandwidths that the model has at first, and with a small constant one.
READERS = {
    "hopper": "ours, β of the model", "hopper, small bandwidth": "ours, β = 16", "cudnn": "cuDNN", "jla": "jla",
    "jax": "jax", "flex": "FlexAttention", "tokamax": "tokamax", "xla": "XLA path",
}  # fmt: skip
AVERAGERS = {"hopper": "ours", "xla": "XLA path"}
# Cells that no figure can fill, with the reason.
_NONE = {
    ("packed", "cudnn"): "unpacked only", ("packed", "jax"): "unpacked only", ("short-term", "jax"): "no window",
    ("forward + backward", "jax"): "no causal backward",
}  # fmt: skip
Results = dict[str, Any]
Record = dict[str, Any]
PLACES = [place for group in problem.places(problem.CARD).values() for place in group]


def markdown(results: Results) -> str:
    trial = "a trial on a CPU, interpreted; " if results["dry"] else ""
    packages = ", ".join(f"{name} {version}" for name, version in results["packages"].items())
    parts = [
        f"# {results['job']}: {results['device']}, {results['time'][:10]}",
        f"{trial}commit {results['commit']}; driver {results['driver']}; bundle: {results['bundle']}; {packages}; "
        f"{results['seconds']:.0f} seconds in all.",
        _failures(results),
        _parts(results),
        _canary(results),
        _reads(results, places_of(results)),
        _averages(results),
        _variants(results),
        _counters(results),
        _train(results),
        _steps(results),
        _cases(results),
        _checks(results),
        _programs(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def failures(results: Results) -> list[str]:
    """One line for everything that went wrong."""
    lines = []
    for name, part in results["parts"].items():
        if part["state"].startswith("failed: "):
            lines.append(f"{name}: {part['state'].removeprefix('failed: ')}")
        lines += suite.failures(name, part["records"])
    return lines


def not_reached(results: Results) -> list[str]:
    return [name for name, part in results["parts"].items() if part["state"] == suite.NOT_BEGUN]


def of(results: Results, kind: str) -> Iterator[Record]:
    for part in results["parts"].values():
        yield from (record for record in part["records"] if record["kind"] == kind)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(' '.join(cell.split()) for cell in line)} |" for line in lines)


def places_of(results: Results) -> list[problem.Place]:
    """Those of the suite, whether reached or not, and of a dry run its own."""
    setting = problem.DRY if results["dry"] else problem.CARD
    return [place for group in problem.places(setting).values() for place in group]


def _failures(results: Results) -> str:
    lines, late = failures(results), not_reached(results)
    text = "## Failed\n\n" + ("\n".join(f"- {' '.join(line.split())}" for line in lines) if lines else "Nothing.")
    if late:
        text += f"\n\nNot reached, for want of time: {', '.join(late)}."
    if results["broken"]:
        text += "\n\nKernels that were not run again:\n\n" + "\n".join(
            f"- {kernel}: {' '.join(why.split())}" for kernel, why in results["broken"].items()
        )
    return text


def _parts(results: Results) -> str:
    rows = []
    for name, part in results["parts"].items():
        loaded = [record["how"] for record in part["records"] if record["kind"] == "program"]
        rows.append(
            [name, part["state"].split(":")[0], f"{part['seconds']:.0f}", str(loaded.count(CARRIED)),
             str(loaded.count(COMPILED))]
        )  # fmt: skip
    return "## Parts\n\n" + table(["", "state", "seconds", "programs carried", "compiled here"], rows) if rows else ""


def _canary(results: Results) -> str:
    rows = [
        [r["kernel"], "yes" if r["ok"] else f"NO: {r['message']}", "yes" if r["same_bits"] else "no", _errors(r)]
        for r in of(results, "canary")
    ]
    head = ["kernel", "right", "same bits twice", "errors"]
    return "## Canary: each kernel by itself\n\n" + table(head, rows) if rows else ""


def _errors(record: Record) -> str:
    return ", ".join(f"{k} {v:.1e}" if isinstance(v, float) else f"{k} {v}" for k, v in record["errors"].items())


def grid(
    records: list[Record], places: list[problem.Place], columns: dict[str, str], show: Callable[[Record], str]
) -> str:
    """One line for each place, one column for each implementation; a missing figure says why."""
    found = {(r["memory"], r["rows"], r["time"], r["what"], r["by"]): r for r in records}
    rows = []
    for place in places:
        for what in WHAT:
            cells = []
            for by in columns:
                record = found.get((place.memory, place.rows, place.time, what, by))
                none = next(
                    (why for key, why in _NONE.items() if set(key) <= {place.memory, place.rows, what, by}), NOT
                )
                cells.append(none if record is None else record.get("missing") or show(record))
            rows.append([place.memory, place.rows, f"{place.time:,}", what, *cells])
    return table(["", "rows", "T", "", *columns.values()], rows)


def reads_grid(records: list[Record], places: list[problem.Place]) -> str:
    return grid(records, places, READERS, lambda r: f"{r['tflops']:.0f} ({r['milliseconds']:.3f} ms)")


def _reads(results: Results, places: list[problem.Place]) -> str:
    figures = [r for r in of(results, "figure") if r["memory"] != "recurrence"]
    if not figures:
        return ""
    return (
        "## `retrieve`: TFLOP/s on visible pairs (milliseconds)\n\n"
        "Forward 4 K FLOPs for each visible pair and head, backward 2.5 times that; medians of rounds of calls by "
        "turns in one process. Peers are timed for the attention alone, of inputs made ready for it; jla on packed "
        "rows also reads the present pair, and is counted with it; jax's kernel is of float16.\n\n"
        + reads_grid(figures, places)
    )


def averages_grid(records: list[Record], lengths: Iterable[int]) -> str:
    places = [problem.Place("recurrence", "packed", length) for length in lengths]
    return grid(records, places, AVERAGERS, lambda r: f"{r['share']:.0%} ({r['milliseconds']:.3f} ms)")


def _averages(results: Results) -> str:
    figures = [r for r in of(results, "figure") if r["memory"] == "recurrence"]
    if not figures:
        return ""
    speeds = [r["copy_gigabytes_per_second"] for r in figures if "copy_gigabytes_per_second" in r]
    text = "## `leaky_average`: share of the speed of a copy of the least bytes (milliseconds)\n\n"
    if speeds:
        text += f"The copy: {max(speeds):,.0f} GB/s at best, read and written.\n\n"
    return text + averages_grid(figures, dict.fromkeys(r["time"] for r in figures))


def _variants(results: Results) -> str:
    rows = []
    for r in of(results, "variant"):
        figures = [r["missing"], ""] if "missing" in r else [f"{r['milliseconds']:.3f}", f"{r.get('ratio', 1.0):.3f}"]
        rows.append([r["kernel"], r["variant"], r["by"], *figures])
    head = ["kernel", "variant", "bandwidth of", "milliseconds", "of the time as it is"]
    return "## Variants by turns\n\n" + table(head, rows) if rows else ""


def _counters(results: Results) -> str:
    found = list(of(results, "counter"))
    if not found:
        return ""
    names = list(dict.fromkeys(name for record in found for name in record["values"]))
    rows = [[name, *(record["values"].get(name, "") for record in found)] for name in names]
    return "## Counters of one launch each (ncu)\n\n" + table(["", *(r["kernel"] for r in found)], rows)


def _train(results: Results) -> str:
    found = list(of(results, "train"))
    if not found:
        return ""
    names = [name for name in found[0] if name != "kind"]
    rows = [[name.replace("_", " "), *(str(record.get(name, "")) for record in found)] for name in names]
    return "## Train step of configs/small.py on one GPU\n\n" + table(["", *[""] * len(found)], rows)


def _steps(results: Results) -> str:
    """What the jobs that are commands have found: a table of figures, and text as the commands wrote it."""
    rows = [[r["name"], str(r["value"])] for r in of(results, "value")]
    text = "## Figures\n\n" + table(["", ""], rows) if rows else ""
    return "\n\n".join(filter(None, [text, *(record["text"] for record in of(results, "text"))]))


def _cases(results: Results) -> str:
    outcomes: dict[str, list[str]] = {}
    for record in of(results, "case"):
        outcomes.setdefault(record["name"].partition(":")[0], []).append(record["outcome"])
    rows = [
        [name, *(str(found.count(outcome)) for outcome in ("passed", "failed", "skipped"))]
        for name, found in outcomes.items()
    ]
    return "## Cases against float64\n\n" + table(["", "passed", "failed", "skipped"], rows) if rows else ""


def _checks(results: Results) -> str:
    """Of what is timed, at sampled positions."""
    rows = [
        [str(r.get("by", "")), str(r.get("kernel", "")), str(r.get("variant", "")), r["memory"], r["rows"],
         str(r.get("time", "")), str(r.get("what", "")), _errors(r), "yes" if r["ok"] else "NO"]
        for r in of(results, "check") if r["errors"]
    ]  # fmt: skip
    head = ["", "kernel", "variant", "", "rows", "T", "", "|error| / |answer|", "right"]
    return "## Values of what is timed\n\n" + table(head, rows) if rows else ""


def _programs(results: Results) -> str:
    """Those that were not carried, and why."""
    rows = [[r["name"], f"{r['seconds']:.1f}", r["why"]] for r in of(results, "program") if r["how"] != CARRIED]
    return "## Programs compiled on the card\n\n" + table(["", "seconds", "why not carried"], rows) if rows else ""
