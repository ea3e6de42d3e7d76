"""The cache remembers: each row's own past, in any order of rows, and nothing beyond it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import random_heads

from jaxgpt.models.attention import causal_mask, reference_attention
from jaxgpt.models.cache import FEW_QUERIES, DecoderCache, attend_to_cache, attend_to_source, empty_cache


def random_cache(seed, lengths, capacity, layers=2, heads=2, head_width=4, dtype=jnp.float64):
    """A cache whose rows have these lengths; everything in it is random, also beyond them."""
    keys = [random_heads(seed + layer, len(lengths), capacity, heads, head_width, dtype)[:2] for layer in range(layers)]
    cache = empty_cache(len(lengths), capacity)
    for layer, (key, value) in enumerate(keys):
        assert not cache.has(layer)
        cache = cache.start(key, value)
        assert cache.has(layer)
    return dataclasses.replace(cache, length=jnp.array(lengths, jnp.int32))


def by_rows(array, rows):
    """The heads of each row apart."""
    return np.asarray(array).reshape(rows, -1, *array.shape[1:])


def test_a_cache_starts_with_the_first_tokens_of_every_layer():
    key, value, _ = random_heads(0, 3, 5, 2, 4)
    cache = empty_cache(3, 8).start(key, value)
    assert cache.has(0) and not cache.has(1) and len(cache.start(value, key).key) == 2
    for array, first in ((cache.key[0], key), (cache.value[0], value)):
        assert array.shape == (6, 8, 4)
        np.testing.assert_array_equal(by_rows(array, 3)[:, :, :5], first.swapaxes(1, 2))
        assert not array[:, 5:].any()
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
        expected = by_rows(old[1], len(lengths)).copy()
        for row, length in enumerate(lengths):
            expected[row, :, length : length + count] = new[row].swapaxes(0, 1)
        np.testing.assert_array_equal(by_rows(ours[1], len(lengths)), expected)


def test_a_cache_gives_rows_in_any_order_and_number():
    cache, rows = random_cache(0, [1, 4, 2], 6, dtype=jnp.float32), np.array([2, 0, 2, 1, 2])
    taken = cache.take(jnp.array(rows))
    assert taken.capacity == 6
    np.testing.assert_array_equal(taken.length, [2, 1, 2, 4, 2])
    for layer in range(2):
        for ours, before in ((taken.key, cache.key), (taken.value, cache.value)):
            np.testing.assert_array_equal(by_rows(ours[layer], 5), by_rows(before[layer], 3)[rows])


@pytest.mark.parametrize(("count", "scale"), [(1, None), (3, None), (2, 0.7)])
def test_attention_to_the_cache_is_attention_to_each_rows_own_past(x64, count, scale):
    """Whatever stands beyond a row's length, be it huge: not one bit of it arrives."""
    lengths = [0, 5, 2, 8 - count]
    query, key, value = random_heads(1, 4, count, 2, 4, jnp.float64)
    cache = random_cache(2, lengths, 8).insert(1, key, value)
    attended = attend_to_cache(query, cache, 1, scale=scale)
    for row, length in enumerate(lengths):
        known = length + count
        past = [jnp.array(by_rows(x[1], 4)[row, None, :, :known]).swapaxes(1, 2) for x in (cache.key, cache.value)]
        own = reference_attention(query[row : row + 1], *past, mask=causal_mask(count, known, length), scale=scale)
        np.testing.assert_allclose(attended[row], own[0], atol=1e-12)

    beyond = jnp.arange(8) >= (cache.length + count)[:, None]
    garbage = jnp.where(jnp.repeat(beyond, 2, axis=0)[..., None], 1e150, 0)
    spoiled = dataclasses.replace(
        cache, key=tuple(k + garbage for k in cache.key), value=tuple(v - garbage for v in cache.value)
    )
    np.testing.assert_array_equal(attend_to_cache(query, spoiled, 1, scale=scale), attended)


@pytest.mark.parametrize(("beams", "count"), [(1, 1), (3, 2), (FEW_QUERIES + 1, 1)])
def test_attention_to_the_source_is_each_rows_alone(x64, beams, count):
    """However many rows look at the same source; nothing that is not real is seen."""
    key, value, _ = random_heads(3, 2, 7, 2, 4, jnp.float64)
    query = random_heads(4, 2 * beams, count, 2, 4, jnp.float64)[0]
    mask = jnp.arange(7) < jnp.array([[4], [7]])
    empty = DecoderCache((), (), jnp.zeros(2 * beams, jnp.int32), 1, (), (), mask)
    cache = empty.start_source(value.swapaxes(1, 2), key.swapaxes(1, 2))
    cache = cache.start_source(key.swapaxes(1, 2), value.swapaxes(1, 2))
    attended = attend_to_source(query, cache, 1, scale=0.3)
    for row in range(2 * beams):
        own = slice(row // beams, row // beams + 1)
        seen = mask[own, None, None]
        expected = reference_attention(query[row : row + 1], key[own], value[own], mask=seen, scale=0.3)
        np.testing.assert_allclose(attended[row], expected[0], atol=1e-12)


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
