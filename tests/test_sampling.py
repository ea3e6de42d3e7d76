"""Sampling: exactly k are kept, temperature zero is argmax, draws follow the softmax, rows are independent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.generation.sampling import keep_top_k, sample_token

draw = jax.jit(sample_token, static_argnums=3)


@pytest.mark.parametrize("k", [1, 3, 8, 100])
def test_exactly_k_are_kept_also_of_equal_ones(k):
    logits = jnp.array([[0.0, 1, 1, 1, 0, 1, -2, 1], [5, 5, 5, 5, 5, 5, 5, 5], [7, 6, 5, 4, 3, 2, 1, 0]])
    kept = np.array(keep_top_k(logits, k))
    finite = np.isfinite(kept)
    assert (finite.sum(-1) == min(k, 8)).all()
    np.testing.assert_array_equal(kept[finite], np.array(logits)[finite])
    for row, stays in zip(np.array(logits), finite, strict=True):
        assert row[stays].min() >= row[~stays].max(initial=-np.inf)
        np.testing.assert_array_equal(np.flatnonzero(stays), np.sort(np.argsort(-row, kind="stable")[:k]))


def test_temperature_zero_is_argmax():
    logits = jax.random.normal(jax.random.key(0), (64, 20))
    for seed in range(3):
        tokens = draw(logits, jax.random.split(jax.random.key(seed), 64), jnp.float32(0), None)
        np.testing.assert_array_equal(tokens, logits.argmax(-1))
    assert tokens.dtype == jnp.int32


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 4)])
def test_draws_follow_the_softmax(temperature, top_k):
    logits = np.array([1.0, 0.0, -1.0, 2.0, 0.5, -0.5], np.float32)
    scaled = logits / temperature
    if top_k is not None:
        scaled[np.argsort(-logits)[top_k:]] = -np.inf
    expected = np.exp(scaled) / np.exp(scaled).sum()
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)
    tokens = draw(jnp.broadcast_to(logits, (count, 6)), keys, jnp.float32(temperature), top_k)
    observed = np.bincount(tokens, minlength=6)
    possible = expected > 0
    assert not observed[~possible].any()
    chi_squared = np.sum((observed - count * expected)[possible] ** 2 / (count * expected[possible]))
    assert chi_squared < 20.5  # five degrees of freedom: a fair sampler exceeds this once in a thousand seeds


def test_a_rows_draw_depends_on_no_other_row():
    logits = jax.random.normal(jax.random.key(0), (50, 12))
    keys = jax.random.split(jax.random.key(1), 50)
    together = draw(logits, keys, jnp.float32(1.0), 5)
    np.testing.assert_array_equal(together[10:13], draw(logits[10:13], keys[10:13], jnp.float32(1.0), 5))
    others = jnp.flip(logits, -1).at[7].set(logits[7])
    assert draw(others, keys, jnp.float32(1.0), 5)[7] == together[7]
    same = draw(jnp.zeros((50, 12)), keys, jnp.float32(1.0), None)
    assert len(np.unique(same)) > 6
