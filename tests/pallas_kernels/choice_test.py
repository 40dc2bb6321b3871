"""Which implementation runs: chosen by device and shapes, logged once, explained, and refused where it cannot run."""

import functools
import logging

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import choice, retrieval
from pallas_kernels.leaky_average import leaky_average

NO_GPU = "it needs a GPU of compute capability 9.0, this is cpu"


def _retrieve(dtype=jnp.bfloat16, width=64, value_width=64, time=128):
    """Shapes alone."""
    query_BTHK = jax.ShapeDtypeStruct((1, time, 2, width), dtype)
    value_BSHV = jax.ShapeDtypeStruct((1, time, 2, value_width), dtype)
    end_BT = jax.ShapeDtypeStruct((1, time), jnp.int32)
    return query_BTHK, query_BTHK, value_BSHV, jax.ShapeDtypeStruct((1, time, 2), jnp.float32), end_BT, end_BT


def _leaky_average(dtype=jnp.bfloat16, width=64, time=128):
    gate_BTH = jax.ShapeDtypeStruct((1, time, 2), jnp.float32)
    restart_BT = jax.ShapeDtypeStruct((1, time), bool)
    return jax.ShapeDtypeStruct((1, time, 2, width), dtype), gate_BTH, gate_BTH, restart_BT


OPERATIONS = {"retrieve": (retrieval.retrieve, _retrieve), "leaky_average": (leaky_average, _leaky_average)}


@pytest.mark.parametrize("name", OPERATIONS)
def test_on_this_machine_it_is_xla_and_says_so_once(name, caplog):
    operation, arguments = OPERATIONS[name]
    choice._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=choice.__name__):
        program = str(jax.make_jaxpr(operation)(*arguments()))
        jax.eval_shape(operation, *arguments())
    assert "mpmd_map" not in program
    expected = f"{name}: implementation 'xla' on cpu; no Hopper kernel: {NO_GPU}"
    assert [record.getMessage() for record in caplog.records] == [expected]


@pytest.mark.parametrize("name", OPERATIONS)
def test_on_a_hopper_gpu_it_is_the_kernels_where_the_shapes_allow(name):
    operation, arguments = OPERATIONS[name]

    def program(**changes):
        return str(jax.make_jaxpr(lambda *a: operation(*a))(*arguments(**changes)))

    with choice.compiling_for("9.0"):
        assert "mpmd_map" in program()
        assert "mpmd_map" in program(width=128, **({"value_width": 128} if name == "retrieve" else {}))
        assert "mpmd_map" not in program(width=32)
        assert "mpmd_map" not in program(time=1)
    with choice.compiling_for("10.0"):
        assert "mpmd_map" not in program()


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_named_one_that_cannot_run_raises_and_says_which_can(name):
    operation, arguments = OPERATIONS[name]
    hopper = functools.partial(operation, implementation="hopper")
    with pytest.raises(
        ValueError, match=f"^implementation is 'hopper', which cannot run: {NO_GPU}; legal: None, 'xla'"
    ):
        jax.eval_shape(hopper, *arguments())
    with choice.compiling_for("9.0"), pytest.raises(ValueError, match=r"64 or 128.* 32.*'xla'"):
        jax.eval_shape(hopper, *arguments(width=32))


def test_describe(capsys):
    query_BTHK, _, value_BSHV, *_ = _retrieve()
    retrieval.describe(query_BTHK, value_BSHV)
    with choice.compiling_for("9.0"):
        retrieval.describe(query_BTHK, value_BSHV)
        float32 = _retrieve(dtype=jnp.float32)
        retrieval.describe(float32[0], float32[2])
    target = "a GPU of compute capability 9.0, not of this machine"
    assert capsys.readouterr().out.splitlines() == [
        f"retrieve: the blockwise XLA path, on cpu; no Hopper kernel: {NO_GPU}",
        f"retrieve: the Hopper kernels, on {target}",
        f"retrieve: the blockwise XLA path, on {target}; no Hopper kernel: it takes bfloat16, these are float32",
    ]
