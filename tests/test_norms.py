"""Normalisation equals its formula, and its written-out gradients those that JAX derives from the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.models.norms import Norm, normalized, unit_mean_square


def formula(x, scale, bias, epsilon, centred=True):
    apart = x - x.mean(-1, keepdims=True) if centred else x
    y = apart / jnp.sqrt((apart**2).mean(-1, keepdims=True) + epsilon) * scale
    return y if bias is None else y + bias


@pytest.mark.parametrize(("bias", "centred"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("seed", range(2))
def test_value_and_gradients_are_the_formulas(x64, seed, bias, centred):
    random = np.random.default_rng(seed)
    rows, width = random.integers(1, 40), random.integers(2, 40)
    x, weights = (jnp.array(random.normal(1, 3, (rows, width))) for _ in range(2))
    parameters = (jnp.array(random.normal(size=width)), jnp.array(random.normal(size=width)) if bias else None)

    def values(function):
        def total(x, parameters):
            return jnp.sum(jnp.tanh(function(x, *parameters, 1e-5, centred)) * weights)

        return jax.jit(jax.value_and_grad(total, (0, 1)))(x, parameters)

    for ours, theirs in zip(*(jax.tree.leaves(values(f)) for f in (normalized, formula)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_moments_are_float32_where_activations_are_not():
    x = jnp.array(np.random.default_rng(0).normal(300, 1, (4, 512)), "bfloat16")
    norm = Norm(1e-5, compute_dtype="bfloat16")
    y = norm.apply(norm.init(jax.random.key(0), x), x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, "float32"), formula(np.asarray(x, "float32"), 1, 0, 1e-5), atol=0.02)


def test_unit_mean_square_is_what_it_says(x64):
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)) * 7
    y = unit_mean_square(jnp.array(x))
    np.testing.assert_allclose((y**2).mean(-1), 1, atol=1e-5)
    np.testing.assert_allclose(y / x, np.broadcast_to((y / x)[..., :1], x.shape), atol=1e-9)
