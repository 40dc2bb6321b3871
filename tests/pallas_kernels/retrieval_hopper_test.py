"""The Hopper kernels of `retrieve`, interpreted on a CPU and watched for races: the shared cases, planted faults."""

import dataclasses
import functools
import re
import subprocess
import sys

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaics_jax import visibility
from pallas_kernels.retrieval import cases as shared
from pallas_kernels.retrieval import hopper, hopper_vjp

CASES = {case.name: case for case in shared.cases()}
# One of each kind in the default suite; the others take minutes in all.
QUICK = ("empty_here_and_there", "short_term", "long_term_across_tiles")


@functools.partial(jax.jit, static_argnames="unit_norm")
def _hopper(query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH, start_BT, stop_BT, unit_norm=False):
    """Widths filled up with zeros, which change no score and no value."""
    width = value_BSHV.shape[-1]
    query_BTHK, key_BSHK, value_BSHV = (
        jnp.pad(array, [(0, 0)] * 3 + [(0, -array.shape[-1] % 64)]) for array in (query_BTHK, key_BSHK, value_BSHV)
    )
    output_BTHV = hopper_vjp.retrieve_hopper(
        query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH, start_BT, stop_BT, unit_norm, interpreted.WATCHED
    )
    return output_BTHV[..., :width]


def _in_bfloat16(case):
    """One row and one head of a case (the interpreter is slow), of numbers that bfloat16 holds."""
    *arrays, bandwidth_BTH = case.arrays
    arrays = [np.asarray(jnp.asarray(a[:1, :, :1], jnp.bfloat16), np.float64) for a in arrays]
    return dataclasses.replace(
        case,
        arrays=(*arrays, bandwidth_BTH[:1, :, :1]),
        start_BT=case.start_BT[:1],
        stop_BT=case.stop_BT[:1],
        weight_BTHV=case.weight_BTHV[:1, :, :1],
        dtype="bfloat16",
    )


def _check(case, operation):
    expected, measured = shared.expected(case), shared.measured(case, operation)
    interpreted.assert_no_races()
    for result in shared.NAMES:
        # Twice the few roundings of retrieval_test: over windows of hundreds the XLA path in bfloat16 needs as much,
        # and with a constant in place of the maximum the greatest weight is no exact 1 and is rounded as well.
        limit = 4e-2 * max(1.0, np.abs(expected[result]).max(initial=0))
        np.testing.assert_allclose(measured[result], expected[result], rtol=0, atol=limit, err_msg=result)


# The mean of their 64 values is no bfloat16 number, and β = 2^27 times the rounding of the output is what it is.
_ROUGH = ("identical_keys_dominate", "identical_keys_dominate_one_array")
_EXACT = [name for name in CASES if name not in _ROUGH]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in _EXACT])
def test_values_and_gradients(name):
    _check(_in_bfloat16(CASES[name]), _hopper)


@pytest.mark.slow
@pytest.mark.parametrize("name", _ROUGH)
def test_values_where_an_extreme_bandwidth_meets_equal_keys(name):
    case = _in_bfloat16(CASES[name])
    expected, measured = shared.expected(case), shared.measured(case, _hopper)
    for result in ("output", "d_value"):
        np.testing.assert_allclose(measured[result], expected[result], rtol=0, atol=2e-2, err_msg=result)
    for result in shared.NAMES:
        assert np.isfinite(measured[result]).all()


def _wide(width, start_BT, stop_BT, stored):
    """A case whose keys fill their width."""
    rng = np.random.default_rng(width)
    time = start_BT.shape[1]
    query_BTHK, key_BSHK = (rng.normal(size=(1, size, 1, width)) for size in (time, stored))
    query_BTHK, key_BSHK = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (query_BTHK, key_BSHK))
    case = shared.Case(
        name="wide",
        arrays=(query_BTHK, key_BSHK, rng.normal(size=(1, stored, 1, width)), np.full((1, time, 1), 20.0)),
        start_BT=np.asarray(start_BT, np.int32),
        stop_BT=np.asarray(stop_BT, np.int32),
        weight_BTHV=rng.normal(size=(1, time, 1, width)),
    )
    return _in_bfloat16(case)


def _packed(documents, time, read, width=64):
    return _wide(width, *read(visibility.document_start(jnp.asarray(shared.packed(time, documents)[:1]))), stored=time)


_short = functools.partial(visibility.short_term, window=256)
_long = functools.partial(visibility.long_term, delay=64)


@pytest.mark.slow
@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("documents", [7, 200])
@pytest.mark.parametrize("read", [_short, _long], ids=["short", "long"])
def test_keys_that_fill_their_width(read, documents, width, unit_norm):
    _check(_packed(documents, 500, read, width), functools.partial(_hopper, unit_norm=unit_norm))


def test_a_constant_in_place_of_the_maximum_changes_nothing():
    """Of bandwidths below the bound, above it in one of the two warpgroups, and near its edge with opposite keys."""
    case = _packed(2, 256, _short)
    query_BTHK, key_BSHK, value_BSHV, _ = (jnp.asarray(a, jnp.bfloat16) for a in case.arrays)
    key_BSHK = key_BSHK.at[:, 100:120].set(-query_BTHK[:, 121:122])
    bandwidth_BTH = np.full((1, 256, 1), hopper.BOUND, np.float32)
    bandwidth_BTH[:, 200] = 1e4
    arguments = (query_BTHK, key_BSHK, value_BSHV, jnp.asarray(bandwidth_BTH), case.start_BT, case.stop_BT)
    bounded, running = (np.asarray(_hopper(*arguments, unit_norm=promise), np.float64) for promise in (True, False))
    np.testing.assert_allclose(bounded, running, rtol=0, atol=2e-2)
    assert np.abs(running).max() > 1


# Which blocks are visited: arithmetic, checked against every pair.


def _intervals(kind, time, stored):
    rng = np.random.default_rng(time)
    if kind == "unsorted":
        return np.sort(rng.integers(0, stored + 1, (2, 1, time)), axis=0)
    ids_BT = np.sort(rng.integers(0, 9, (1, time)), axis=1)
    read = _short if kind == "short" else _long
    return tuple(np.asarray(end) for end in read(visibility.document_start(jnp.asarray(ids_BT))))


@pytest.mark.parametrize("kind", ["short", "long", "unsorted"])
@pytest.mark.parametrize(("bounds", "block"), [("query", 128), ("query", 64), ("key", 64)])
def test_the_bounds_hold_all_visible_pairs_and_the_whole_blocks_no_hidden_one(kind, bounds, block):
    time = stored = 1024
    start_BT, stop_BT = _intervals(kind, time, stored)
    place_S = np.arange(stored)
    visible_TS = (start_BT[0, :, None] <= place_S) & (place_S < stop_BT[0, :, None])
    if bounds == "query":
        bounds_NX = hopper.query_bounds(jnp.asarray(start_BT), jnp.asarray(stop_BT), block)[0]
        own, tile, across = hopper.QUERIES, hopper.TILE, visible_TS
    else:
        bounds_NX = hopper_vjp.key_bounds(jnp.asarray(start_BT), jnp.asarray(stop_BT), stored)[0]
        own, tile, across = hopper_vjp.KEYS, 2 * hopper_vjp.KEYS, visible_TS.T
    visited = needed = 0
    for n, (first, whole, whole_end, end) in enumerate(np.asarray(bounds_NX)):
        assert 0 <= first <= whole <= whole_end <= end <= across.shape[1] // block
        rows = across[n * own : (n + 1) * own]
        assert not rows[:, : first * block].any()
        assert not rows[:, end * block :].any()
        assert rows[:, whole * block : whole_end * block].all()
        in_tile = across[n * own // tile * tile :][:tile]
        seen = np.flatnonzero(in_tile.any(0)) // block
        needed += seen.max() - seen.min() + 1 if seen.size else 0
        visited += end - first
    if kind != "unsorted":
        assert visited == needed  # not one block more than lies between the first and the last visible pair


@pytest.mark.parametrize("width", [64, 128])
def test_the_program_for_a_gpu_has_three_kernels(width):
    """Lowering alone needs no GPU; it fails where shared memory or a register layout does not fit. Under shard_map."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    read = functools.partial(hopper_vjp.retrieve_hopper, unit_norm=True, interpret=None)
    sharded = jax.shard_map(read, mesh=mesh, in_specs=(spec,) * 6, out_specs=spec, check_vma=False)

    def loss(query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH, start_BT, stop_BT):
        output_BTHV = sharded(query_BTHK, key_BSHK, value_BSHV, bandwidth_BTH, start_BT, stop_BT)
        return output_BTHV.astype(jnp.float32).sum()

    wide = jax.ShapeDtypeStruct((2, 1000, 2, width), jnp.bfloat16)
    end_BT = jax.ShapeDtypeStruct((2, 1000), jnp.int32)
    bandwidth_BTH = jax.ShapeDtypeStruct((2, 1000, 2), jnp.float32)
    traced = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(wide, wide, wide, bandwidth_BTH, end_BT, end_BT)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu", program)) == 3


# Planted faults. Each runs in a process of its own, for what waits forever can only be killed.

_FAULTY = """
import sys; sys.path[:0] = {path!r}
import numpy as np, jax, jax.numpy as jnp, interpreted
from pallas_kernels.retrieval import hopper, hopper_vjp
from jax.experimental.pallas import mosaic_gpu as plgpu
{fault}
key = jnp.ones((1, 512, 1, 64), jnp.bfloat16) / 8
start, stop = jnp.zeros((1, 512), jnp.int32), jnp.arange(512, dtype=jnp.int32)[None]
output = hopper_vjp.retrieve_hopper(key, key, key, jnp.ones((1, 512, 1)), start, stop, False, interpreted.WATCHED)
output.block_until_ready()
interpreted.assert_no_races()
"""
_NO_FAULT = ""
_EARLY_RELEASE = """
def await_full(self, step):
    plgpu.barrier_wait(self._full.at[self.slot(step)])
    plgpu.barrier_arrive(self._empty.at[self.slot(step)])
hopper.Ring.await_full, hopper.Ring.release = await_full, lambda self, step: None
"""
_MISSING_WAIT = "hopper.Ring.await_full = lambda self, step: None"
_MISSING_ARRIVE = "hopper.Ring.release = lambda self, step: None"


def _run_faulty(fault, seconds):
    code = _FAULTY.format(path=["tests/pallas_kernels", "."], fault=fault)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds, check=False)


@pytest.mark.slow
def test_planted_faults_are_caught():
    assert _run_faulty(_NO_FAULT, 120).returncode == 0
    early = _run_faulty(_EARLY_RELEASE, 120)
    assert early.returncode != 0
    assert "races_found" in early.stderr
    assert _run_faulty(_MISSING_WAIT, 120).returncode != 0
    with pytest.raises(subprocess.TimeoutExpired):
        _run_faulty(_MISSING_ARRIVE, 60)
