"""The operation `leaky_average`: arguments are checked here, the work is done in `reference.py` and `blockwise.py`."""

from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import checks, choice
from pallas_kernels.leaky_average import blockwise, reference
from pallas_kernels.leaky_average.hopper import WIDTHS, leaky_average_hopper
from pallas_kernels.leaky_average.reference import LeakyState

_IMPLEMENTATIONS: Final[dict[str, Callable[..., tuple[jax.Array, LeakyState]]]] = {
    "hopper": leaky_average_hopper,
    "xla": blockwise.leaky_average,
    "reference": reference.leaky_average,
}
_INPUT_DTYPES = {"reference": ("float32", "bfloat16", "float64")}
_SHORTEST = 64  # positions for which the Hopper kernels are worth their launches; decoding takes one at a time


def leaky_average(
    input_BTHK: jax.Array,
    log_gate_BTH: jax.Array,
    log_decay_BTH: jax.Array,
    restart_BT: jax.Array,
    initial: LeakyState | None = None,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, LeakyState]:
    """Gated leaky average of the input over time, normalised: `(normalised_BTHK, final_state)`.

        k̄_t = g_t k̃_t + λ_t k̄_{t-1}        k_t = k̄_t / ||k̄_t||_2        g = exp(log_gate), λ = exp(log_decay)

    with k̃ the input and k the output (Memory Mosaics at scale, arXiv 2507.03285, eq. 8). At a restart k̄_{t-1} is taken
    as 0 and λ_t has no effect. Where k̄_t = 0 the output and its gradient are 0. Gates may be as large as exp(±100): k̄
    itself is never formed, only its ratio to a running scale. Adding a constant to every log_gate of a head changes no
    output. A term whose gate and decays are exp(-87) times smaller than the largest ones is lost to float32, also where
    those multiply an input of zero.

    Args:
      input_BTHK: k̃, float32 or bfloat16 (the reference takes float64 too, and then computes in it); float32 inside.
      log_gate_BTH: any floating dtype; -inf closes the gate.
      log_decay_BTH: any floating dtype, at most 0; -inf forgets everything.
      restart_BT: bool, true at the first position of every document.
      initial: the state before position 0, for a sequence that goes on from another call; None is the zero state.
      implementation: "hopper" (Mosaic GPU kernels: K of 64 or 128, compute capability 9.0), "xla" (any device and
        shape) or "reference" (a scan over time). None takes "hopper" where it can run, "xla" anywhere else, and logs
        once which and why.

    Returns:
      normalised_BTHK in the input's dtype, and the LeakyState after the last position: `average_BHK`, `log_scale_BH`,
      float32, meaning k̄ = exp(log_scale) average.

    Gradients reach input, log_gate, log_decay and both parts of `initial`, from the output and from `final_state`.
    There log_scale is a constant: a function of the product exp(log_scale) average gets its true gradient, through
    average; a function of one part alone does not. Reverse mode only ("xla" has its own backward pass).

    Raises:
      ValueError: an unknown implementation or one that cannot run here, an argument of the wrong shape or dtype, or a
        log_decay above 0 or NaN (checked where it is concrete, and inside jit under PALLAS_KERNELS_CHECK_VALUES=1); the
        message names it.
    """
    _check_input(input_BTHK)
    implementation = choice.choose("leaky_average", implementation, _obstacle(input_BTHK), tuple(_IMPLEMENTATIONS))
    legal = _INPUT_DTYPES.get(implementation, ("float32", "bfloat16"))
    if input_BTHK.dtype.name not in legal:
        raise ValueError(
            f"input_BTHK has dtype {input_BTHK.dtype}; "
            f"legal for implementation {implementation!r} are {', '.join(legal)}"
        )
    B, T, H, K = input_BTHK.shape
    _check_floating("log_gate_BTH", log_gate_BTH, (B, T, H))
    _check_floating("log_decay_BTH", log_decay_BTH, (B, T, H))
    checks.check_values(_check_decay, log_decay_BTH)
    _check_shape("restart_BT", restart_BT, (B, T))
    if restart_BT.dtype != jnp.bool_:
        raise ValueError(f"restart_BT has dtype {restart_BT.dtype}; legal is bool")
    if initial is not None:
        if not isinstance(initial, LeakyState):
            raise ValueError(f"initial is a {type(initial).__name__}; legal are None and LeakyState")
        _check_floating("initial.average_BHK", initial.average_BHK, (B, H, K))
        _check_floating("initial.log_scale_BH", initial.log_scale_BH, (B, H))
    return _IMPLEMENTATIONS[implementation](input_BTHK, log_gate_BTH, log_decay_BTH, restart_BT, initial)


def _obstacle(input_BTHK: Any) -> str | None:
    """Why this input cannot take the Hopper kernels here, or None."""
    _, time, _, width = input_BTHK.shape
    if (reason := choice.no_hopper()) is not None:
        return reason
    if width not in WIDTHS:
        return f"it takes a head width of {' or '.join(map(str, WIDTHS))}, this is {width}"
    if time < _SHORTEST:
        return f"it takes {_SHORTEST} positions or more, these are {time}"
    return None


def _check_input(input_BTHK: Any) -> None:
    if input_BTHK.ndim != 4 or 0 in input_BTHK.shape:
        raise ValueError(f"input_BTHK has shape {input_BTHK.shape}; legal are four dimensions [B, T, H, K], none empty")


def _check_decay(log_decay_BTH: np.ndarray) -> None:
    if not (greatest := log_decay_BTH.astype(np.float32).max()) <= 0:  # a NaN is not legal either
        raise ValueError(f"log_decay_BTH holds values up to {greatest}; legal: at most 0 (a decay of at most 1)")


def _check_floating(name: str, array: Any, shape: tuple[int, ...]) -> None:
    _check_shape(name, array, shape)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {array.dtype}; legal are the floating dtypes")


def _check_shape(name: str, array: Any, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; legal beside this input is {shape}")
