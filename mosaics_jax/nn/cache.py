"""Rings of stored pairs for decoding. Pair r of a row lies in slot r mod capacity."""

import jax
import jax.numpy as jnp


def fill(array_BTHK: jax.Array, length_B: jax.Array, count_B: jax.Array, capacity: int) -> jax.Array:
    """The ring after the first `count_B` pairs of prompts that are each row's last `length_B` positions."""
    slot_S = jnp.arange(capacity)
    last_lap_BS = (count_B[:, None] - 1 - slot_S) // capacity
    pair_BS = slot_S + capacity * last_lap_BS  # the newest pair of each slot; negative where there is none
    row_position_BS = array_BTHK.shape[1] - length_B[:, None] + jnp.maximum(pair_BS, 0)
    row_position_BS = jnp.minimum(row_position_BS, array_BTHK.shape[1] - 1)
    filled_BSHK = jnp.take_along_axis(array_BTHK, row_position_BS[..., None, None], axis=1)
    return jnp.where((pair_BS >= 0)[..., None, None], filled_BSHK, 0)


def write(array_BSHK: jax.Array, new_BHK: jax.Array, pair_B: jax.Array) -> jax.Array:
    """The ring with pair `pair_B` of each row in its slot."""
    slot_B = pair_B % array_BSHK.shape[1]
    return array_BSHK.at[jnp.arange(array_BSHK.shape[0]), slot_B].set(new_BHK)


def followed(array_BSHK: jax.Array, count_B: jax.Array, new_BCHK: jax.Array) -> jax.Array:
    """The ring's pairs in order and the new ones after them: the first stands where pair `count_B` - capacity belongs.

    The ring holds the newest of `count_B` pairs; of those that were never there it has something, not to be seen.
    """
    capacity = array_BSHK.shape[1]
    slot_BS = (count_B[:, None] + jnp.arange(capacity)) % capacity
    return jnp.concatenate([jnp.take_along_axis(array_BSHK, slot_BS[..., None, None], axis=1), new_BCHK], axis=1)
