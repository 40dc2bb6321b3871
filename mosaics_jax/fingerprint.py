"""A number of 32 bits for each array of a state: the same on any mesh, on the device and from bytes read off a disk.

Along each axis in turn, the last first, with odd weights w_i = 2654435769 i | 1 and all sums mod 2^32:

    bits(x)_ij...k  ->  sum_k w_k bits(x)_ij...k  ->  ...  ->  one number

An odd weight never loses a bit, so a single wrong one always shows; any other damage passes once in 2^32 times. Integer
sums are exact in any order, so no mesh and no number of processes matters.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_FACTOR = np.uint32(2654435769)
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name: keys joined by points, as Orbax names what it writes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def of_tree(tree: Any) -> dict[str, jax.Array]:
    """uint32 fingerprints by name. Run it under jit: no array is then made whole anywhere."""
    return {name: _of_array(leaf) for name, leaf in named(tree).items()}


def of_numpy(array: np.ndarray) -> int:
    """The fingerprint of an array in the host's memory."""
    bits = np.asarray(array).view(_unsigned(array.dtype)).astype(np.uint32, copy=False)
    while bits.ndim:
        weights = np.arange(bits.shape[-1], dtype=np.uint32) * _FACTOR | np.uint32(1)
        bits = np.einsum("...k,k->...", bits, weights)
    return int(bits)


def _of_array(x: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(x, _unsigned(x.dtype)).astype(jnp.uint32)
    while bits.ndim:
        weights = lax.iota(jnp.uint32, bits.shape[-1]) * _FACTOR | np.uint32(1)
        bits = (bits * weights).sum(-1, dtype=jnp.uint32)
    return bits


def _unsigned(dtype: Any) -> Any:
    size = np.dtype(dtype).itemsize
    assert size in _UNSIGNED, f"no fingerprint for {dtype}"
    return _UNSIGNED[size]
