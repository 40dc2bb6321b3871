"""The Hopper kernels of `leaky_average`, interpreted on a CPU with races detected, against float64."""

import dataclasses
import functools
import re

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.leaky_average import cases as shared
from pallas_kernels.leaky_average.hopper import leaky_average_hopper

_CASES = {case.name: case for case in shared.cases()}
# In the default suite; the others take a minute in all.
_QUICK = ("from_a_state", "extreme_gates", "short_documents", "one_position")


def _slow_but(names):
    return [name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@functools.cache
def _operation(chunk):
    """One object for each chunk size: jit caches by identity."""
    return functools.partial(leaky_average_hopper, chunk=chunk, interpret=interpreted.WATCHED)


def _resized(case, B, H, K, dtype=None):
    """The case with other features and fewer heads: K is fixed by the kernels, and the interpreter is slow."""
    dtype = dtype or case.dtype
    rng = np.random.default_rng(K)
    input_BTHK, log_gate_BTH, log_decay_BTH, average_BHK, log_scale_BH = case.arrays
    kept_BTH1, started_BH1 = (
        (array[:B].take(range(H), axis=-2) != 0).any(-1, keepdims=True) for array in (input_BTHK, average_BHK)
    )
    T = input_BTHK.shape[1]
    input_BTHK = np.asarray(jnp.asarray(rng.normal(size=(B, T, H, K)) * kept_BTH1, dtype), np.float64)
    average_BHK = (rng.normal(size=(B, H, K)) * started_BH1).astype(np.float32).astype(np.float64)
    return dataclasses.replace(
        case,
        arrays=(input_BTHK, log_gate_BTH[:B, :, :H], log_decay_BTH[:B, :, :H], average_BHK, log_scale_BH[:B, :H]),
        restart_BT=case.restart_BT[:B],
        weights=(rng.normal(size=(B, T, H, K)), rng.normal(size=(B, H, K))),
        dtype=dtype,
    )


def _cut(case, T):
    input_BTHK, log_gate_BTH, log_decay_BTH, *state = case.arrays
    return dataclasses.replace(
        case,
        arrays=(input_BTHK[:, :T], log_gate_BTH[:, :T], log_decay_BTH[:, :T], *state),
        restart_BT=case.restart_BT[:, :T],
    )


def _check(case, chunk):
    expected = shared.expected(case)
    measured = shared.measured(case, expected["unit_BH"], _operation(chunk))
    interpreted.assert_no_races()
    # As for the XLA path; bfloat16 keeps 8 bits.
    tolerance = 2e-2 if case.dtype == "bfloat16" else 2e-5
    for result in shared.NAMES:
        if not case.has_state and result in ("d_average", "d_log_scale"):
            continue
        largest = np.abs(expected[result]).max()
        limit = tolerance * (largest if case.name == "tiny_decay" else max(1.0, largest))
        np.testing.assert_allclose(measured[result], expected[result], rtol=0, atol=limit, err_msg=result)


# A block holds four chunks: 70 positions in chunks of 8 are three blocks, the last one in part.
_NAMES = (
    "from_a_state",
    "from_an_empty_state",
    "extreme_gates",
    "some_memory",
    "all_memory",
    "tiny_decay",
    "zero_inputs",
    "all_zero",
    "documents_of_one_position",
    "short_documents",
    "bfloat16",
)


@pytest.mark.parametrize("name", _slow_but(_NAMES))
def test_values_and_gradients(name):
    _check(_resized(_CASES[name], B=1, H=1, K=64), chunk=8)


@pytest.mark.parametrize("name", _slow_but(("one_position", "one_position_restarts_despite_a_state")))
def test_one_position(name):
    _check(_resized(_CASES[name], B=1, H=1, K=64), chunk=None)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "T", "chunk"), [("float32", 100, 12), ("bfloat16", 150, None)])
def test_rows_heads_and_the_width_of_128(dtype, T, chunk):
    case = _cut(_CASES["long"], T)
    _check(_resized(case, B=2, H=2, K=128, dtype=dtype), chunk=chunk)


def test_nothing_crosses_a_restart():
    """Bit for bit: a neighbour in a packed row must not move a rounding, wherever the chunks are cut."""
    T, cut = 70, 27
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(1, T, 1, *K)), jnp.float32) for K in ((64,), (), ())]
    arrays[2] = -jnp.abs(arrays[2])
    changed = [array.at[:, :cut].multiply(3.0) for array in arrays]
    restart_BT = jnp.zeros((1, T), bool).at[:, cut].set(True)
    operation = jax.jit(_operation(8))
    before, state_before = operation(*arrays, restart_BT, None)
    after, state_after = operation(*changed, restart_BT, None)
    np.testing.assert_array_equal(before[:, cut:], after[:, cut:])
    jax.tree.map(np.testing.assert_array_equal, state_before, state_after)
    assert np.abs(np.asarray(before - after)[:, :cut]).max() > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("K", [64, 128])
def test_the_program_for_a_gpu_has_four_kernels(K, dtype):
    """Lowering alone needs no GPU; it fails where shared memory or a register layout does not fit. Under shard_map."""
    B, T, H = 2, 1024, 2
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(
        lambda *arrays: leaky_average_hopper(*arrays, None), mesh=mesh, in_specs=(spec,) * 4, out_specs=spec
    )

    def loss(arrays, restart_BT):
        output_BTHK, state = sharded(*arrays, restart_BT)
        return jnp.sum(output_BTHK.astype(jnp.float32)) + jnp.sum(state.average_BHK)

    factor_BTH = jax.ShapeDtypeStruct((B, T, H), jnp.float32)
    arrays = (jax.ShapeDtypeStruct((B, T, H, K), dtype), factor_BTH, factor_BTH)
    traced = jax.jit(jax.grad(loss)).trace(arrays, jax.ShapeDtypeStruct((B, T), jnp.bool_))
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu", program)) == 4


@pytest.mark.parametrize(
    ("K", "chunk", "message"),
    [
        (
            96,
            None,
            "input_BTHK has width K = 96; legal for the Hopper kernels are 64, 128; implementation='xla' takes any",
        ),
        (64, 6, "chunk is 6; legal are None and the multiples of 4 up to 256"),
        (64, 512, "chunk is 512; legal are None and the multiples of 4 up to 256"),
    ],
)
def test_errors_name_what_is_legal(K, chunk, message):
    arrays = jnp.zeros((1, 8, 1, K)), jnp.zeros((1, 8, 1)), jnp.zeros((1, 8, 1)), jnp.zeros((1, 8), bool)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        leaky_average_hopper(*arrays, None, chunk=chunk)
