"""What came of a study, as tables and figures: means over seeds with their standard errors."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mosaics_jax import metrics, roofline
from mosaics_jax.claims.measures import ACCURACY, WEIGHT, Answers, Measure
from mosaics_jax.claims.study import Found, Study, Variant
from mosaics_jax.evaluate import report
from mosaics_jax.nn.model import parameter_count

_MAIN = "mosaic"  # drawn thicker
_UNIFORM = "uniform"  # reads that weigh all alike
_STYLES = (":", "-", "--")  # of the measures that share a figure


def make(study: Study, found: Mapping[str, Variant]) -> report.Report:
    """The report on a study's `run()`: what was trained, then a table of each measure, with and without removal."""
    tables = [_trained(study, found)]
    by_figure: dict[str, list[Measure]] = {}
    for measure in study.measures:
        # Reports of all studies lie in one folder.
        mine = measure.figure.startswith(study.name)
        by_figure.setdefault(measure.figure if mine else f"{study.name}_{measure.figure}", []).append(measure)
        tables += _tables(measure, found)
    return report.Report(tables, [_figure(name, measures, found) for name, measures in by_figure.items()])


def raw(found: Mapping[str, Variant]) -> list[dict[str, Any]]:
    """Every run by itself, as JSON: what the means and spreads of the report are made of."""

    def means(answers: Answers | None) -> dict[str, dict[int, float]] | None:
        if answers is None:
            return None
        return {name: {x: report.mean(values) for x, values in by_x.items()} for name, by_x in answers.items()}

    return [
        {
            "variant": variant, "bits_per_byte_by_rate": trained.sweep,
            "runs": [
                {
                    "rate": one.run.rate, "seed": one.run.seed, "bits_per_byte": one.bits_per_byte,
                    "answers": means(one.whole), "without_long_term": means(one.removed),
                }
                for one in trained.runs
            ],
        }
        for variant, trained in found.items()
    ]  # fmt: skip


def _tables(measure: Measure, found: Mapping[str, Variant]) -> Iterator[report.Table]:
    for what, of in (("", lambda one: one.whole), (", long-term memory removed", lambda one: one.removed)):
        if what and not measure.removal:
            continue
        rows, columns = [], []
        for variant, trained in found.items():
            by_x = _by_seed(measure, [of(one) for one in trained.runs])
            if by_x:
                rows.append([variant, *(spread(values, measure.unit == ACCURACY) for values in by_x.values())])
                columns = ["variant", *(f"{x:,} {measure.axis}" for x in by_x)]
        if rows and measure.uniform:
            rows.append([_UNIFORM, *(spread(values, percent=False) for values in measure.uniform.values())])
        if rows:
            yield report.Table(measure.title + what, columns, rows)


def _figure(name: str, measures: Sequence[Measure], found: Mapping[str, Variant]) -> report.Figure:
    series = []
    for measure, style in zip(measures, _STYLES if len(measures) > 1 else ("-",), strict=True):
        for colour, (variant, trained) in enumerate(found.items()):
            if by_x := _by_seed(measure, [one.whole for one in trained.runs]):
                label = f"{variant}, {measure.label}" if measure.label else variant
                how = {"main": variant == _MAIN, "colour": colour, "style": style}
                series.append(report.curve(label, list(by_x), list(by_x.values())) | how)
        if measure.uniform:
            one = report.curve(f"{_UNIFORM}, {measure.label}", list(measure.uniform), list(measure.uniform.values()))
            series.append(one | {"colour": len(found), "style": style})
    first = measures[0]
    more: dict[str, Any] = {"log_x": 0 not in series[0]["x"], "log_y": first.unit == WEIGHT}
    if first.chance:
        more["levels"] = {"chance": first.chance}
    if first.trained:
        more["marks"] = {str(first.trained): "trained"}
    return report.Figure(name, report.lines(name.replace("_", " "), first.axis, first.unit, series, **more))


def _by_seed(measure: Measure, answers: Sequence[Answers | None]) -> dict[int, list[float]]:
    """At each x the mean of every run; empty where they have no such measure."""
    known = [one[measure.name] for one in answers if one is not None and measure.name in one]
    return {x: [report.mean(by_x[x]) for by_x in known] for x in known[0]} if known else {}


def _trained(study: Study, found: Mapping[str, Variant]) -> report.Table:
    rates = sorted({rate for trained in found.values() for rate in trained.sweep})
    rows = []
    for variant, trained in found.items():
        first: Found = trained.runs[0]
        config = study.config(first.run)
        tokens = config.data.batch * config.data.context
        flops = metrics.step_flops(config, roofline.visible_pairs(config, config.data.context)) / 3 / tokens
        rows.append([
            variant, parameter_count(config.model), round(flops), config.run.steps * tokens,
            *(trained.sweep.get(rate) for rate in rates), f"{first.run.rate:g}",
            spread([one.bits_per_byte for one in trained.runs], percent=False),
        ])  # fmt: skip
    columns = [
        "variant", "parameters", "FLOPs a token, forward", "tokens", *(f"bits per byte at rate {r:g}" for r in rates),
        "best rate", "held out, bits per byte",
    ]  # fmt: skip
    return report.Table("What was trained", columns, rows)


def spread(values: Sequence[float], percent: bool) -> str:
    """The mean with its standard error, where there are several."""
    if percent:
        return report.percent(values)
    digits = 3 if report.mean(values) >= 0.1 else 5
    error = f" ± {report.standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{report.mean(values):.{digits}f}{error}"
