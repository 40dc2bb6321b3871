"""The answers in numpy against jax's derivatives of the references, on all shared cases."""

import numpy as np
import pytest

from pallas_kernels import answers
from pallas_kernels.leaky_average import cases as average_cases
from pallas_kernels.retrieval import cases as read_cases

_READS = {case.name: case for case in read_cases.cases()}
_AVERAGES = {case.name: case for case in average_cases.cases()}


def _assert_equal(measured, expected, names):
    for name in names:
        limit = 1e-11 * max(1.0, np.abs(expected[name]).max(initial=0))
        np.testing.assert_allclose(measured[name], expected[name], rtol=0, atol=limit, err_msg=name)


@pytest.mark.parametrize("name", _READS)
def test_reads(name):
    case = _READS[name]
    query, key, value, bandwidth = case.arrays
    query = key if case.is_one_array else query
    measured = answers.reads(query, key, value, bandwidth, case.start_BT, case.stop_BT, case.weight_BTHV)
    if case.is_one_array:
        measured["d_key"] = measured["d_key"] + measured["d_query"]
        measured["d_query"] = np.zeros_like(measured["d_query"])
    _assert_equal(measured, read_cases.expected(case), read_cases.NAMES)


@pytest.mark.parametrize("name", _AVERAGES)
def test_averages(name):
    case = _AVERAGES[name]
    unit_BH = average_cases.unit(case)
    input_BTHK, log_gate_BTH, log_decay_BTH, *state = case.arrays
    measured = answers.averages(
        input_BTHK, log_gate_BTH, log_decay_BTH, case.restart_BT, *state, case.weights, unit_BH
    )  # fmt: skip
    _assert_equal(measured, average_cases.expected(case), average_cases.NAMES)
