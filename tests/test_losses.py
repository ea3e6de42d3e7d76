"""Losses: sums and weights that add up, in the right precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.models.losses import cross_entropy, smoothed_divergence, unembed


def test_cross_entropy_is_minus_the_log_of_the_targets_probability():
    logits = jax.random.normal(jax.random.key(0), (3, 4, 7)) * 3
    targets = jax.random.randint(jax.random.key(1), (3, 4), 0, 7)
    weights = jax.random.uniform(jax.random.key(2), (3, 4))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(probabilities, np.array(targets)[..., None], -1)[..., 0]) * weights
    total, weight = cross_entropy(logits, targets, weights)
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(weight, weights.sum(), rtol=1e-6)


def test_masked_targets_do_not_count_and_parts_add_up():
    logits = jax.random.normal(jax.random.key(0), (6, 5, 11))
    targets = jnp.zeros((6, 5), jnp.int32)  # id 0 is a token like any other
    weights = jnp.ones((6, 5)).at[:, 3:].set(0)
    total, weight = cross_entropy(logits, targets, weights)
    changed, _ = cross_entropy(logits.at[:, 3:].mul(50), targets, weights)
    assert total == changed and weight == 18
    halves = [cross_entropy(logits[part], targets[part], weights[part]) for part in (slice(0, 2), slice(2, 6))]
    np.testing.assert_allclose(total, sum(half[0] for half in halves), rtol=1e-6)


def test_huge_logits_stay_finite():
    total, _ = cross_entropy(jnp.array([[1e30, -1e30]]), jnp.array([0]), jnp.ones(1))
    assert total == 0


def test_unembed_keeps_half_precision_logits_in_float32():
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 8))
    head = jax.random.normal(jax.random.key(1), (5, 8))
    np.testing.assert_allclose(unembed(hidden, head), np.einsum("BTD,VD->BTV", hidden, head), atol=1e-5)
    assert unembed(hidden.astype(jnp.bfloat16), head).dtype == jnp.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_label_smoothing_is_a_divergence(x64, smoothing):
    """KL(q || p) from its definition, q the target's distribution; least, 0, where p is q."""
    size = 9
    logits = jax.random.normal(jax.random.key(0), (3, 4, size), "float64") * 2
    targets = jax.random.randint(jax.random.key(1), (3, 4), 0, size)
    q = (1 - smoothing) * np.eye(size)[targets] + smoothing / size
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.where(q > 0, q * np.log(np.where(q > 0, q, 1) / p), 0).sum(-1)
    divergence, nll = smoothed_divergence(logits, targets, smoothing)
    np.testing.assert_allclose(divergence, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(nll, -np.log((p * np.eye(size)[targets]).sum(-1)), rtol=1e-10)
    if smoothing:
        at_best, _ = smoothed_divergence(jnp.log(q), targets, smoothing)
        np.testing.assert_allclose(at_best, 0, atol=1e-12)
