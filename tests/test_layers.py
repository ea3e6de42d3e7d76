"""Layers: each is what its paper says, in the shapes it promises."""

import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import ActivationName
from jaxgpt.models.layers import MLP, Dense, MultiHeadAttention, features_before


@pytest.mark.parametrize("bias", [True, False])
def test_dense_is_a_matrix_product_on_the_last_axis(bias):
    x = jax.random.normal(jax.random.key(0), (2, 3, 5))
    layer = Dense(4, bias=bias)
    variables = layer.init(jax.random.key(1), x)
    variables = jax.tree.map(lambda p: p + 0.1, variables)
    expected = np.einsum("BTI,IO->BTO", x, variables["params"]["kernel"]) + (variables["params"]["bias"] if bias else 0)
    np.testing.assert_allclose(layer.apply(variables, x), expected, atol=1e-5)
    assert ("bias" in variables["params"]) == bias


FUNCTIONS = {
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_mlp_is_two_products_around_its_activation(name):
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    layer = MLP(hidden=8, activation=name, init_std=0.5, output_std=0.5)
    variables = layer.init(jax.random.key(1), x)
    up, down = (np.asarray(variables["params"][part]["kernel"], np.float64) for part in ("up", "down"))
    np.testing.assert_allclose(layer.apply(variables, x), FUNCTIONS[name](np.asarray(x) @ up) @ down, atol=1e-5)


def test_multi_head_attention_is_heads_side_by_side():
    """Each head attends in its own slice: zeroing one head's values removes that head's part of the output alone."""
    x = jax.random.normal(jax.random.key(0), (2, 9, 12))
    layer = MultiHeadAttention(heads=3, init_std=0.5, output_std=0.5)
    variables = layer.init(jax.random.key(1), x)
    kernel = variables["params"]["qkv"]["kernel"]
    whole, _ = layer.apply(variables, x)
    parts = []
    for head in range(3):
        keep = jnp.zeros(36).at[:24].set(1).at[24 + 4 * head : 28 + 4 * head].set(1)
        variables["params"]["qkv"]["kernel"] = kernel * keep
        parts.append(layer.apply(variables, x)[0])
    np.testing.assert_allclose(sum(parts), whole, atol=1e-5)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="5 heads do not divide the width 12"):
        MultiHeadAttention(heads=5).init(jax.random.key(0), jnp.zeros((1, 2, 12)))


def test_the_gradient_of_a_bias_is_the_sum_of_the_outputs(x64):
    random = np.random.default_rng(2)
    x, weights = jnp.array(random.normal(size=(3, 5, 4))), jnp.array(random.normal(size=(3, 5, 6)))
    layer = Dense(6, parameter_dtype="float64", compute_dtype="float64")
    variables = layer.init(jax.random.key(0), x)
    gradients = jax.grad(lambda variables: jnp.sum(layer.apply(variables, x) * weights))(variables)["params"]
    np.testing.assert_allclose(gradients["bias"], weights.sum((0, 1)), rtol=1e-12)
    np.testing.assert_allclose(gradients["kernel"], jnp.einsum("bti,bto->io", x, weights), rtol=1e-12)


@pytest.mark.parametrize("name", get_args(ActivationName))
def test_the_gradient_of_an_mlp_keeps_its_hidden_features_before_the_activation_alone(name):
    x = jax.random.normal(jax.random.key(0), (2, 5, 4))
    layer = MLP(hidden=8, activation=name)
    variables = layer.init(jax.random.key(1), x)
    kept = jax.eval_shape(lambda variables: jax.vjp(layer.apply, variables, x)[1], variables)
    wide = [leaf.size for leaf in jax.tree.leaves(kept) if leaf.size >= 10 * 8]  # every matrix has fewer numbers
    assert wide == [10 * features_before(name, 8)]
