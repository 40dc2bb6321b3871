"""Tables say the mean and the spread over seeds of what was measured, and nothing where nothing was."""

import math
import pathlib

import pytest

from mosaics_jax.claims import tables
from mosaics_jax.claims.study import Found, Run, Study, Variant


def _found(variant: str, right: list[list[float]], removed: list[list[float]] | None) -> Variant:
    runs = [
        Found(Run(variant, 2e-3, seed), 4.0 + seed, {"recall": {2: of}}, removed and {"recall": {2: removed[seed]}})
        for seed, of in enumerate(right)
    ]
    return Variant({2e-3: 4.0, 6e-3: 5.0}, runs)


def test_means_over_seeds_with_their_standard_error(tmp_path: pathlib.Path) -> None:
    study = Study("recall", tmp_path, seeds=2, variants=("mosaic", "transformer"), say=lambda _: None)
    study.prepare()
    found = {
        "mosaic": _found("mosaic", [[1, 1], [1, 0]], [[0, 0], [0, 1]]),
        "transformer": _found("transformer", [[0, 0], [0, 0]], None),
    }
    made = tables.make(study, found)
    trained, whole, removed = made.tables
    assert whole.rows == [["mosaic", "75.0 ± 25.0"], ["transformer", "0.0 ± 0.0"]]
    assert removed.rows == [["mosaic", "25.0 ± 25.0"]]
    row = dict(zip(trained.columns, trained.rows[0], strict=True))
    assert row["held out, bits per byte"] == "4.500 ± 0.500"
    assert (row["bits per byte at rate 0.002"], row["bits per byte at rate 0.006"], row["best rate"]) == (4, 5, "0.002")
    assert row["tokens"] == 300 * 4 * 512
    (figure,) = made.figures
    assert figure.name == "recall"
    assert [(one["label"], one["x"], one["y"], one["error"]) for one in figure.data["series"]] == [
        ("mosaic", [2], [0.75], [0.25]),
        ("transformer", [2], [0.0], [0.0]),
    ]
    assert figure.data["levels"] == {"chance": 1 / 30}

    first, second = tables.raw(found)
    assert (first["variant"], first["bits_per_byte_by_rate"]) == ("mosaic", {2e-3: 4.0, 6e-3: 5.0})
    assert [run["answers"] for run in first["runs"]] == [{"recall": {2: 1.0}}, {"recall": {2: 0.5}}]
    assert [run["without_long_term"] for run in second["runs"]] == [None, None]


@pytest.mark.parametrize(
    ("values", "percent", "said"),
    [
        ([0.5], True, "50.0"),
        ([0.4, 0.6], True, "50.0 ± 10.0"),
        ([1.0, 2.0], False, "1.500 ± 0.500"),
        ([0.002, 0.004], False, "0.00300 ± 0.00100"),
    ],
)
def test_spread(values: list[float], percent: bool, said: str) -> None:
    assert tables.spread(values, percent) == said
    assert not math.isnan(float(said.split(" ± ")[-1]))
