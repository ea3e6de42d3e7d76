"""GPT: cached decoding is decoding, causality is exact, gradients are derivatives, options are what they say."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import GPTConfig
from jaxgpt.models.gpt import GPT, init_cache, init_parameters, next_token_logits, output_head
from jaxgpt.models.losses import cross_entropy, unembed

TINY = GPTConfig(vocab_size=50, context=24, layers=3, heads=2, width=16, unroll=1)
FLOAT64 = {"parameter_dtype": "float64", "compute_dtype": "float64"}


def random_tokens(seed, batch, length, vocab_size=50):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, vocab_size)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, parameters, tokens, **kwargs):
    hidden, _ = GPT(config).apply({"params": parameters}, tokens, **kwargs)
    return unembed(hidden, output_head(parameters))


def mean_loss(config, parameters, tokens, **kwargs):
    total, weight = cross_entropy(
        logits_of(config, parameters, tokens[:, :-1], **kwargs), tokens[:, 1:], jnp.ones(tokens[:, 1:].shape)
    )
    return total / weight


@pytest.mark.parametrize("size", [65, 1000])
def test_initial_loss_is_that_of_a_uniform_guess(size):
    config = GPTConfig(vocab_size=size, context=64, layers=4, heads=4, width=128)
    loss = mean_loss(config, init_parameters(config, jax.random.key(0)), random_tokens(1, 8, 65, size))
    assert abs(loss / math.log(size) - 1) < 0.02


@pytest.mark.parametrize(
    "change", [{}, {"bias": False}, {"tied_head": False}, {"positions": "sinusoidal"}, {"attention": "blocked"}]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
def test_cached_decoding_equals_uncached(x64, change, dtype, tolerance):
    config = dataclasses.replace(TINY, **change, parameter_dtype=dtype, compute_dtype=dtype)
    parameters = init_parameters(config, jax.random.key(0))
    tokens = random_tokens(1, 2, 20)
    whole = logits_of(config, parameters, tokens)
    cache, step = init_cache(config, 2), jax.jit(lambda *a: next_token_logits(config, *a))
    position = 0
    for size, count in [(8, 5), (1, 1), (1, 1), (4, 3), (1, 1)]:  # padded prefills and single tokens
        chunk = jnp.zeros((2, size), tokens.dtype).at[:, :count].set(tokens[:, position : position + count])
        logits, cache = step(parameters, chunk, jnp.int32(count), cache)
        position += count
        np.testing.assert_allclose(logits, whole[:, position - 1], atol=tolerance)
    assert int(cache.length) == position


def test_a_later_token_changes_no_earlier_logit():
    parameters = init_parameters(TINY, jax.random.key(0))
    tokens = random_tokens(1, 3, 24)
    before = logits_of(TINY, parameters, tokens)
    after = logits_of(TINY, parameters, tokens.at[:, 15].set((tokens[:, 15] + 1) % 50))
    assert jnp.abs(before - after)[:, :15].max() == 0
    assert (jnp.abs(before - after)[:, 15:].max(axis=(0, 2)) > 0).all()


@pytest.mark.parametrize("change", [{}, {"bias": False, "tied_head": False}, {"remat": True}])
def test_gradients_agree_with_finite_differences(x64, change):
    config = dataclasses.replace(TINY, layers=2, **change, **FLOAT64)
    parameters = jax.tree.map(lambda p: p + 0.02, init_parameters(config, jax.random.key(0)))
    tokens = random_tokens(1, 2, 9)
    loss = jax.jit(lambda p: mean_loss(config, p, tokens))
    gradients = jax.jit(jax.grad(loss))(parameters)
    directions = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape, p.dtype), parameters)
    for path, direction in jax.tree_util.tree_leaves_with_path(directions):
        only = jax.tree_util.tree_map_with_path(lambda p, d: d if p == path else d * 0, directions)  # noqa: B023
        moved = [loss(jax.tree.map(lambda p, d: p + sign * 1e-5 * d, parameters, only)) for sign in (1, -1)]  # noqa: B023
        slope = (moved[0] - moved[1]) / 2e-5
        expected = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradients, only)), strict=True))
        np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-9, err_msg=str(path))
        assert jnp.linalg.norm(direction) > 0


@pytest.mark.parametrize("change", [{"unroll": 1}, {"unroll": 3}, {"remat": True}])
def test_ways_to_compute_do_not_change_the_result(x64, change):
    config = dataclasses.replace(TINY, dropout=0.2, unroll=2, **FLOAT64)
    parameters = init_parameters(config, jax.random.key(0))
    tokens = random_tokens(1, 2, 12)
    keys = jax.random.split(jax.random.key(2), 2)

    def run(config):
        return jax.jit(jax.value_and_grad(lambda p: mean_loss(config, p, tokens, dropout_keys=keys)))(parameters)

    ours, other = run(config), run(dataclasses.replace(config, **change))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours, other)


def test_options_change_the_parameters_they_name():
    def names(config):
        tree = jax.eval_shape(lambda: init_parameters(config, jax.random.key(0)))
        return {
            jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(tree)
        }

    default = names(TINY)
    assert not any("bias" in name for name in names(dataclasses.replace(TINY, bias=False)))
    assert names(dataclasses.replace(TINY, tied_head=False)) - default == {"head"}
    assert default - names(dataclasses.replace(TINY, positions="sinusoidal")) == {"position_embedding/embedding"}


@pytest.mark.parametrize("layers", [2, 8])
def test_initial_scales_are_gpt2s(layers):
    config = GPTConfig(vocab_size=100, context=32, layers=layers, heads=4, width=128)
    blocks = init_parameters(config, jax.random.key(0))["blocks"]
    for name, inner in [("attention", "qkv"), ("mlp", "up")]:
        np.testing.assert_allclose(blocks[name][inner]["kernel"].std(), 0.02, rtol=0.05)
    for name, inner in [("attention", "out"), ("mlp", "down")]:
        np.testing.assert_allclose(blocks[name][inner]["kernel"].std(), 0.02 / math.sqrt(2 * layers), rtol=0.05)
        assert not jnp.array_equal(blocks[name][inner]["kernel"][0], blocks[name][inner]["kernel"][1])


def test_dropout_is_the_rows_own():
    """A row loses the same activations whatever rows are beside it, and another row loses others."""
    config = dataclasses.replace(TINY, dropout=0.3)
    parameters = init_parameters(config, jax.random.key(0))
    tokens = jnp.broadcast_to(random_tokens(1, 1, 12), (4, 12))
    keys = jax.random.split(jax.random.key(2), 4)
    together = logits_of(config, parameters, tokens, dropout_keys=keys)
    alone = logits_of(config, parameters, tokens[2:3], dropout_keys=keys[2:3])
    np.testing.assert_allclose(together[2:3], alone, atol=1e-5)
    assert jnp.abs(together[0] - together[1]).max() > 0.01
    np.testing.assert_array_equal(logits_of(config, parameters, tokens)[0], logits_of(TINY, parameters, tokens)[0])


def test_half_precision_compute_keeps_float32_parameters():
    config = dataclasses.replace(TINY, compute_dtype="bfloat16")
    parameters = init_parameters(config, jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(parameters)} == {"float32"}
    hidden, _ = GPT(config).apply({"params": parameters}, random_tokens(1, 2, 8))
    assert hidden.dtype == jnp.bfloat16
    exact, _ = GPT(TINY).apply({"params": parameters}, random_tokens(1, 2, 8))
    np.testing.assert_allclose(hidden.astype(jnp.float32), exact, atol=0.1)


def test_too_many_tokens_are_refused():
    parameters = init_parameters(TINY, jax.random.key(0))
    with pytest.raises(ValueError, match="25 tokens do not fit a context of 24"):
        GPT(TINY).apply({"params": parameters}, random_tokens(0, 1, 25))


def test_an_id_outside_the_vocabulary_is_not_another_token():
    parameters = init_parameters(TINY, jax.random.key(0))
    assert jnp.isnan(logits_of(TINY, parameters, jnp.array([[50]]))).all()
