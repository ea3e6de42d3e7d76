"""Steps that are left out: which, on any number of devices; and what stays then, stays bit for bit."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import OptimizerConfig, ParallelConfig
from jaxgpt.training.optimizer import make_optimizer
from jaxgpt.training.parallel import choose_layout
from jaxgpt.training.skipping import WINDOW, Skipped, is_good, no_steps, reason, remember
from jaxgpt.training.step import TrainState, train_step


@pytest.mark.parametrize("spikes", [None, 6.0])
@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_never_good(spikes, loss, norm):
    assert not is_good(no_steps(spikes), jnp.float32(loss), jnp.float32(norm), spikes)
    assert is_good(no_steps(spikes), jnp.float32(1e30), jnp.float32(1e30), spikes)


@pytest.mark.parametrize("seed", range(2))
def test_a_spike_is_far_above_the_last_steps_that_were_taken(seed):
    """Against lists in NumPy, over more steps than the window is wide."""
    generator, spikes = np.random.default_rng(seed), 2.5
    judge = jax.jit(functools.partial(is_good, spikes=spikes))
    recent, taken, decisions = no_steps(spikes), [], []
    for _ in range(WINDOW + 60):
        figures = generator.standard_gamma(2.0, 2).astype(np.float32)
        last = np.array(taken[-WINDOW:], np.float64).reshape(-1, 2)
        limits = last.mean(0) + spikes * last.std(0) if len(last) >= WINDOW // 2 else np.full(2, np.inf)
        if np.abs(figures / limits - 1).min() < 1e-4:
            continue  # too near to say
        good = bool(judge(recent, *figures))
        assert good == bool((figures <= limits).all())
        decisions.append(good)
        if good:
            taken.append(figures)
            recent = jax.jit(remember)(recent, *figures)
    assert decisions[: WINDOW // 2] == [True] * (WINDOW // 2) and False in decisions
    assert int(recent.taken) == len(taken) > WINDOW


def test_equal_losses_are_no_spikes():
    recent = no_steps(3.0)
    for _ in range(WINDOW):
        recent = remember(recent, jnp.float32(2.1), jnp.float32(0.3))
    assert is_good(recent, jnp.float32(2.1), jnp.float32(0.3), 3.0)
    assert not is_good(recent, jnp.float32(2.2), jnp.float32(0.3), 3.0)


def loss(parameters, batch, keys):
    """Linear regression: (weighted sum of squares, sum of the weights)."""
    errors = batch["x"] @ parameters["kernel"] - batch["y"]
    return jnp.sum(jnp.square(errors) * batch["weights"]), jnp.sum(batch["weights"])


def make_batch(seed, scale=1.0):
    generator = np.random.default_rng(seed)
    x, y = generator.normal(size=(8, 3)), generator.normal(size=(8, 4))
    fields = {"x": x, "y": y * scale, "weights": np.ones((8, 4))}
    return {name: value.astype(np.float32) for name, value in fields.items()} | {"row": np.arange(8, dtype=np.int32)}


def spoiled(batch, how):
    value = {"nan": np.nan, "overflow": 1e30, "no weight": 0.0, "spike": 1e3}[how]
    field = "weights" if how == "no weight" else "y"
    return batch | {field: np.full_like(batch[field], value)}


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_that_is_left_out_changes_nothing_but_the_count(devices, name):
    """Minus zero stays minus zero; and the next step is the one that would have come without it, wherever it runs."""
    optimizer = make_optimizer(OptimizerConfig(name=name, warmup_steps=0), 100)
    layout = choose_layout(ParallelConfig(devices=devices), 8)
    step = functools.partial(train_step, loss=loss, optimizer=optimizer, seed=0, spikes=5.0)
    program = layout.compile(step, scalars=1)

    def initial():
        parameters = {"kernel": jnp.ones((3, 4)).at[0].set(-0.0)}
        return TrainState(jnp.int32(0), parameters, optimizer.init(parameters), recent=no_steps(5.0))

    def bits(state):
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state.replace(step=0))]

    state = layout.initial(initial)
    for seed in range(WINDOW // 2 + 3):
        state, metrics = program(state, layout.place(make_batch(seed)), np.float32(1))
        assert not metrics["skipped"]
    for number, how in enumerate(("nan", "overflow", "no weight", "spike"), int(state.step) + 1):
        before = bits(state)
        state, metrics = program(state, layout.place(spoiled(make_batch(0), how)), np.float32(1))
        assert metrics["skipped"] and bits(state) == before and int(state.step) == number
    start = layout.initial(initial)
    after, metrics = program(start, layout.place(spoiled(make_batch(0), "nan")), np.float32(1))
    assert metrics["skipped"] and bits(after) == bits(start)


def test_skipped_steps_are_counted_in_a_row_and_in_all():
    skipped = Skipped(limit=3)
    for one in (True, False, True, True):
        skipped.count(one)
    assert (skipped.total, skipped.in_a_row) == (3, 2)


def test_the_reason_names_the_figure():
    assert reason(math.nan, math.nan) == "the loss is nan" and reason(1.0, math.inf) == "the gradient norm is inf"
    assert "9.5" in reason(9.5, 33.25) and "33.25" in reason(9.5, 33.25)
