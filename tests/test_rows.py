"""Functions of rows as wide as the vocabulary equal JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.models.rows import column_maxima, first_greatest, greatest, log_sum_exp, row_sums, sum_of_rows, top_k


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_they_are_equal(seed, dtype):
    random = np.random.default_rng(seed)
    rows, size = random.integers(1, 9), int(random.integers(1, 2 ** random.integers(1, 12)))
    k = int(random.integers(1, size + 1) if seed % 2 else random.integers(1, min(size, 9) + 1))
    values = jnp.array(random.normal(0, 5, (rows, size)), dtype).at[:, random.integers(0, size)].set(-jnp.inf)
    best, places = jax.jit(top_k, static_argnums=1)(values, k)
    np.testing.assert_array_equal(best, jax.lax.top_k(values, k)[0])
    np.testing.assert_array_equal(jnp.take_along_axis(values, places, axis=1), best)
    tied = jnp.round(values / 5)
    np.testing.assert_array_equal(jax.jit(first_greatest)(tied), jnp.argmax(tied, axis=1))
    assert all(len(set(row)) == k for row in np.asarray(places).tolist())
    if size > 1 and dtype == "float32":
        expected = jax.nn.logsumexp(values, axis=1, keepdims=True)
        np.testing.assert_allclose(jax.jit(log_sum_exp)(values), expected, atol=1e-5)
        np.testing.assert_allclose(jax.jit(log_sum_exp)(values, column_maxima(values, k)), expected, atol=1e-5)
    shared = jax.jit(top_k, static_argnums=1)(values, k, column_maxima(values, k))
    np.testing.assert_array_equal(shared, (best, places))


def test_one_value_that_is_no_number_makes_the_row_none():
    values = jnp.zeros((2, 1000)).at[1, 777].set(jnp.nan)
    for maxima in (None, column_maxima(values, 5)):
        assert np.isnan(log_sum_exp(values, maxima))[:, 0].tolist() == [False, True]


def test_sums_and_maxima_are_numpys(x64):
    x = np.random.default_rng(0).normal(size=(3, 37, 19))
    np.testing.assert_allclose(sum_of_rows(jnp.array(x[0])), x[0].sum(0), atol=1e-12)
    np.testing.assert_allclose(row_sums(jnp.array(x)), x.sum(-1, keepdims=True), atol=1e-12)
    for size in range(1, 20):
        np.testing.assert_array_equal(greatest(jnp.array(x[..., :size])), x[..., :size].max(-1, keepdims=True))
