"""Attention: every implementation is the formula, causality is exact, dropout belongs to the row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.models.attention import attention, best_implementation, causal_mask, dropout


def random_heads(seed, batch, length, heads, head_width, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    return tuple(jnp.array(random.normal(size=(batch, length, heads, head_width)), dtype) for _ in range(3))


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
def test_attention_is_the_formula(implementation):
    query, key, value = random_heads(0, 2, 7, 3, 5)
    result = attention(query, key, value, implementation=implementation)
    for b in range(2):
        for n in range(3):
            scores = np.array(query[b, :, n]) @ np.array(key[b, :, n]).T / np.sqrt(5)
            weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            np.testing.assert_allclose(result[b, :, n], weights @ np.array(value[b, :, n]), atol=1e-5)


def differentiated(**options):
    """A compiled function of (query, key, value): the sum of what every query gives, weighted anyhow; its gradients."""

    def total(qkv):
        weights = np.random.default_rng(9).normal(size=qkv[0].shape)
        return jnp.sum(attention(*qkv, **options) * jnp.array(weights, qkv[0].dtype))

    return jax.jit(jax.value_and_grad(total))


def value_and_gradients(inputs, **options):
    return differentiated(**options)(inputs)


def assert_equal(ours, theirs, atol=1e-10):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


def packed(seed, batch, length):
    """Numbers of documents that share rows: (B, T), growing along T."""
    begins = np.random.default_rng(seed).random((batch, length)) < 0.2
    return jnp.array(np.cumsum(begins, axis=1), jnp.int32)


@pytest.mark.parametrize("length", [1, 5, 64, 128, 129, 300])
@pytest.mark.parametrize(("documents", "window"), [(False, None), (True, None), (False, 3), (True, 130), (False, 129)])
def test_blocked_is_causal_attention(x64, length, documents, window):
    inputs = random_heads(length, 2, length, 3, 5, jnp.float64)
    numbers = packed(length, 2, length) if documents else None
    options = {"causal": True, "window": window, "segments": (numbers, numbers) if documents else None}
    assert_equal(
        value_and_gradients(inputs, implementation="blocked", **options),
        value_and_gradients(inputs, implementation="reference", **options),
    )


@pytest.mark.parametrize(("documents", "window"), [(False, None), (True, 200), (False, 1030)])
def test_several_slabs_of_keys_are_causal_attention(x64, documents, window):
    length = 1100
    inputs = random_heads(1, 1, length, 2, 3, jnp.float64)
    numbers = packed(2, 1, length) if documents else None
    options = {"causal": True, "window": window, "segments": (numbers, numbers) if documents else None}
    assert_equal(
        value_and_gradients(inputs, implementation="blocked", **options),
        value_and_gradients(inputs, implementation="reference", **options),
    )


@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (7, 16), (150, 33), (12, 140)])
@pytest.mark.parametrize("padded", [False, True])
def test_blocked_is_attention_to_a_source(x64, queries, keys, padded):
    """As in an encoder, and of a decoder to its source, some of whose positions may be padding."""
    query = random_heads(1, 3, queries, 2, 4, jnp.float64)[0]
    _, key, value = random_heads(2, 3, keys, 2, 4, jnp.float64)
    real = (jnp.arange(keys) < jnp.array([keys, max(1, keys // 2), 1])[:, None]).astype(jnp.int32)
    options = {"segments": (jnp.ones((3, queries), jnp.int32), real) if padded else None}
    assert_equal(
        value_and_gradients((query, key, value), implementation="blocked", **options),
        value_and_gradients((query, key, value), implementation="reference", **options),
    )


@pytest.mark.parametrize("length", [20, 200, 1100])
def test_the_gradient_with_dropout_is_the_derivative(x64, length):
    """The same weights fall in the backward pass as in the forward pass, of every block."""
    inputs = random_heads(1, 2, length, 2, 4, jnp.float64)
    direction = random_heads(2, 2, length, 2, 4, jnp.float64)
    keys = jax.random.split(jax.random.key(3), 2)
    options = {"causal": True, "implementation": "blocked", "dropout_rate": 0.4, "dropout_keys": keys}
    compiled = differentiated(**options)
    _, gradients = compiled(inputs)
    step = 1e-6

    def moved(sign):
        return compiled(tuple(x + sign * step * d for x, d in zip(inputs, direction, strict=True)))[0]

    slope = sum(jnp.vdot(g, d) for g, d in zip(gradients, direction, strict=True))
    np.testing.assert_allclose((moved(1) - moved(-1)) / (2 * step), slope, rtol=1e-6)
    without = attention(*inputs, causal=True, implementation="blocked")
    dropped = attention(*inputs, **options)
    assert not np.allclose(dropped, without)
    alone = attention(*(x[1:] for x in inputs), **options | {"dropout_keys": keys[1:]})
    np.testing.assert_allclose(alone, dropped[1:], atol=1e-12)


@pytest.mark.parametrize(("documents", "window"), [(False, None), (True, None), (False, 9)])
def test_splash_is_causal_attention(documents, window):
    """Interpreted here; on a TPU the same kernel is compiled."""
    inputs = random_heads(5, 2, 128, 2, 64)
    numbers = packed(4, 2, 128) if documents else None
    options = {"causal": True, "window": window, "scale": 0.2, "segments": (numbers, numbers) if documents else None}
    assert_equal(
        value_and_gradients(inputs, implementation="splash", **options),
        value_and_gradients(inputs, implementation="reference", **options),
        atol=2e-3,
    )


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")
@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_is_attention(causal):
    inputs = tuple(x.astype(jnp.bfloat16) for x in random_heads(5, 2, 128, 2, 64))
    numbers = packed(4, 2, 128)
    for segments in (None, (numbers, numbers)):
        options = {"causal": causal, "segments": segments}
        ours, theirs = (value_and_gradients(inputs, implementation=name, **options) for name in ("cudnn", "reference"))
        for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
            assert jnp.linalg.norm(a - b) < 0.03 * jnp.linalg.norm(b)


def test_kernels_without_dropout_say_so():
    inputs, keys = random_heads(5, 2, 8, 2, 4), jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ValueError, match="attention splash has no dropout of its weights; blocked has"):
        attention(*inputs, causal=True, implementation="splash", dropout_rate=0.1, dropout_keys=keys)


@pytest.mark.parametrize(
    ("backend", "dtype", "length", "width", "causal", "best"),
    [
        ("cpu", "float32", 1024, 64, True, "blocked"),
        ("gpu", "bfloat16", 1024, 64, True, "cudnn"),
        ("gpu", "bfloat16", 30, 64, False, "cudnn"),
        ("gpu", "float32", 1024, 64, True, "blocked"),
        ("gpu", "bfloat16", 1024, 20, True, "blocked"),
        ("tpu", "bfloat16", 1024, 64, True, "splash"),
        ("tpu", "bfloat16", 1000, 64, True, "blocked"),
        ("tpu", "bfloat16", 1024, 64, False, "blocked"),
    ],
)
def test_each_backend_gets_what_its_kernels_take(backend, dtype, length, width, causal, best):
    assert best_implementation(backend, jnp.dtype(dtype), (length, length), width, causal) == best


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
def test_a_later_token_changes_nothing_earlier(implementation):
    inputs = random_heads(3, 1, 150, 2, 8)
    options = {"causal": True, "implementation": implementation}
    before = attention(*inputs, **options)
    changed = attention(*(x.at[:, 140].add(9.0) for x in inputs), **options)
    np.testing.assert_array_equal(before[:, :140], changed[:, :140])
    assert not np.array_equal(before[:, 140:], changed[:, 140:])


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
def test_a_scale_takes_the_place_of_the_root(implementation):
    query, key, value = random_heads(5, 2, 20, 2, 16)
    result = attention(query, key, value, implementation=implementation, scale=0.6)
    np.testing.assert_allclose(result, attention(query * 0.6 * 4, key, value), atol=1e-5)
    assert jnp.abs(result - attention(query, key, value)).max() > 0.01


def test_memory_of_the_gradients_grows_with_the_length_not_its_square():
    def temporaries(length):
        heads = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        gradient = jax.grad(
            lambda q, k, v: jnp.sum(attention(q, k, v, causal=True, implementation="blocked")), (0, 1, 2)
        )
        return jax.jit(gradient).lower(heads, heads, heads).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 3 * temporaries(2048)


def test_causal_mask_counts_from_the_offset():
    np.testing.assert_array_equal(causal_mask(2, 5, 2)[0, 0], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
def test_half_precision_scores_are_computed_in_float32(implementation):
    query, key, value = random_heads(4, 1, 64, 1, 32)
    exact = attention(query, key, value, implementation="reference")
    half = attention(*(x.astype(jnp.bfloat16) for x in (query, key, value)), implementation=implementation)
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
