"""The Hopper kernels on a Hopper GPU: every shared case at the widths they take, against float64. Run by `make gpu`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import leaky_average_cases
import numpy as np
import pytest
import retrieval_cases

from pallas_kernels.leaky_average import leaky_average
from pallas_kernels.retrieval import retrieve

pytestmark = pytest.mark.gpu

WIDTHS = (64, 128)
LEAST_QUERIES = 64  # fewer, as in decoding, are left to the XLA path
# Twice what the narrow case in bfloat16 is allowed: there are 30 times the numbers to find the worst of. On CPU the XLA
# path reaches 2.1e-2 of the greatest gradient here.
TOLERANCE = 4e-2

_RETRIEVAL = {case.name: case for case in retrieval_cases.cases() if case.start_BT.shape[1] >= LEAST_QUERIES}
_LEAKY_AVERAGE = {case.name: case for case in leaky_average_cases.cases()}
# One object each: jit caches by identity.
_READS = {
    unit_norm: functools.partial(retrieve, implementation="hopper", unit_norm=unit_norm) for unit_norm in (False, True)
}
_average = functools.partial(leaky_average, implementation="hopper")


def _rounded(array: np.ndarray, dtype: str = "bfloat16") -> np.ndarray:
    return np.asarray(jnp.asarray(array, dtype), np.float64)


def _wide_read(case: retrieval_cases.Case, width: int) -> retrieval_cases.Case:
    """The case in bfloat16, with keys of `width` features that have the products of the old ones, and as wide values.

    Features of an exact case are only spread out. There, values are ±1 and the loss sees one column, so that the mean
    of 64 values and the difference of two of them fit bfloat16's 8 bits: what cancels is exact, as in the narrow case.
    """
    query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH = case.arrays
    rng = np.random.default_rng(width)
    narrow = key_BSHK.shape[-1]
    value_BSHV = rng.normal(size=(*value_BSHV.shape[:3], width))
    # do·v and its rounding keep the size they have in the narrow case.
    weight_BTHV = rng.normal(size=(*case.weight_BTHV.shape[:3], width)) * (case.weight_BTHV.shape[-1] / width) ** 0.5
    if case.is_exact:
        turn_KK = np.eye(width)[:: width // narrow]
        value_BSHV, weight_BTHV = np.sign(value_BSHV), np.sign(weight_BTHV) * (np.arange(width) == 0)
    else:
        turn_KK = np.linalg.qr(rng.normal(size=(width, width)))[0][:narrow]
    query_BTHK, key_BSHK, value_BSHV = map(_rounded, (query_BTHK @ turn_KK, key_BSHK @ turn_KK, value_BSHV))
    return dataclasses.replace(
        case, arrays=(query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH), weight_BTHV=weight_BTHV, dtype="bfloat16"
    )


def _wide_average(case: leaky_average_cases.Case, width: int, dtype: str) -> leaky_average_cases.Case:
    """The case with `width` features and inputs of `dtype`; what was zero stays zero."""
    input_BTHK, log_gate_BTH, log_decay_BTH, average_BHK, log_scale_BH = case.arrays
    rng = np.random.default_rng(width)

    def widened(array: np.ndarray) -> np.ndarray:
        return rng.normal(size=(*array.shape[:-1], width)) * (array != 0).any(-1, keepdims=True)

    arrays = (
        _rounded(widened(input_BTHK), dtype), log_gate_BTH, log_decay_BTH,
        _rounded(widened(average_BHK), "float32"), log_scale_BH,
    )  # fmt: skip
    weights = (rng.normal(size=arrays[0].shape), rng.normal(size=arrays[3].shape))
    return dataclasses.replace(case, arrays=arrays, weights=weights, dtype=dtype)


def _on_cpu(function, *arguments):
    """The float64 answer comes from another device than the measured one."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return function(*arguments)


def _check_read(case: retrieval_cases.Case, unit_norm: bool) -> None:
    expected = _on_cpu(retrieval_cases.expected, case)
    measured = retrieval_cases.measured(case, _READS[unit_norm])
    for result in retrieval_cases.NAMES:
        largest = np.abs(expected[result]).max(initial=0)
        limit = TOLERANCE * (largest if case.is_exact else max(1.0, largest))
        np.testing.assert_allclose(measured[result], expected[result], rtol=0, atol=limit, err_msg=result)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", _RETRIEVAL)
def test_retrieve(name: str, width: int) -> None:
    _check_read(_wide_read(_RETRIEVAL[name], width), unit_norm=False)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", [name for name, case in _RETRIEVAL.items() if not case.is_exact])
def test_retrieve_of_unit_norm(name: str, width: int) -> None:
    _check_read(_wide_read(_RETRIEVAL[name], width), unit_norm=True)


@pytest.mark.parametrize(("width", "dtype"), [(64, "bfloat16"), (128, "bfloat16"), (128, "float32")])
@pytest.mark.parametrize("name", _LEAKY_AVERAGE)
def test_leaky_average(name: str, width: int, dtype: str) -> None:
    case = _wide_average(_LEAKY_AVERAGE[name], width, dtype)
    expected = _on_cpu(leaky_average_cases.expected, case)
    measured = leaky_average_cases.measured(case, expected["unit_BH"], _average)
    tolerance = 2e-2 if dtype == "bfloat16" else 2e-5
    for result in leaky_average_cases.NAMES:
        if not case.has_state and result in ("d_average", "d_log_scale"):
            continue
        largest = np.abs(expected[result]).max()
        limit = tolerance * (largest if name == "tiny_decay" else max(1.0, largest))
        np.testing.assert_allclose(measured[result], expected[result], rtol=0, atol=limit, err_msg=result)
