"""The training step: sums divided once, so that nothing depends on how a batch is cut; keys of (seed, step, row)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt.config import OptimizerConfig
from jaxgpt.models.attention import dropout
from jaxgpt.training.optimizer import make_optimizer
from jaxgpt.training.step import TrainState, evaluate_step, loss_and_gradients, row_keys, train_step, update


def loss(parameters, batch, keys):
    """A small network with dropout: (weighted sum of squares, sum of the weights)."""
    hidden = dropout(jnp.tanh(batch["x"] @ parameters["in"]), 0.3, keys)
    return jnp.sum(jnp.square(hidden @ parameters["out"] - batch["y"]) * batch["weights"]), jnp.sum(batch["weights"])


def make_batch(rows=8, length=3):
    """Weights differ from token to token, two rows have none at all."""
    keys = jax.random.split(jax.random.key(rows), 3)
    weights = jax.random.uniform(keys[2], (rows, length), jnp.float64).at[:2].set(0.0).at[2].set(7.0)
    return {
        "x": jax.random.normal(keys[0], (rows, length, 4), jnp.float64),
        "y": jax.random.normal(keys[1], (rows, length), jnp.float64),
        "weights": weights,
        "row": jnp.arange(rows, dtype=jnp.int32),
    }


def make_parameters():
    keys = jax.random.split(jax.random.key(1), 2)
    return {
        "in": jax.random.normal(keys[0], (4, 5), jnp.float64),
        "out": jax.random.normal(keys[1], (5,), jnp.float64),
    }


SGD = optax.with_extra_args_support(optax.sgd(1.0))
step = functools.partial(train_step, loss=loss, optimizer=SGD, seed=3)


def initial_state(step=0):
    parameters = make_parameters()
    return TrainState(jnp.int32(step), parameters, SGD.init(parameters))


def raw(keys):
    return np.array(jax.random.key_data(keys))


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_accumulation_equals_one_batch(x64, micro_batches):
    batch = make_batch()
    keys = row_keys(0, jnp.int32(4), batch["row"])
    whole, parts = (
        jax.jit(loss_and_gradients, static_argnums=(0, 5))(loss, make_parameters(), {}, batch, keys, count)
        for count in (1, micro_batches)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), whole, parts)


def test_the_step_follows_the_gradient_of_the_mean_over_the_weights(x64):
    """Not the mean of micro-batch means: the first micro-batch weighs nothing, the second nearly everything."""
    batch, state = make_batch(), initial_state(step=5)
    keys = row_keys(3, jnp.int32(5), batch["row"])

    def mean(parameters):
        total, weight = loss(parameters, batch, keys)
        return total / weight

    expected, gradient = jax.value_and_grad(mean)(state.parameters)
    after, metrics = jax.jit(functools.partial(step, micro_batches=4))(state, batch, jnp.float64(0))
    stepped = jax.tree.map(jnp.subtract, state.parameters, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), after.parameters, stepped)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-12)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.global_norm(gradient), rtol=1e-12)
    np.testing.assert_allclose(metrics["tokens"], batch["weights"].sum(), rtol=1e-12)


def test_rows_given_in_another_order_are_the_same_step(x64):
    """Which device or micro-batch a row lies in is a matter of order; `row` says which it is."""
    batch = make_batch()
    order = np.random.default_rng(0).permutation(8)
    shuffled = {name: x[order] for name, x in batch.items()}
    ran = [jax.jit(step)(initial_state(), b, jnp.float64(0)) for b in (batch, shuffled)]
    for ours, theirs in zip(*map(jax.tree.leaves, ran), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_keys_depend_on_seed_step_and_row_alone():
    rows = jnp.arange(6, dtype=jnp.int32)
    keys = raw(row_keys(1, jnp.int32(2), rows))
    np.testing.assert_array_equal(keys[3:5], raw(row_keys(1, jnp.int32(2), rows[3:5])))
    assert len(np.unique(keys, axis=0)) == 6
    for seed, at in [(2, 2), (1, 3)]:
        others = raw(row_keys(seed, jnp.int32(at), rows))
        assert not (keys[:, None] == others[None]).all(-1).any()


def test_the_step_is_counted_and_changes_the_dropout(x64):
    batch, state, program = make_batch(), initial_state(), jax.jit(step)
    state, first = program(state, batch, jnp.float64(0))
    assert int(state.step) == 1
    assert int(program(state, batch, jnp.float64(1))[0].step) == 2
    _, same = program(initial_state(), batch, jnp.float64(0))
    _, other = program(initial_state(step=1), batch, jnp.float64(0))
    assert first["loss"] == same["loss"] and first["loss"] != other["loss"]


def test_the_position_reaches_the_optimizer(x64):
    def update(updates, state, params=None, *, position, **_):
        return jax.tree.map(lambda u: jnp.full_like(u, position), updates), state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    state = TrainState(jnp.int32(0), make_parameters(), optax.EmptyState())
    after, _ = train_step(state, make_batch(), jnp.float64(2.5), loss=loss, optimizer=optimizer, seed=0)
    np.testing.assert_allclose(after.parameters["out"] - state.parameters["out"], 2.5, rtol=1e-12)


def test_evaluation_is_without_dropout(x64):
    batch, parameters = make_batch(), make_parameters()

    def without_keys(parameters, batch):
        return loss(parameters, batch, None)

    total, weight = evaluate_step(parameters, batch, sums=without_keys)
    expected, _ = loss(parameters, batch, None)
    assert float(total) == float(expected) and float(weight) == float(batch["weights"].sum())
    summed = evaluate_step(
        parameters, batch, sums=without_keys, reduce=lambda tree: jax.tree.map(lambda x: 2 * x, tree)
    )
    assert summed == (2 * total, 2 * weight)


def test_the_new_state_is_written_over_the_old():
    """The norm's squares take as much as the parameters; copies of the state would take that twice more."""
    shapes = {name: jax.ShapeDtypeStruct((size, 256), jnp.float32) for name, size in (("a", 512), ("b", 768))}
    optimizer = make_optimizer(OptimizerConfig(), 10)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), shapes, jax.eval_shape(optimizer.init, shapes))
    number = jax.ShapeDtypeStruct((), jnp.float32)
    program = jax.jit(functools.partial(update, optimizer=optimizer), donate_argnums=0)
    memory = program.lower(state, (number, number, shapes), number).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.2 * sum(leaf.size * 4 for leaf in shapes.values())
