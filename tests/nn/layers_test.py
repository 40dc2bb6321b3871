"""Norms and the absolute value: values, and gradients where the plain formula has none."""

import jax
import jax.numpy as jnp
import numpy as np

from mosaics_jax.nn import layers


def test_rms_norm_is_the_formula():
    rng = np.random.default_rng(0)
    x_BTD, scale_D = rng.normal(size=(2, 3, 8)), rng.normal(size=8)
    x_BTD[0, 0] = 1e-3  # where epsilon counts
    x_BTD[1, 2] = 0
    expected = x_BTD / np.sqrt((x_BTD**2).mean(-1, keepdims=True) + 1e-5) * scale_D
    normed_BTD = layers.rms_norm(jnp.asarray(x_BTD, jnp.float32), jnp.asarray(scale_D, jnp.float32), 1e-5)
    np.testing.assert_allclose(normed_BTD, expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_computes_in_float32_and_keeps_the_type():
    x_BTD = jnp.asarray(300 * np.random.default_rng(1).normal(size=(1, 2, 64)), jnp.bfloat16)
    normed_BTD = layers.rms_norm(x_BTD, jnp.ones(64), 1e-5)
    assert normed_BTD.dtype == jnp.bfloat16
    exact_BTD = layers.rms_norm(x_BTD.astype(jnp.float32), jnp.ones(64), 1e-5)
    # One rounding to bfloat16 and no other.
    np.testing.assert_array_equal(normed_BTD, exact_BTD.astype(jnp.bfloat16))


def test_unit_norm_is_the_formula_at_every_size():
    rng = np.random.default_rng(2)
    x_BTHK = rng.normal(size=(2, 3, 2, 4)) * np.array([1e-12, 1.0, 1e12])[:, None, None]
    unit_BTHK = np.asarray(layers.unit_norm(jnp.asarray(x_BTHK, jnp.float32)))
    np.testing.assert_allclose(unit_BTHK, x_BTHK / np.linalg.norm(x_BTHK, axis=-1, keepdims=True), rtol=1e-5)


def test_unit_norm_of_a_zero_vector_is_zero_with_zero_gradient():
    x_BTHK = jnp.asarray([[[[0.0, 0.0]], [[3.0, 4.0]]]])
    unit_BTHK, gradient_BTHK = layers.unit_norm(x_BTHK), jax.grad(lambda x: layers.unit_norm(x)[..., 0].sum())(x_BTHK)
    np.testing.assert_allclose(unit_BTHK[0, :, 0], [[0, 0], [0.6, 0.8]], rtol=1e-6)
    # d(x/r)/dx = (1 - x²/r²)/r and d(x/r)/dy = -xy/r³ at (3, 4).
    np.testing.assert_allclose(gradient_BTHK[0, :, 0], [[0, 0], [16 / 125, -12 / 125]], rtol=1e-6)


def test_absolute_has_the_derivative_one_at_zero():
    x = jnp.asarray([-2.0, -0.5, 0.0, 3.0])
    np.testing.assert_array_equal(layers.absolute(x), [2, 0.5, 0, 3])
    np.testing.assert_array_equal(jax.grad(lambda x: layers.absolute(x).sum())(x), [-1, -1, 1, 1])
