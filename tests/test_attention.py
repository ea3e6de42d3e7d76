"""Attention: the forms agree, causality is exact, dropout belongs to the row, the cache remembers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.models.attention import (
    attend_to_cache,
    blocked_masked_self_attention,
    causal_mask,
    dropout,
    empty_cache,
    masked_self_attention,
    self_attention,
)


def random_heads(seed, batch, length, heads, head_width, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    return tuple(jnp.array(random.normal(size=(batch, length, heads, head_width)), dtype) for _ in range(3))


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
    target = random_heads(9, 2, length, 2, 4, jnp.float64)[0]

    def value_and_gradients(attend):
        return jax.jit(jax.value_and_grad(lambda qkv: jnp.sum(attend(*qkv) * target)))(inputs)

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


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
def test_a_scale_takes_the_place_of_the_root(implementation):
    query, key, value = random_heads(5, 2, 20, 2, 16)
    result = masked_self_attention(query, key, value, implementation=implementation, scale=0.6)
    np.testing.assert_allclose(result, masked_self_attention(query * 0.6 * 4, key, value), atol=1e-5)
    assert jnp.abs(result - masked_self_attention(query, key, value)).max() > 0.01


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


def random_cache(seed, lengths, capacity, layers=2, heads=2, head_width=4, dtype=jnp.float64):
    """A cache whose rows have these lengths; everything in it is random, also beyond them."""
    keys = [random_heads(seed + layer, len(lengths), capacity, heads, head_width, dtype)[:2] for layer in range(layers)]
    cache = empty_cache(len(lengths), capacity)
    for layer, (key, value) in enumerate(keys):
        assert not cache.has(layer)
        cache = cache.start(key, value)
        assert cache.has(layer)
    return dataclasses.replace(cache, length=jnp.array(lengths, jnp.int32))


def test_a_cache_starts_with_the_first_tokens_of_every_layer():
    key, value, _ = random_heads(0, 3, 5, 2, 4)
    cache = empty_cache(3, 8).start(key, value)
    assert cache.has(0) and not cache.has(1) and len(cache.start(value, key).key) == 2
    for array, first in ((cache.key[0], key), (cache.value[0], value)):
        assert array.shape == (3, 2, 8, 4)
        np.testing.assert_array_equal(array[:, :, :5], first.swapaxes(1, 2))
        assert not array[:, :, 5:].any()
    np.testing.assert_array_equal(cache.length, [0, 0, 0])  # it moves once all layers have theirs


@pytest.mark.parametrize("lengths", [[5], [0, 3, 6, 1]])
@pytest.mark.parametrize("count", [1, 2])
def test_a_cache_inserts_at_each_rows_length_and_only_in_its_layer(x64, lengths, count):
    before = random_cache(0, lengths, 8, layers=3)
    key, value, _ = random_heads(9, len(lengths), count, 2, 4, jnp.float64)
    after = before.insert(1, key, value)
    np.testing.assert_array_equal(after.length, before.length)
    for ours, old, new in ((after.key, before.key, key), (after.value, before.value, value)):
        for layer in (0, 2):
            np.testing.assert_array_equal(ours[layer], old[layer])
        expected = np.array(old[1])
        for row, length in enumerate(lengths):
            expected[row, :, length : length + count] = new[row].swapaxes(0, 1)
        np.testing.assert_array_equal(ours[1], expected)


def test_a_cache_gives_rows_in_any_order_and_number():
    cache, rows = random_cache(0, [1, 4, 2], 6, dtype=jnp.float32), np.array([2, 0, 2, 1, 2])
    taken = cache.take(jnp.array(rows))
    assert taken.capacity == 6
    np.testing.assert_array_equal(taken.length, [2, 1, 2, 4, 2])
    for layer in range(2):
        np.testing.assert_array_equal(taken.key[layer], cache.key[layer][rows])
        np.testing.assert_array_equal(taken.value[layer], cache.value[layer][rows])


@pytest.mark.parametrize(("count", "scale"), [(1, None), (3, None), (2, 0.7)])
def test_attention_to_the_cache_is_attention_to_each_rows_own_past(x64, count, scale):
    """Whatever stands beyond a row's length, be it huge: not one bit of it arrives."""
    lengths = [0, 5, 2, 8 - count]
    query, key, value = random_heads(1, 4, count, 2, 4, jnp.float64)
    cache = random_cache(2, lengths, 8).insert(1, key, value)
    attended = attend_to_cache(query, cache, 1, scale=scale)
    for row, length in enumerate(lengths):
        known = length + count
        past = [x[1][row : row + 1, :, :known].swapaxes(1, 2) for x in (cache.key, cache.value)]
        own = self_attention(query[row : row + 1], *past, mask=causal_mask(count, known, length), scale=scale)
        np.testing.assert_allclose(attended[row], own[0], atol=1e-12)

    beyond = jnp.arange(8) >= (cache.length + count)[:, None]
    garbage = jnp.where(beyond[:, None, :, None], 1e150, 0)
    spoiled = dataclasses.replace(
        cache, key=tuple(k + garbage for k in cache.key), value=tuple(v - garbage for v in cache.value)
    )
    np.testing.assert_array_equal(attend_to_cache(query, spoiled, 1, scale=scale), attended)


def test_half_precision_scores_of_the_cache_are_computed_in_float32():
    query, key, value = (x.astype(jnp.bfloat16) for x in random_heads(4, 2, 1, 2, 32))
    cache = random_cache(5, [63, 30], 64, head_width=32, dtype=jnp.bfloat16).insert(0, key, value)
    exact = dataclasses.replace(
        cache,
        key=tuple(k.astype(jnp.float32) for k in cache.key),
        value=tuple(v.astype(jnp.float32) for v in cache.value),
    )
    half = attend_to_cache(query, cache, 0)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        half.astype(jnp.float32), attend_to_cache(query.astype(jnp.float32), exact, 0), atol=0.03
    )
