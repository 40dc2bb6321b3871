"""The definition of `retrieve`, dense and in the floating type of its inputs. For tests and for reading."""

import jax
import jax.numpy as jnp


def retrieve_reference(
    query_BTHK: jax.Array,
    key_BSHK: jax.Array,
    value_BSHV: jax.Array,
    bandwidth_BTH: jax.Array,
    start_BT: jax.Array,
    stop_BT: jax.Array,
) -> jax.Array:
    """softmax over [start, stop) of the scaled products, written with the whole T x S table."""
    stored_S = jnp.arange(key_BSHK.shape[1])
    visible_BTS = (start_BT[..., None] <= stored_S) & (stored_S < stop_BT[..., None])
    visible_BHTS = visible_BTS[:, None]
    product_BHTS = jnp.einsum("BTHK,BSHK->BHTS", query_BTHK, key_BSHK)
    score_BHTS = product_BHTS * bandwidth_BTH.swapaxes(1, 2)[..., None]
    # The two `where`s keep -inf out of the derivative: a row that sees nothing has no maximum to subtract.
    top_BHT1 = jnp.max(score_BHTS, axis=-1, keepdims=True, where=visible_BHTS, initial=-jnp.inf)
    top_BHT1 = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top_BHT1), top_BHT1, 0))
    weight_BHTS = jnp.where(visible_BHTS, jnp.exp(jnp.where(visible_BHTS, score_BHTS - top_BHT1, 0)), 0)
    total_BHT1 = weight_BHTS.sum(-1, keepdims=True)
    weight_BHTS = weight_BHTS / jnp.where(total_BHT1 > 0, total_BHT1, 1)
    return jnp.einsum("BHTS,BSHV->BTHV", weight_BHTS, value_BSHV).astype(value_BSHV.dtype)
