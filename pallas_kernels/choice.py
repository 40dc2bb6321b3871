"""Which implementation of an operation runs: settled by the device and the shapes while tracing, and logged once."""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Iterator, Sequence

import jax

_HOPPER = "9.0"
_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)
_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def compiling_for(capability: str) -> Iterator[None]:
    """Within: choices are made for a GPU of this compute capability, whatever this machine has.

    jax does not know of it: a function that was traced before, with the same shapes, keeps the choice of then.
    """
    token = _target.set(capability)
    try:
        yield
    finally:
        _target.reset(token)


def device() -> tuple[str, str]:
    """The device that programs are made for, in words, and its compute capability ("" where it is no NVIDIA GPU)."""
    if (target := _target.get()) is not None:
        return f"a GPU of compute capability {target}, not of this machine", target
    first = jax.local_devices()[0]
    return first.device_kind, str(getattr(first, "compute_capability", "")) if first.platform == "gpu" else ""


def no_hopper() -> str | None:
    """Why no Hopper kernel can run here, or None."""
    name, capability = device()
    if capability != _HOPPER:
        return f"it needs a GPU of compute capability {_HOPPER}, this is {name}"
    if _target.get() is None and jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes:
        return f"outside shard_map it is not divided over devices, of which there are {jax.device_count()}"
    return None


def choose(operation: str, implementation: str | None, obstacle: str | None, legal: Sequence[str]) -> str:
    """The implementation that runs.

    Args:
      implementation: what the caller names; None takes "hopper" where it can run and "xla" anywhere else.
      obstacle: why "hopper" cannot run on this device with these arguments; None where it can.

    Raises:
      ValueError: an implementation that is not in `legal`, or "hopper" where it cannot run.
    """
    if implementation is None:
        chosen = "hopper" if obstacle is None else "xla"
        _log_once(operation, chosen, "" if obstacle is None else f"; no Hopper kernel: {obstacle}")
        return chosen
    if implementation not in legal:
        raise ValueError(f"implementation is {implementation!r}; legal: None, {', '.join(map(repr, legal))}")
    if implementation == "hopper" and obstacle is not None:
        others = ", ".join(repr(name) for name in legal if name != "hopper")
        raise ValueError(f"implementation is 'hopper', which cannot run: {obstacle}; legal: None, {others}")
    return implementation


@functools.cache
def _log_once(operation: str, chosen: str, why: str) -> None:
    _logger.info("%s: implementation %r on %s%s", operation, chosen, device()[0], why)
