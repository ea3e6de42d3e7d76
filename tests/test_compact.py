"""Matrices in fewer bits: products of what they hold, whatever the number of rows; near the matrices they came from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn

from jaxgpt.config import GPTConfig
from jaxgpt.models.blocks import compact_parameters
from jaxgpt.models.compact import FEW_ROWS, compact, compact_product, take_rows, upcast
from jaxgpt.models.gpt import GPT, decode_step, init_parameters, next_token_logits, prefill

CONFIG = GPTConfig(vocab_size=40, context=8, layers=1, heads=2, width=60, unroll=1, init_std=0.3)
STEP = {"int8": 0.5 / 127, "bfloat16": 2**-8}  # of rounding, of a row's largest weight


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
@pytest.mark.parametrize("shape", [(5, 3), (7, 64), (9, 320), (40, 1900)])
def test_a_product_is_that_of_the_rounded_matrix(weights, shape):
    random = np.random.default_rng(shape)
    matrix = random.normal(size=shape).astype(np.float32)
    matrix[0] = 0
    found = compact(jnp.array(matrix), weights)
    parts = np.asarray(upcast(found["compact"]))
    assert len(parts) == {3: 1, 64: 1, 320: 5, 1900: 15}[shape[1]]
    rows = np.concatenate(list(parts), axis=1)
    assert not rows[:, shape[1] :].any()
    held = rows[:, : shape[1]] * np.asarray(found.get("scales", np.ones(shape[0])))[:, None]
    assert np.all(np.abs(held - matrix) <= STEP[weights] * np.abs(matrix).max(axis=1, keepdims=True) * 1.001)
    assert found["compact"].dtype.itemsize == {"int8": 1, "bfloat16": 2}[weights] and not np.any(held[0])
    for rows in (1, 3, FEW_ROWS + 1):
        x = random.normal(size=(rows, shape[1])).astype(np.float32)
        product = compact_product(jnp.array(x), **found)
        np.testing.assert_allclose(product, x @ held.T, rtol=1e-5, atol=2e-5 * shape[1] ** 0.5)
    tokens = jnp.array([[0, shape[0] - 1, shape[0]]])
    taken = take_rows(tokens, shape[1], **found)
    np.testing.assert_allclose(taken[0, :2], held[[0, -1]], atol=1e-6)
    assert np.isnan(taken[0, 2]).all()


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_a_weight_that_is_no_number_is_not_lost(weights):
    matrix = jnp.ones((3, 4)).at[1, 2].set(jnp.nan)
    product = compact_product(jnp.ones((1, 4)), **compact(matrix, weights))
    assert np.isnan(product[0]).tolist() == [False, True, False]


@pytest.mark.parametrize(("weights", "tied"), [("int8", True), ("bfloat16", False)])
def test_a_compact_model_is_near_the_model_and_its_steps_are_its_whole(weights, tied):
    config = dataclasses.replace(CONFIG, tied_head=tied)
    parameters = drawn(functools.partial(init_parameters, config), std=0.1)
    small = compact_parameters(parameters, weights)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (small["block_0"], parameters["blocks"])]
    assert sizes[0] * 5 < sizes[1] * 3
    tokens = jnp.array(np.random.default_rng(0).integers(0, 40, (2, 6)), jnp.int32)
    whole = jax.jit(lambda p: next_token_logits(config, p, GPT(config).apply({"params": p}, tokens)[0]))
    logits = [whole(small), whole(parameters)]
    apart = float(jnp.linalg.norm(logits[0] - logits[1]) / jnp.linalg.norm(logits[1]))
    assert 1e-6 < apart < 0.05, apart
    first, cache = jax.jit(prefill, static_argnums=(0, 4))(config, small, tokens[:, :3], jnp.array([3, 3]), 8)
    after, _ = jax.jit(decode_step, static_argnums=0)(config, small, tokens[:, 3:], cache)
    np.testing.assert_allclose(jnp.concatenate([first[:, None], after], axis=1), logits[0][:, 2:], atol=1e-4)
