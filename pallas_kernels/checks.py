"""Checks of values: at once where they are concrete, which costs nothing; inside jit only where they are asked for."""

import os
from collections.abc import Callable
from typing import Any, Final

import jax
import numpy as np

VARIABLE: Final = "PALLAS_KERNELS_CHECK_VALUES"  # "1": programs traced from then on check what they are given


def check_values(check: Callable[..., None], *arrays: jax.Array) -> None:
    """`check` of the arrays as NumPy's; it raises what is wrong.

    Arrays that a program is being traced with have no values yet. Under PALLAS_KERNELS_CHECK_VALUES=1 the program
    itself looks at them, on the host, whenever it runs: for debugging, as the device waits. What `check` raises then
    comes out of the program as jax's error of a callback, with the same words.
    """
    if not any(isinstance(array, jax.core.Tracer) for array in arrays):
        check(*map(np.asarray, arrays))
    elif os.environ.get(VARIABLE) == "1":

        def on_host(*values: Any) -> None:
            check(*map(np.asarray, values))

        jax.debug.callback(on_host, *arrays)
