"""Losses: sums and weights that add up, in the right precision."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.models.losses import cross_entropy, unembed


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
