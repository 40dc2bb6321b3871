"""Every implementation of `leaky_average` against float64, its properties, and its error messages."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.leaky_average import LeakyState, blockwise, leaky_average
from pallas_kernels.leaky_average import cases as shared

IMPLEMENTATIONS = ("reference", "xla")
CASES = {case.name: case for case in shared.cases()}
_expected = functools.cache(lambda name: shared.expected(CASES[name]))
_OPERATIONS = {name: functools.partial(leaky_average, implementation=name) for name in IMPLEMENTATIONS}
_jitted = jax.jit(leaky_average, static_argnames="implementation")


def _random(T, seed=0):
    rng = np.random.default_rng(seed)
    shape = (shared.B, T, shared.H)
    restart_BT = rng.random(shape[:2]) < 0.1
    arrays = rng.normal(size=(*shape, shared.K)), rng.normal(size=shape), -np.abs(rng.normal(size=shape))
    return (*(jnp.asarray(array, jnp.float32) for array in arrays), jnp.asarray(restart_BT))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, implementation):
    case, expected = CASES[name], _expected(name)
    measured = shared.measured(case, expected["unit_BH"], _OPERATIONS[implementation])
    # bfloat16 keeps 8 bits: of the output, of its cotangent, and of the key that the backward pass reads.
    tolerance = 2e-2 if case.dtype == "bfloat16" else 2e-5
    for result in shared.NAMES:
        if not case.has_state and result in ("d_average", "d_log_scale"):
            continue
        largest = np.abs(expected[result]).max()
        # Relative at a tiny decay, whose gradient is as tiny: this is where differences of summed logarithms fail.
        limit = tolerance * (largest if name == "tiny_decay" else max(1.0, largest))
        np.testing.assert_allclose(measured[result], expected[result], rtol=0, atol=limit, err_msg=result)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_sequence_in_two_parts_is_the_whole(implementation):
    T, cut = 64, 32  # whole chunks
    *arrays, restart_BT = _random(T)
    weight_K = jnp.arange(1.0, shared.K + 1)
    operation = _OPERATIONS[implementation]

    def whole(arrays):
        return operation(*arrays, restart_BT)

    def parts(arrays):
        first_BTHK, state = operation(*(array[:, :cut] for array in (*arrays, restart_BT)))
        rest_BTHK, state = operation(*(array[:, cut:] for array in (*arrays, restart_BT)), state)
        return jnp.concatenate([first_BTHK, rest_BTHK], axis=1), state

    def loss(function, arrays):
        output_BTHK, state = function(arrays)
        mean_BHK = jnp.exp(state.log_scale_BH)[..., None] * state.average_BHK
        return jnp.sum(output_BTHK * weight_K[None, None, None]) + jnp.sum(mean_BHK), (output_BTHK, mean_BHK)

    results = [
        jax.jit(jax.value_and_grad(functools.partial(loss, function), has_aux=True))(arrays)
        for function in (whole, parts)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), *results)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_document_is_the_same_packed_or_alone(implementation):
    lengths = (35, 1, 1, 35)
    input_BTHK, log_gate_BTH, log_decay_BTH, _ = _random(sum(lengths))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    restart_BT = jnp.zeros((shared.B, sum(lengths)), bool).at[:, starts[:-1]].set(True)
    arrays = (input_BTHK, log_gate_BTH, log_decay_BTH, restart_BT)
    packed_BTHK, final = _jitted(*arrays, implementation=implementation)
    for start, stop in itertools.pairwise(starts):
        alone_BTHK, state = _jitted(*(array[:, start:stop] for array in arrays), implementation=implementation)
        np.testing.assert_allclose(packed_BTHK[:, start:stop], alone_BTHK, rtol=0, atol=1e-6)
    for part, expected in zip(final, state, strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_crosses_a_restart_or_comes_from_the_future(implementation):
    """Bit for bit: a neighbour in a packed row must not move a rounding."""
    T, cut = 72, 27
    *arrays, restart_BT = _random(T)
    restart_BT = restart_BT.at[:, cut].set(True)
    changed = [array.at[:, :cut].multiply(3.0) for array in arrays]
    before, state_before = _jitted(*arrays, restart_BT, implementation=implementation)
    after, state_after = _jitted(*changed, restart_BT, implementation=implementation)
    np.testing.assert_array_equal(before[:, cut:], after[:, cut:])
    jax.tree.map(np.testing.assert_array_equal, state_before, state_after)
    assert np.abs(np.asarray(before - after)[:, :cut]).max() > 0.1

    later = [array.at[:, cut - 1 :].multiply(3.0) for array in arrays]
    np.testing.assert_array_equal(
        before[:, : cut - 1], _jitted(*later, restart_BT, implementation=implementation)[0][:, : cut - 1]
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shift", [-64.0, 64.0])
def test_a_common_factor_of_all_gates_changes_nothing(shift, implementation):
    input_BTHK, log_gate_BTH, log_decay_BTH, restart_BT = _random(72)
    plain, state = _jitted(input_BTHK, log_gate_BTH, log_decay_BTH, restart_BT, implementation=implementation)
    scaled, scaled_state = _jitted(
        input_BTHK, log_gate_BTH + shift, log_decay_BTH, restart_BT, implementation=implementation
    )
    np.testing.assert_allclose(plain, scaled, rtol=0, atol=2e-5)
    np.testing.assert_allclose(state.log_scale_BH + shift, scaled_state.log_scale_BH, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dtypes(implementation):
    input_BTHK, *rest = _random(20)
    output_BTHK, state = jax.eval_shape(_OPERATIONS[implementation], input_BTHK.astype(jnp.bfloat16), *rest)
    assert output_BTHK.dtype == jnp.bfloat16
    assert {part.dtype for part in state} == {jnp.dtype("float32")}


def test_the_reference_computes_in_float64():
    with jax.enable_x64(True):
        arrays = [jax.ShapeDtypeStruct(array.shape, jnp.float64) for array in _random(5)[:3]]
        restart_BT = jax.ShapeDtypeStruct((shared.B, 5), jnp.bool_)
        output_BTHK, state = jax.eval_shape(_OPERATIONS["reference"], *arrays, restart_BT)
        assert {output_BTHK.dtype, *(part.dtype for part in state)} == {jnp.dtype("float64")}


def test_the_backward_pass_keeps_no_second_copy_of_the_input():
    """Memory: of the arrays as large as the input, only the input itself and the output are kept."""
    T = 40
    arrays = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in _random(T)]
    _, residuals = jax.eval_shape(
        blockwise._forward, arrays[0], arrays[1], arrays[2], arrays[0].update(shape=(2, 2, 4))
    )
    assert sum(residual.size >= arrays[0].size for residual in residuals) == 2


def test_works_under_shard_map():
    """Loop carries must vary over the mesh axes of the input, also when no initial state is given."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = _random(33)
    for implementation in IMPLEMENTATIONS:
        spec = jax.sharding.PartitionSpec("data")
        sharded = jax.shard_map(_OPERATIONS[implementation], mesh=mesh, in_specs=(spec,) * 4, out_specs=spec)

        def loss(input_BTHK, sharded=sharded):
            return jnp.sum(sharded(input_BTHK, *arrays[1:])[0][..., 0])

        assert np.isfinite(jax.jit(jax.grad(loss))(arrays[0])).all()


_ZEROS = functools.partial(jnp.zeros, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"implementation": "fast"}, "implementation is 'fast'; legal: None, 'hopper', 'xla', 'reference'"),
        (
            {"input_BTHK": _ZEROS((2, 3, 4))},
            "input_BTHK has shape (2, 3, 4); legal are four dimensions [B, T, H, K], none empty",
        ),
        (
            {"input_BTHK": _ZEROS((2, 0, 2, 4))},
            "input_BTHK has shape (2, 0, 2, 4); legal are four dimensions [B, T, H, K], none empty",
        ),
        (
            {"input_BTHK": jnp.zeros((2, 3, 2, 4), jnp.int32)},
            "input_BTHK has dtype int32; legal for implementation 'xla' are float32, bfloat16",
        ),
        ({"log_gate_BTH": _ZEROS((2, 3, 1))}, "log_gate_BTH has shape (2, 3, 1); legal beside this input is (2, 3, 2)"),
        (
            {"log_gate_BTH": jnp.zeros((2, 3, 2), jnp.int32)},
            "log_gate_BTH has dtype int32; legal are the floating dtypes",
        ),
        (
            {"log_decay_BTH": _ZEROS((2, 4, 2))},
            "log_decay_BTH has shape (2, 4, 2); legal beside this input is (2, 3, 2)",
        ),
        ({"log_decay_BTH": jnp.zeros((2, 3, 2), bool)}, "log_decay_BTH has dtype bool; legal are the floating dtypes"),
        ({"restart_BT": jnp.zeros((3, 2), bool)}, "restart_BT has shape (3, 2); legal beside this input is (2, 3)"),
        ({"restart_BT": jnp.zeros((2, 3), jnp.int32)}, "restart_BT has dtype int32; legal is bool"),
        (
            {"log_decay_BTH": jnp.full((2, 3, 2), 0.5)},
            "log_decay_BTH holds values up to 0.5; legal: at most 0 (a decay of at most 1)",
        ),
        ({"initial": (_ZEROS((2, 2, 4)), _ZEROS((2, 2)))}, "initial is a tuple; legal are None and LeakyState"),
        (
            {"initial": LeakyState(_ZEROS((2, 2, 5)), _ZEROS((2, 2)))},
            "initial.average_BHK has shape (2, 2, 5); legal beside this input is (2, 2, 4)",
        ),
        (
            {"initial": LeakyState(_ZEROS((2, 2, 4)), jnp.zeros((2, 2), jnp.int32))},
            "initial.log_scale_BH has dtype int32; legal are the floating dtypes",
        ),
    ],
)
def test_errors_name_the_argument_its_value_and_what_is_legal(changes, message):
    arguments = {
        "input_BTHK": _ZEROS((2, 3, 2, 4)),
        "log_gate_BTH": _ZEROS((2, 3, 2)),
        "log_decay_BTH": _ZEROS((2, 3, 2)),
        "restart_BT": jnp.zeros((2, 3), bool),
        "implementation": "xla",
    }
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        leaky_average(**(arguments | changes))
