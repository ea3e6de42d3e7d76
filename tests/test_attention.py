"""Attention: the forms agree, causality is exact, dropout belongs to the row, the cache remembers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.models.attention import (
    KVCache,
    blocked_masked_self_attention,
    causal_mask,
    dropout,
    masked_self_attention,
    self_attention,
)


def random_heads(seed, batch, length, heads, head_width, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    return tuple(jax.random.normal(key, (batch, length, heads, head_width), dtype) for key in keys)


def test_self_attention_is_the_formula():
    query, key, value = random_heads(0, 2, 7, 3, 5)
    result = self_attention(query, key, value)
    for b in range(2):
        for n in range(3):
            scores = np.array(query[b, :, n]) @ np.array(key[b, :, n]).T / np.sqrt(5)
            weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            np.testing.assert_allclose(result[b, :, n], weights @ np.array(value[b, :, n]), atol=1e-5)


@pytest.mark.parametrize(("length", "block"), [(1, 4), (5, 4), (16, 4), (33, 8), (300, 128)])
def test_blocked_equals_reference_in_values_and_gradients(x64, length, block):
    inputs = random_heads(length, 2, length, 2, 4, jnp.float64)
    target = jax.random.normal(jax.random.key(9), inputs[0].shape, jnp.float64)

    def value_and_gradients(attend):
        return jax.value_and_grad(lambda qkv: jnp.sum(attend(*qkv) * target))(inputs)

    blocked = value_and_gradients(lambda *qkv: blocked_masked_self_attention(*qkv, block=block))
    reference = value_and_gradients(lambda *qkv: masked_self_attention(*qkv, implementation="reference"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), blocked, reference)


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
def test_a_later_token_changes_nothing_earlier(implementation):
    query, key, value = random_heads(3, 1, 150, 2, 8)
    before = masked_self_attention(query, key, value, implementation=implementation)
    changed = masked_self_attention(
        query.at[:, 140].add(9.0), key.at[:, 140].add(9.0), value.at[:, 140].add(9.0), implementation=implementation
    )
    np.testing.assert_array_equal(before[:, :140], changed[:, :140])
    assert not np.array_equal(before[:, 140:], changed[:, 140:])


def test_causal_mask_counts_from_the_offset():
    np.testing.assert_array_equal(causal_mask(2, 5, 2)[0, 0], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


def test_half_precision_scores_are_computed_in_float32():
    query, key, value = random_heads(4, 1, 64, 1, 32)
    exact = self_attention(query, key, value)
    half = self_attention(*(x.astype(jnp.bfloat16) for x in (query, key, value)))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=0.03)


def test_dropout_belongs_to_the_row_and_keeps_the_mean():
    x = jnp.ones((6, 50, 40))
    keys = jax.random.split(jax.random.key(0), 6)
    dropped = dropout(x, 0.3, keys)
    np.testing.assert_array_equal(dropped[2:4], dropout(x[2:4], 0.3, keys[2:4]))
    assert not np.array_equal(dropped[0], dropped[1])
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.7)}
    np.testing.assert_allclose(dropped.mean(), 1.0, atol=0.02)


def test_dropout_without_keys_is_the_identity():
    x = jnp.arange(6.0).reshape(2, 3)
    assert dropout(x, 0.5, None) is x


def test_cache_inserts_at_its_length_and_only_in_its_layer():
    cache = KVCache(key=jnp.zeros((3, 2, 8, 1, 4)), value=jnp.zeros((3, 2, 8, 1, 4)), length=jnp.int32(5))
    new = jax.random.normal(jax.random.key(0), (2, 2, 1, 4))
    cache, keys, values = cache.insert(jnp.int32(1), new, 2 * new)
    np.testing.assert_array_equal(keys[:, 5:7], new)
    np.testing.assert_array_equal(values[:, 5:7], 2 * new)
    assert not keys[:, :5].any() and not keys[:, 7:].any()
    assert not cache.key[0].any() and not cache.key[2].any()
