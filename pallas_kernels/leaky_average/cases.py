"""Cases of `leaky_average` for all its implementations, on any device, and the float64 answer to compare with.

For tests, and for the checks on a GPU (`launch/gpu`); no model uses it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.leaky_average.reference import LeakyState

Operation = Callable[..., tuple[jax.Array, LeakyState]]
B, H, K = 2, 2, 4
NAMES = ("output", "state", "d_input", "d_log_gate", "d_log_decay", "d_average", "d_log_scale")


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: all arrays are float64, or bool for restart. `weights` make a loss of the two outputs."""

    name: str
    arrays: tuple[np.ndarray, ...]  # input_BTHK, log_gate_BTH, log_decay_BTH, average_BHK, log_scale_BH
    restart_BT: np.ndarray
    weights: tuple[np.ndarray, np.ndarray]
    has_state: bool  # the two last arrays are given as the initial state; else None is
    dtype: str = "float32"


def cases() -> Iterator[Case]:
    """Everything that has its own way of going wrong; of one T where it does not matter, to compile once."""
    T = 70
    yield _case("random", T, has_state=False)
    yield _case("one_position", 1)
    yield _case("one_position_from_a_state", 1, start=True)
    yield _case("one_position_restarts_despite_a_state", 1, start=True, restart=np.ones((B, 1), bool))
    yield _case("long", 1000, start=True, restart=_spread(1000, 0.01))
    yield _case("from_a_state", T, start=True)
    yield _case("from_an_empty_state", T, start=True, log_scale=np.full((B, H), -np.inf))
    yield _case("from_a_large_state", T, start=True, log_scale=np.full((B, H), 95.0))
    yield _case("extreme_gates", T, start=True, log_gate=_pick(T, [-100.0, 0.0, 100.0]), restart=_spread(T, 0.1))
    yield _case("closed_gates", T, log_gate=_pick(T, [-np.inf, 0.0]))
    yield _case("no_memory", T, start=True, log_decay=np.full((B, T, H), -np.inf))
    yield _case("some_memory", T, start=True, log_decay=_pick(T, [-np.inf, -0.1]))
    yield _case("all_memory", T, log_decay=np.zeros((B, T, H)))
    yield _case("tiny_decay", T, start=True, log_decay=np.full((B, T, H), math.log(1e-6)))
    yield _case("zero_inputs", T, keep=_spread(T, 0.3), restart=_spread(T, 0.3, seed=7))
    yield _case("all_zero", T, keep=np.zeros((B, T), bool))
    yield _case("documents_of_one_position", T, start=True, restart=np.ones((B, T), bool))
    yield _case("short_documents", T, start=True, restart=_spread(T, 0.6))
    yield _case("bfloat16", T, start=True, restart=_spread(T, 0.1), dtype="bfloat16")


def _case(
    name: str,
    T: int,
    *,
    start: bool = False,
    has_state: bool = True,
    keep: np.ndarray | None = None,
    log_gate: np.ndarray | None = None,
    log_decay: np.ndarray | None = None,
    log_scale: np.ndarray | None = None,
    restart: np.ndarray | None = None,
    dtype: str = "float32",
) -> Case:
    rng = np.random.default_rng(T)
    input_BTHK = rng.normal(size=(B, T, H, K))
    if keep is not None:
        input_BTHK *= keep[:, :, None, None]
    log_gate = rng.normal(size=(B, T, H)) if log_gate is None else log_gate
    log_decay = -np.abs(rng.normal(size=(B, T, H))) if log_decay is None else log_decay
    average_BHK = rng.normal(size=(B, H, K))
    log_scale = rng.normal(size=(B, H)) if log_scale is None else log_scale
    if not start:  # the zero state
        average_BHK, log_scale = np.zeros((B, H, K)), np.full((B, H), -np.inf)
    # What a float32 or bfloat16 argument cannot hold is not an error of the operation.
    input_BTHK = np.asarray(jnp.asarray(input_BTHK, dtype), np.float64)
    rest = (np.asarray(array, np.float32).astype(np.float64) for array in (log_gate, log_decay, average_BHK, log_scale))
    return Case(
        name=name,
        arrays=(input_BTHK, *rest),
        restart_BT=np.zeros((B, T), bool) if restart is None else restart,
        weights=(rng.normal(size=(B, T, H, K)), rng.normal(size=(B, H, K))),
        has_state=has_state,
        dtype=dtype,
    )


def _spread(T: int, share: float, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).random((B, T)) < share


def _pick(T: int, values: list[float]) -> np.ndarray:
    return np.random.default_rng(6).choice(values, size=(B, T, H))


def expected(case: Case) -> dict[str, np.ndarray]:
    """The answer in float64, and the log-scale at which final states are compared."""
    unit_BH = unit(case)
    with jax.enable_x64(True):
        problem = jax.tree.map(jnp.asarray, (case.arrays, case.restart_BT, case.weights, unit_BH))
        return _named(_value_and_gradients(*problem, _plain)) | {"unit_BH": unit_BH}


def measured(case: Case, unit_BH: np.ndarray, operation: Operation) -> dict[str, np.ndarray]:
    """The same numbers from an implementation."""
    input_BTHK, *rest = case.arrays
    arrays = (jnp.asarray(input_BTHK, case.dtype), *(jnp.asarray(array, jnp.float32) for array in rest))
    weights = tuple(jnp.asarray(weight, jnp.float32) for weight in case.weights)
    restart_BT, unit = jnp.asarray(case.restart_BT), jnp.asarray(unit_BH, jnp.float32)
    return _named(_value_and_gradients(arrays, restart_BT, weights, unit, operation, case.has_state))


@functools.partial(jax.jit, static_argnames=("operation", "has_state"))
def _value_and_gradients(
    arrays: tuple[jax.Array, ...],
    restart_BT: jax.Array,
    weights: tuple[jax.Array, jax.Array],
    unit_BH: jax.Array,
    operation: Operation,
    has_state: bool = True,
) -> tuple[jax.Array, ...]:
    def loss(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        state = LeakyState(*arrays[3:]) if has_state else None
        output_BTHK, final = operation(*arrays[:3], restart_BT, state)
        state_BHK = jnp.exp(final.log_scale_BH - unit_BH)[..., None] * final.average_BHK
        on_output = jnp.sum(weights[0] * output_BTHK.astype(unit_BH.dtype))
        return on_output + jnp.sum(weights[1] * state_BHK), (output_BTHK, state_BHK)

    (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
    return (*outputs, *gradients)


def _named(results: tuple[jax.Array, ...]) -> dict[str, np.ndarray]:
    return {name: np.asarray(array).astype(np.float64) for name, array in zip(NAMES, results, strict=True)}


def _plain(
    input_BTHK: jax.Array,
    log_gate_BTH: jax.Array,
    log_decay_BTH: jax.Array,
    restart_BT: jax.Array,
    initial: LeakyState,
) -> tuple[jax.Array, LeakyState]:
    """The equation as it stands: in float64 exp(±100) needs no care."""

    def step(mean_BHK: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        input_BHK, log_gate_BH, log_decay_BH, restart_B = now
        decay_BH = jnp.where(restart_B[:, None], 0, jnp.exp(log_decay_BH))
        mean_BHK = jnp.exp(log_gate_BH)[..., None] * input_BHK + decay_BH[..., None] * mean_BHK
        square_BH1 = jnp.sum(mean_BHK**2, axis=-1, keepdims=True)
        norm_BH1 = jnp.sqrt(jnp.where(square_BH1 > 0, square_BH1, 1))
        return mean_BHK, jnp.where(square_BH1 > 0, mean_BHK / norm_BH1, 0)

    sequences = (input_BTHK, log_gate_BTH, log_decay_BTH, restart_BT)
    initial_BHK = jnp.exp(initial.log_scale_BH)[..., None] * initial.average_BHK
    last_BHK, output_TBHK = lax.scan(step, initial_BHK, tuple(jnp.moveaxis(x, 1, 0) for x in sequences))
    return jnp.moveaxis(output_TBHK, 0, 1), LeakyState(last_BHK, jnp.zeros_like(initial.log_scale_BH))


def unit(case: Case) -> np.ndarray:
    """The size of the largest term in k̄ at the last position, as a logarithm: states are compared in this unit."""
    _, log_gate_BTH, log_decay_BTH, _, unit_BH = case.arrays
    for t in range(case.restart_BT.shape[1]):
        kept_BH = np.where(case.restart_BT[:, t, None], -np.inf, unit_BH + log_decay_BTH[:, t])
        unit_BH = np.maximum(kept_BH, log_gate_BTH[:, t])
    return np.where(np.isfinite(unit_BH), unit_BH, 0.0)
