"""The head and its loss in one: the same sums and gradients as one after the other, however it is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.models import fused_loss
from jaxgpt.models.fused_loss import smoothed_divergence_sums
from jaxgpt.models.losses import smoothed_divergence, unembed


def plain(hidden, head, targets, weights, smoothing, cap=None):
    divergence, nll = smoothed_divergence(unembed(hidden, head, cap), targets, smoothing)
    return jnp.sum(divergence * weights), jnp.sum(nll * weights)


def random_case(seed, dtype="float64"):
    random = np.random.default_rng(seed)
    batch, length, width, size = (int(random.integers(1, most)) for most in (6, 13, 9, 40))
    hidden, head = (jnp.array(random.normal(0, 2, shape), dtype) for shape in ((batch, length, width), (size, width)))
    targets = jnp.array(random.integers(0, size, (batch, length)), jnp.int32)
    weights = jnp.array(random.uniform(0, 1, (batch, length)) * random.integers(0, 2, (batch, length)), dtype)
    return hidden, head, targets, weights


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize(("smoothing", "cap"), [(0.0, None), (0.1, None), (0.1, 3.0)])
def test_it_is_the_plain_loss_and_so_are_its_gradients(x64, monkeypatch, seed, rows, smoothing, cap):
    monkeypatch.setattr(fused_loss, "ROWS", rows)  # so that a few positions are several parts
    case = random_case(seed)
    ours, theirs = (f(*case, smoothing, cap) for f in (smoothed_divergence_sums, plain))
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    # With gradients the sums are computed another way; the second is a measurement and has none.
    (value, nll), gradients = jax.value_and_grad(
        lambda hidden, head: smoothed_divergence_sums(hidden, head, *case[2:], smoothing, cap),
        argnums=(0, 1),
        has_aux=True,
    )(*case[:2])
    np.testing.assert_allclose([value, nll], theirs, rtol=1e-12)
    expected = jax.grad(lambda hidden, head: plain(hidden, head, *case[2:], smoothing, cap)[0], argnums=(0, 1))(
        *case[:2]
    )
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_gradient_from_beyond_scales_it(x64):
    case = random_case(9)
    first, tripled = (
        jax.grad(lambda hidden, by=by: by * smoothed_divergence_sums(hidden, *case[1:], 0.1)[0])(case[0])
        for by in (1.0, 3.0)
    )
    np.testing.assert_allclose(tripled, 3 * first, rtol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_lower_precision_is_near_and_keeps_its_types(x64, dtype, tolerance):
    hidden, head, targets, weights = random_case(3)
    weights = weights.astype("float32")
    exact = jax.grad(functools.partial(total, targets, weights), argnums=(0, 1))(hidden, head)
    rough = jax.grad(functools.partial(total, targets, weights), argnums=(0, 1))(
        hidden.astype(dtype), head.astype("float32")
    )
    assert rough[0].dtype == dtype and rough[1].dtype == "float32"
    for ours, theirs in zip(rough, exact, strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)
        assert error < tolerance
    value, _ = smoothed_divergence_sums(hidden.astype(dtype), head, targets, weights, 0.1)
    assert value.dtype == "float32"


def total(targets, weights, hidden, head):
    return smoothed_divergence_sums(hidden, head, targets, weights, 0.1)[0]


def test_huge_logits_stay_finite():
    hidden, head = jnp.full((1, 2, 2), 1e15), jnp.array([[1e15, 0.0], [-1e15, 0.0], [0.0, 1.0]])
    arguments = (jnp.array([[0, 0]]), jnp.ones((1, 2)), 0.0)
    value, gradient = jax.value_and_grad(lambda hidden: smoothed_divergence_sums(hidden, head, *arguments)[0])(hidden)
    assert value == 0 and np.isfinite(gradient).all()
