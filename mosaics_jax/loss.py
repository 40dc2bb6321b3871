"""The next-token loss, in chunks of tokens: B x T x vocabulary logits are never held."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mosaics_jax import dims
from mosaics_jax.collectives import gathered, greatest, index, scattered, total


def next_token_loss(
    x_BTD: jax.Array, classifier_DV: jax.Array, targets_BT: jax.Array, weight_BT: jax.Array, chunk: int
) -> jax.Array:
    """Σ_bt weight · -log softmax(x W)[target], in nats and float32.

    One pass computes the loss and, where a gradient is asked for, the gradients as well: the logits of a chunk are made
    once and never again, at the price of holding the two gradients from the forward pass on.

    Args:
      x_BTD: what the classifier reads. The matmuls run in its type, with float32 accumulation.
      classifier_DV: float32; on a mesh, this device's shard of it.
      targets_BT: ids of the next tokens.
      weight_BT: 0 where nothing is predicted: padding, and a document's end. Carries no gradient.
      chunk: tokens whose logits a device holds at once (of B rows together; at least one of each row).
    """
    return _loss(chunk, x_BTD, classifier_DV, targets_BT, weight_BT)


def _chunks(chunk: int, *arrays_BT: jax.Array) -> tuple[jax.Array, ...]:
    """Time cut into N chunks of C positions: [N, B, C, ...]; the padding is 0."""
    batch, time = arrays_BT[0].shape[:2]
    size = min(time, max(1, chunk // batch))
    padding = -time % size

    def cut(array_BTX: jax.Array) -> jax.Array:
        array_BTX = jnp.pad(array_BTX, [(0, 0), (0, padding)] + [(0, 0)] * (array_BTX.ndim - 2))
        return array_BTX.reshape(batch, (time + padding) // size, size, *array_BTX.shape[2:]).swapaxes(0, 1)

    return tuple(map(cut, arrays_BT))


class _Scores(NamedTuple):
    """The logits of a chunk, whole only along this device's part of the vocabulary, and what is known of all of it."""

    logits_BCV: jax.Array
    log_total_BC: jax.Array
    target_logit_BC: jax.Array
    top_BC: jax.Array


def _chunk_scores(x_BCD: jax.Array, classifier_DV: jax.Array, targets_BC: jax.Array) -> _Scores:
    logits_BCV = jnp.einsum("BCD,DV->BCV", x_BCD, classifier_DV, preferred_element_type=jnp.float32)
    top_BC1 = greatest(logits_BCV.max(axis=-1, keepdims=True), dims.TENSOR)
    own_target_BC = _own_target(targets_BC, classifier_DV)
    target_logit_BC = jnp.take_along_axis(logits_BCV, own_target_BC[..., None], axis=-1, mode="clip")[..., 0]
    target_is_here_BC = (own_target_BC >= 0) & (own_target_BC < classifier_DV.shape[1])
    sums = jnp.exp(logits_BCV - top_BC1).sum(axis=-1), jnp.where(target_is_here_BC, target_logit_BC, 0)
    exp_sum_BC, target_logit_BC = total(sums, dims.TENSOR)
    top_BC = top_BC1[..., 0]
    return _Scores(logits_BCV, jnp.log(exp_sum_BC) + top_BC, target_logit_BC, top_BC)


def _chunk_loss(
    x_BCD: jax.Array, classifier_DV: jax.Array, targets_BC: jax.Array, weight_BC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The chunk's weighted loss, its logits_BCV and their log-sum-exp."""
    scores = _chunk_scores(x_BCD, classifier_DV, targets_BC)
    # Padding's target may be any number.
    loss_BC = jnp.where(weight_BC == 0, 0, scores.log_total_BC - scores.target_logit_BC)
    return jnp.sum(weight_BC * loss_BC), scores.logits_BCV, scores.log_total_BC


def token_losses(
    x_BTD: jax.Array, classifier_DV: jax.Array, targets_BT: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """loss_BT = -log softmax(x W)[target] in nats and float32, and whether no other token is likelier.

    For evaluation: it is not differentiated. Arguments as of `next_token_loss`.
    """
    low_DV = gathered(classifier_DV, 0, x_BTD.dtype)

    def one(_: None, part: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        x_BCD, targets_BC = part
        scores = _chunk_scores(x_BCD, low_DV, targets_BC)
        return None, (scores.log_total_BC - scores.target_logit_BC, scores.target_logit_BC >= scores.top_BC)

    batch, time = targets_BT.shape
    _, found_NBC = lax.scan(one, None, _chunks(chunk, x_BTD, targets_BT))
    loss_BT, likeliest_BT = (array.swapaxes(0, 1).reshape(batch, -1)[:, :time] for array in found_NBC)
    return loss_BT, likeliest_BT


def _own_target(targets: jax.Array, classifier_DV: jax.Array) -> jax.Array:
    """Target ids counted from the first of this device's part of the vocabulary."""
    return targets - index(dims.TENSOR) * classifier_DV.shape[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(
    chunk: int, x_BTD: jax.Array, classifier_DV: jax.Array, targets_BT: jax.Array, weight_BT: jax.Array
) -> jax.Array:
    low_DV = gathered(classifier_DV, 0, x_BTD.dtype)

    def add(loss: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        x_BCD, targets_BC, weight_BC = part
        return loss + _chunk_loss(x_BCD, low_DV, targets_BC, weight_BC)[0], None

    return lax.scan(add, jnp.float32(0), _chunks(chunk, x_BTD, targets_BT, weight_BT))[0]


def _forward(
    chunk: int, x_BTD: jax.Array, classifier_DV: jax.Array, targets_BT: jax.Array, weight_BT: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    batch, time, width = x_BTD.shape
    low_DV = gathered(classifier_DV, 0, x_BTD.dtype)

    def add(
        carry: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        loss, classifier_grad_DV = carry
        x_BCD, targets_BC, weight_BC = part
        chunk_loss, logits_BCV, log_total_BC = _chunk_loss(x_BCD, low_DV, targets_BC, weight_BC)
        is_target_BCV = _own_target(targets_BC, low_DV)[..., None] == jnp.arange(low_DV.shape[1])
        error_BCV = (jnp.exp(logits_BCV - log_total_BC[..., None]) - is_target_BCV) * weight_BC[..., None]
        error_BCV = error_BCV.astype(x_BCD.dtype)
        x_grad_BCD = jnp.einsum("BCV,DV->BCD", error_BCV, low_DV)
        classifier_grad_DV += jnp.einsum("BCD,BCV->DV", x_BCD, error_BCV, preferred_element_type=jnp.float32)
        return (loss + chunk_loss, classifier_grad_DV), x_grad_BCD

    start = (jnp.float32(0), jnp.zeros(low_DV.shape, jnp.float32))
    (loss, classifier_grad_DV), x_grad_NBCD = lax.scan(add, start, _chunks(chunk, x_BTD, targets_BT, weight_BT))
    x_grad_BTD = x_grad_NBCD.swapaxes(0, 1).reshape(batch, -1, width)[:, :time]
    return loss, (total(x_grad_BTD, dims.TENSOR), scattered(classifier_grad_DV, 0))


def _backward(chunk: int, gradients: tuple[jax.Array, jax.Array], loss_grad: jax.Array) -> tuple[jax.Array | None, ...]:
    x_grad_BTD, classifier_grad_DV = gradients
    return (x_grad_BTD * loss_grad).astype(x_grad_BTD.dtype), classifier_grad_DV * loss_grad, None, None


_loss.defvjp(_forward, _backward)
