"""From batch positions to intervals: which stored pairs each query may see.

Every kind of read is an interval [start, stop) of 0-based positions of the row; stop <= start sees nothing. The kinds
differ in nothing else (docs/design.md). Below, t is a position of the row, s_t where its document starts. What is here
may be a stretch of the row, which begins at its position `first`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Interval(NamedTuple):
    """The visible pairs of each query: stored positions [start, stop)."""

    start_BT: jax.Array
    stop_BT: jax.Array

    @property
    def count_BT(self) -> jax.Array:
        """The number n of pairs that the read can see."""
        return jnp.maximum(self.stop_BT - self.start_BT, 0)

    def among(self, first: jax.Array | int) -> "Interval":
        """The same pairs, as positions among stored ones of which the first is the row's `first`."""
        return Interval(self.start_BT - first, self.stop_BT - first)


def document_start(document_BT: jax.Array) -> jax.Array:
    """s_t: where the document of each position starts. A change of id starts a document; the ids' values are free."""
    position_T = jnp.arange(document_BT.shape[1], dtype=jnp.int32)
    changed_BT = jnp.diff(document_BT, axis=1, prepend=document_BT[:, :1]) != 0
    return lax.cummax(jnp.where(changed_BT, position_T, 0), axis=1)


def short_term(start_BT: jax.Array, window: int, first: jax.Array | int = 0) -> Interval:
    """Pairs t-h+1 .. t-1 of the document: the window h without the present pair (PAPER section 4)."""
    position_T = _position(start_BT, first)
    return Interval(jnp.maximum(start_BT, position_T - window + 1), jnp.broadcast_to(position_T, start_BT.shape))


def long_term(start_BT: jax.Array, delay: jax.Array | int, first: jax.Array | int = 0) -> Interval:
    """Pairs from the document's first to t-m."""
    position_T = _position(start_BT, first)
    return Interval(start_BT, jnp.maximum(start_BT, position_T - delay + 1))


def causal(start_BT: jax.Array, window: int | None = None, first: jax.Array | int = 0) -> Interval:
    """The transformer's reads: the document's pairs up to the present one and with it, the last `window` of them."""
    position_T = _position(start_BT, first)
    oldest_BT = start_BT if window is None else jnp.maximum(start_BT, position_T - window + 1)
    return Interval(oldest_BT, jnp.broadcast_to(position_T + 1, start_BT.shape))


def _position(start_BT: jax.Array, first: jax.Array | int) -> jax.Array:
    return first + jnp.arange(start_BT.shape[1], dtype=jnp.int32)
