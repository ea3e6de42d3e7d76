"""Positions: the sinusoids are the paper's, a table is looked up, a rotation tells distances only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.models.positions import PositionalEncoding, rotary, sinusoidal_positions


def test_sinusoidal_positions_are_the_papers():
    table = sinusoidal_positions(50, 16)
    for t, i in [(0, 0), (3, 2), (49, 7)]:
        angle = t / 10_000 ** (2 * i / 16)
        np.testing.assert_allclose(table[t, 2 * i], np.sin(angle), atol=1e-5)
        np.testing.assert_allclose(table[t, 2 * i + 1], np.cos(angle), atol=1e-5)


def test_sinusoidal_positions_refuse_an_odd_width():
    with pytest.raises(ValueError, match="even width, not 7"):
        sinusoidal_positions(4, 7)


@pytest.mark.parametrize("learned", [True, False])
def test_positional_encoding_looks_rows_up(learned):
    encoding = PositionalEncoding(context=10, width=6, learned=learned)
    variables = encoding.init(jax.random.key(0), jnp.arange(10))
    rows = encoding.apply(variables, jnp.array([7, 2]))
    whole = encoding.apply(variables, jnp.arange(10))
    np.testing.assert_array_equal(rows, whole[jnp.array([7, 2])])
    assert bool(jax.tree.leaves(variables)) == learned


def test_a_position_beyond_the_table_is_not_another_position():
    encoding = PositionalEncoding(context=4, width=2)
    variables = encoding.init(jax.random.key(0), jnp.arange(4))
    assert np.isnan(encoding.apply(variables, jnp.array([4]))).all()


def test_rotary_is_a_rotation_of_each_pair(x64):
    random = np.random.default_rng(0)
    x, positions = random.normal(size=(2, 5, 3, 6)), random.integers(0, 100, (2, 5))
    pairs = x[..., :3] + 1j * x[..., 3:]
    turned = pairs * np.exp(1j * positions[:, :, None, None] * 10_000.0 ** (-2 * np.arange(3) / 6))
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotary(jnp.array(x), jnp.array(positions)), expected, atol=1e-12)


def test_rotated_products_depend_on_the_distance_only(x64):
    query, key = (jnp.array(np.random.default_rng(n).normal(size=(1, 1, 2, 8))) for n in range(2))

    def product(at, other):
        return jnp.sum(rotary(query, jnp.array([[at]])) * rotary(key, jnp.array([[other]])), axis=-1)

    np.testing.assert_allclose(product(3, 9), product(503, 509), atol=1e-10)
    assert jnp.abs(product(3, 9) - product(3, 10)).max() > 1e-3
