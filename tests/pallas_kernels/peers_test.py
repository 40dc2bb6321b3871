"""The peers' formulas against the reference, and what `make gpu` does where there is no GPU."""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import gpu_report
from mosaics_jax import visibility
from pallas_kernels.retrieval import peers, retrieve

ROOT = pathlib.Path(__file__).parent.parent.parent
B, T, H, K = 2, 24, 2, 8
DELAY, WINDOW = 5, 7
_UNPACKED = np.zeros((B, T), np.int32)
_PACKED = np.repeat(np.arange(5, dtype=np.int32), [9, 1, 8, 2, 4])[None].repeat(B, axis=0)


def _arrays() -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    query_BTHK, key_BTHK, value_BTHV = (jax.random.normal(key, (B, T, H, K)) for key in keys[:3])
    return query_BTHK, key_BTHK, value_BTHV, jnp.exp(jax.random.normal(keys[3], (B, T, H)))


def _intervals(document_BT: np.ndarray) -> dict[str, visibility.Interval]:
    start_BT = visibility.document_start(jnp.asarray(document_BT))
    return {
        "long": visibility.long_term(start_BT, delay=DELAY),
        "short": visibility.short_term(start_BT, window=WINDOW),
    }


def _value_and_gradients(operation, arrays):
    weight_BTHV = jax.random.normal(jax.random.key(1), (B, T, H, K))

    def loss(*arrays):
        output_BTHV = operation(*arrays)
        return (weight_BTHV * output_BTHV).sum(), output_BTHV

    (_, output_BTHV), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(*arrays)
    return output_BTHV, *gradients


def _assert_is_retrieve(operation, interval):
    arrays = _arrays()
    reference = functools.partial(
        retrieve, start_BT=interval.start_BT, stop_BT=interval.stop_BT, implementation="reference"
    )
    expected = _value_and_gradients(reference, arrays)
    measured = _value_and_gradients(operation, arrays)
    for name, a, b in zip(("output", "d_query", "d_key", "d_value", "d_bandwidth"), measured, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5, err_msg=name)
    empty_BT = np.asarray(interval.start_BT >= interval.stop_BT)
    assert empty_BT[:, 0].all()
    assert not np.asarray(measured[0])[empty_BT].any()


_CUDNN = {
    "long": functools.partial(peers.cudnn_long_term, delay=DELAY, implementation="xla"),
    "short": functools.partial(peers.cudnn_short_term, window=WINDOW, implementation="xla"),
}


@pytest.mark.parametrize("memory", _CUDNN)
def test_shifted_attention_is_a_read_of_an_unpacked_row(memory):
    """With zeros where nothing is seen; values and gradients."""
    _assert_is_retrieve(_CUDNN[memory], _intervals(_UNPACKED)[memory])


@pytest.mark.parametrize(("memory", "shift", "pairs"), [("long", DELAY, None), ("short", 1, WINDOW - 1)])
def test_what_is_timed_is_all_that_is_left_to_do(memory, shift, pairs):
    arrays = _arrays()
    whole_BTHV = _CUDNN[memory](*arrays)
    attention_BTHV = peers.shifted_attention(*peers.shifted(*arrays, shift), pairs, implementation="xla")
    np.testing.assert_allclose(whole_BTHV[:, shift:], attention_BTHV, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("default")  # the peer's own
@pytest.mark.parametrize("document_BT", [_UNPACKED, _PACKED], ids=["unpacked", "packed"])
@pytest.mark.parametrize("memory", ["long", "short"])
def test_tokamax(memory, document_BT):
    pytest.importorskip("tokamax", reason="tokamax is not installed")
    interval = _intervals(document_BT)[memory]
    operation = functools.partial(
        peers.tokamax, start_BT=interval.start_BT, stop_BT=interval.stop_BT, implementation="xla"
    )
    _assert_is_retrieve(operation, interval)


@pytest.mark.filterwarnings("default")  # the peer's own
@pytest.mark.parametrize("document_BT", [_UNPACKED, _PACKED], ids=["unpacked", "packed"])
@pytest.mark.parametrize("memory", ["long", "short"])
def test_flex_attention(memory, document_BT):
    """Values only: on CPU it has no derivative."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    interval = _intervals(document_BT)[memory]
    arrays = _arrays()
    expected_BTHV = retrieve(*arrays, *interval, implementation="reference")
    query, key, value = (torch.from_numpy(np.array(array)).transpose(1, 2) for array in arrays[:3])
    bandwidth = torch.from_numpy(np.array(arrays[3])).transpose(1, 2)
    ends = (torch.from_numpy(np.array(end)) for end in interval)
    read = peers.flex_attention(bandwidth, *ends, T, compiled=False)
    np.testing.assert_allclose(read(query, key, value).transpose(1, 2).numpy(), expected_BTHV, rtol=0, atol=2e-5)


@pytest.mark.parametrize("memory", ["long", "short"])
@pytest.mark.skipif(importlib.util.find_spec("tokamax") is not None, reason="tokamax is installed")
def test_a_peer_that_is_not_installed_says_so(memory):
    with pytest.raises(ImportError, match="tokamax"):
        peers.tokamax(*_arrays(), *_intervals(_UNPACKED)[memory])


# The command and its table.


def test_the_suite_refuses_where_there_is_no_hopper_gpu(tmp_path):
    command = [sys.executable, "-m", "launch.gpu", f"--output={tmp_path / 'out'}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # or jax logs at length which plugins it misses
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "compute capability 9.0" in line
    assert not (tmp_path / "out").exists()


def _results(**sections):
    passed = {"state": "passed", "seconds": 1.0, "records": []}
    return {
        "device": "A device", "date": "2000-01-01", "jax": "0.0", "quick": False, "seconds": 10.0,
        "sections": {name: passed | section for name, section in sections.items()},
    }  # fmt: skip


def _figure(**fields):
    place = {"kind": "figure", "memory": "long-term", "rows": "unpacked", "time": 16384, "what": "forward"}
    return place | {"by": "hopper", "milliseconds": 2.0, "tflops": 512.4} | fields


def test_the_table_shows_figures_and_why_one_is_missing():
    records = [_figure(), _figure(what="forward + backward", missing="TypeError: no such thing", failed=True)]
    skipped = [_figure(by="flex", missing="not installed", failed=False)]
    results = _results(hopper={"records": records}, flex={"records": skipped})
    lines = gpu_report.markdown(results).splitlines()
    forward, both = (
        next(line for line in lines if line.startswith(f"| long-term | unpacked | 16,384 | {what} |"))
        for what in ("forward", "forward + backward")
    )
    # hopper, cudnn, flex, tokamax, xla
    assert forward.split("|")[5:10] == [
        " 512 (2.000 ms) ",
        " not measured ",
        " not installed ",
        *[" not measured "] * 2,
    ]
    assert both.split("|")[5] == " failed "
    assert any("TypeError: no such thing" in line for line in lines)


def test_the_table_counts_cases_and_names_those_that_failed():
    records = [
        {"kind": "case", "name": "a[x]", "outcome": "passed"},
        {"kind": "case", "name": "b[y]", "outcome": "failed", "message": "0.3 is more than 0.02"},
        {"kind": "case", "name": "c[z]", "outcome": "started"},
    ]
    results = _results(retrieve_cases={"records": records, "state": "failed: killed after 90 s"})
    text = gpu_report.markdown(results)
    assert "| retrieve_cases | 1 | 1 | 0 |" in text
    assert "b[y]: 0.3 is more than 0.02" in text
    assert "c[z]: began and did not end" in text
    assert "retrieve_cases: killed after 90 s" in text
    assert gpu_report.failures(results)


def test_nothing_that_is_only_absent_is_a_failure():
    absent = _results(flex={"records": [_figure(by="flex", missing="not installed", failed=False)]})
    assert not gpu_report.failures(absent)
    assert not gpu_report.failures(_results(train={"state": gpu_report.OUT_OF_TIME}))
    assert gpu_report.failures(_results(hopper={"records": [_figure(missing="ValueError: x", failed=True)]}))
    wrong = {"kind": "check", "by": "hopper", "memory": "long-term", "errors": {"output": 1.0}, "ok": False}
    assert gpu_report.failures(_results(hopper={"records": [wrong]}))


def test_reports_are_written_beside_old_ones(tmp_path):
    for _ in range(2):
        gpu_report.Report(tmp_path, _results()).save()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a-device-2000-01-01-2.json", "a-device-2000-01-01-2.md",
        "a-device-2000-01-01.json", "a-device-2000-01-01.md",
    ]  # fmt: skip
