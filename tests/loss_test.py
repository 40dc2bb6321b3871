"""The chunked loss against a dense one in float64, its memory, and its types."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import array_sizes

from mosaics_jax.loss import next_token_loss

B, T, D, V = 2, 12, 5, 11


def _problem(dtype="float32"):
    """x_BTD, classifier_DV, targets_BT and weight_BT in float64; x holds what `dtype` can."""
    rng = np.random.default_rng(0)
    x_BTD = np.asarray(jnp.asarray(rng.normal(size=(B, T, D)), dtype), np.float64)
    classifier_DV = np.float64(np.float32(rng.normal(size=(D, V))))
    weight_BT = np.float64(np.float32(rng.random((B, T)))) * (rng.random((B, T)) < 0.7)
    assert (weight_BT == 0).any()
    return x_BTD, classifier_DV, rng.integers(0, V, (B, T)), weight_BT


@functools.partial(jax.jit, static_argnames="chunk")
def _measured(x_BTD, classifier_DV, targets_BT, weight_BT, chunk, scale=1.0):
    def loss(x_BTD, classifier_DV):
        return scale * next_token_loss(x_BTD, classifier_DV, targets_BT, weight_BT, chunk)

    return jax.value_and_grad(loss, argnums=(0, 1))(x_BTD, classifier_DV)


def _run(problem, chunk, dtype="float32", scale=1.0):
    x_BTD, classifier_DV, targets_BT, weight_BT = problem
    return _measured(
        jnp.asarray(x_BTD, dtype), np.float32(classifier_DV), np.int32(targets_BT), np.float32(weight_BT), chunk, scale
    )


def _expected(x_BTD, classifier_DV, targets_BT, weight_BT):
    """Value and gradients by hand: the gradient in the logits is weight · (softmax - target)."""
    logits_BTV = x_BTD @ classifier_DV
    log_total_BT1 = np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    target_BTV = np.eye(classifier_DV.shape[1])[targets_BT]
    loss = np.sum(weight_BT * (log_total_BT1[..., 0] - np.sum(logits_BTV * target_BTV, axis=-1)))
    error_BTV = weight_BT[..., None] * (np.exp(logits_BTV - log_total_BT1) - target_BTV)
    return loss, (error_BTV @ classifier_DV.T, np.einsum("BTD,BTV->DV", x_BTD, error_BTV))


# Of 24 tokens: the least, one that divides them, two that do not, all, more than all.
@pytest.mark.parametrize("chunk", [1, 8, 7, 10, 24, 1000])
def test_value_and_gradients(chunk):
    problem = _problem()
    loss, gradients = _run(problem, chunk)
    expected_loss, expected_gradients = _expected(*problem)
    assert math.isclose(loss, expected_loss, rel_tol=1e-6)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == jnp.float32
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=2e-6)


def test_the_value_without_a_gradient_is_the_same():
    """It is computed by another pass."""
    x_BTD, classifier_DV, targets_BT, weight_BT = _problem()
    alone = next_token_loss(
        jnp.float32(x_BTD), jnp.float32(classifier_DV), jnp.int32(targets_BT), jnp.float32(weight_BT), 10
    )
    assert alone.dtype == jnp.float32
    assert alone.shape == ()
    assert math.isclose(alone, _expected(x_BTD, classifier_DV, targets_BT, weight_BT)[0], rel_tol=1e-6)


@pytest.mark.parametrize("chunk", [10, 1000])
def test_what_has_no_weight_counts_for_nothing(chunk):
    """Bit for bit, whatever stands there."""
    x_BTD, classifier_DV, targets_BT, weight_BT = problem = _problem()
    padding_BT = weight_BT == 0
    changed = (
        np.where(padding_BT[..., None], 3 * x_BTD, x_BTD),
        classifier_DV,
        np.where(padding_BT, (targets_BT + 1) % V, targets_BT),
        weight_BT,
    )
    jax.tree.map(np.testing.assert_array_equal, _run(problem, chunk), _run(changed, chunk))
    assert not np.asarray(_run(problem, chunk)[1][0])[padding_BT].any()
    loss, gradients = _run((x_BTD, classifier_DV, targets_BT, np.zeros_like(weight_BT)), chunk)
    assert loss == 0
    assert not any(np.asarray(gradient).any() for gradient in gradients)


def test_a_factor_of_the_loss_is_a_factor_of_its_gradients():
    loss, gradients = _run(_problem(), 10)
    scaled_loss, scaled_gradients = _run(_problem(), 10, scale=3.0)
    assert math.isclose(scaled_loss, 3 * loss, rel_tol=1e-6)
    for gradient, scaled in zip(gradients, scaled_gradients, strict=True):
        np.testing.assert_allclose(scaled, 3 * gradient, rtol=1e-6)


def test_extreme_logits_overflow_nowhere():
    """Softmax is 0 or 1 here, and the loss the distance to the largest logit."""
    x_BTD, classifier_DV, targets_BT, weight_BT = _problem()
    loss, gradients = _run((1e4 * x_BTD, classifier_DV, targets_BT, weight_BT), 10)
    logits_BTV = 1e4 * x_BTD @ classifier_DV
    target_BT = np.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    assert math.isclose(loss, np.sum(weight_BT * (logits_BTV.max(-1) - target_BT)), rel_tol=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_bfloat16_activations_give_a_float32_loss():
    problem = _problem("bfloat16")
    loss, (x_grad_BTD, classifier_grad_DV) = _run(problem, 10, dtype="bfloat16")
    expected_loss, (expected_x_BTD, expected_classifier_DV) = _expected(*problem)
    assert loss.dtype == classifier_grad_DV.dtype == jnp.float32
    assert x_grad_BTD.dtype == jnp.bfloat16
    # The classifier is rounded to 8 bits, a relative error of 2^-9 in each of D products of a logit, and so is the
    # error that the gradients are made from; all signs are random, and 2e-2 is 10 roundings.
    assert math.isclose(loss, expected_loss, rel_tol=1e-2)
    np.testing.assert_allclose(np.float64(x_grad_BTD), expected_x_BTD, rtol=0, atol=2e-2 * np.abs(expected_x_BTD).max())
    np.testing.assert_allclose(
        classifier_grad_DV, expected_classifier_DV, rtol=0, atol=2e-2 * np.abs(expected_classifier_DV).max()
    )


def test_the_logits_are_never_held():
    """The largest array is the logits of one chunk, with and without gradients; nothing runs."""
    batch, time, width, vocabulary = 2, 64, 4, 1000
    arguments = (
        jax.ShapeDtypeStruct((batch, time, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((batch, time), jnp.int32),
        jax.ShapeDtypeStruct((batch, time), jnp.float32),
    )

    def largest(function, chunk):
        return max(array_sizes(jax.make_jaxpr(functools.partial(function, chunk=chunk))(*arguments)))

    for function in (_measured, next_token_loss):
        assert largest(function, 16) == 16 * vocabulary
        assert largest(function, 10_000) == batch * time * vocabulary  # the measure sees them where they are
