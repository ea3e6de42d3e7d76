"""The same bits on any number of devices, when it changes in mid-run, in evaluations, and by the real command line."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import SMALL, write_text
from strict import digest, train

from jaxgpt.cli import main
from jaxgpt.config import OptimizerConfig, ParallelConfig, TrainConfig
from jaxgpt.models.attention import dropout
from jaxgpt.training.optimizer import make_optimizer
from jaxgpt.training.parallel import choose_layout
from jaxgpt.training.step import TrainState, evaluation_step, training_step

ROWS, STEPS = 16, 4
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0), STEPS)


def loss(parameters, batch, keys):
    """A small network with dropout: (weighted sum of squares, sum of the weights)."""
    hidden = dropout(jnp.tanh(batch["x"] @ parameters["in"]), 0.3, keys)
    return jnp.sum(jnp.square(hidden @ parameters["out"] - batch["y"]) * batch["weights"]), jnp.sum(batch["weights"])


def make_batch(step):
    """Values of very different sizes, whose sum depends on the order they are added in."""
    generator = np.random.default_rng(step)
    scale = 10.0 ** generator.uniform(-3, 3, (ROWS, 1))
    batch = {
        "x": generator.normal(size=(ROWS, 3, 4)),
        "y": generator.normal(size=(ROWS, 3)) * scale,
        "weights": generator.uniform(0, 1, (ROWS, 3)),
    }
    return {name: x.astype(np.float32) for name, x in batch.items()} | {"row": np.arange(ROWS, dtype=np.int32)}


# One object for all tests, so that each device compiles it once.
EVALUATION = evaluation_step(functools.partial(loss, keys=None))
STEP = {n: training_step(loss=loss, optimizer=OPTIMIZER, seed=5, micro_batches=n) for n in (1, 2)}


def losses_and_state(plan, accumulation=1, strict=True):
    """Train, with step i on `plan[i]` devices; return what was measured, held out too, and all bits of the state."""
    keys = jax.random.split(jax.random.key(1), 2)
    parameters = {"in": jax.random.normal(keys[0], (4, 5)), "out": jax.random.normal(keys[1], (5,))}
    state = TrainState(jnp.zeros((), jnp.int32), parameters, OPTIMIZER.init(parameters))
    seen = []
    for number, devices in enumerate(plan):
        config = ParallelConfig(devices=devices, gradient_accumulation=accumulation)
        layout = choose_layout(config, ROWS, strict=strict)
        assert len(layout.devices) == devices
        state = jax.device_put(jax.device_get(state), layout.shardings(state))  # as by way of a checkpoint
        program = layout.compile(STEP[accumulation], scalars=1, donate=True)
        state, metrics = program(state, layout.place(make_batch(number)), np.float32(number))
        held_out = layout.compile(EVALUATION)(state.model, layout.place(make_batch(99)))
        seen.append(jax.device_get((metrics, held_out)))
    return seen, jax.device_get(state)


@pytest.fixture(scope="module")
def on_one_device():
    return losses_and_state([1] * STEPS)


@pytest.mark.parametrize("plan", [[3] * STEPS, [8] * STEPS, [8, 2, 1, 4]])
def test_any_number_of_devices_gives_the_same_bits(on_one_device, plan):
    jax.tree.map(np.testing.assert_array_equal, losses_and_state(plan), on_one_device)


def test_the_step_is_that_of_the_other_strategies(on_one_device):
    """Up to rounding; and rounding there is, or the test above would test nothing."""
    ordinary = losses_and_state([1] * STEPS, strict=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ordinary, on_one_device)
    pairs = zip(*map(jax.tree.leaves, (ordinary, on_one_device)), strict=True)
    assert not all(np.array_equal(ours, theirs) for ours, theirs in pairs)


def test_accumulation_composes(on_one_device):
    """A shard of two rows in two micro-batches: one number of devices is like another."""
    one, several = (losses_and_state([devices] * STEPS, accumulation=2) for devices in (1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, several)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, on_one_device)


def test_every_device_has_its_share():
    layout = choose_layout(ParallelConfig(devices=3), ROWS, strict=True)
    shards = layout.place(make_batch(0))
    assert [int(shard["row"][0]) for shard in shards] == list(range(0, ROWS, 2))
    shares = [sum(shard["x"].devices() == {device} for shard in shards) for device in layout.devices]
    assert sorted(shares) == [2, 3, 3]
    assert "8 virtual shards on 3 of 3 devices" in layout.notes[0] and "jaxlib" in layout.notes[0]


@pytest.mark.parametrize(
    ("config", "batch_size", "used"),
    [
        (ParallelConfig(), 16, 8),
        (ParallelConfig(virtual_shards=4), 12, 4),
        (ParallelConfig("single"), 8, 1),
        (ParallelConfig(devices=5), 8, 5),
    ],
)
def test_no_more_devices_than_shards(config, batch_size, used):
    layout = choose_layout(config, batch_size, strict=True)
    assert (layout.strategy, len(layout.devices), layout.shards) == ("strict", used, config.virtual_shards)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ParallelConfig(), "data.batch-size 12 does not divide into the parallel.virtual-shards 8;"),
        (ParallelConfig(virtual_shards=4, gradient_accumulation=2), "parallel.virtual-shards 4 x 2 micro-batches;"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        choose_layout(config, 12, strict=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seconds": 5.0}, "max-seconds is 5.0; with strict-reproducibility it must be None"),
        (
            {"parallel": ParallelConfig("pmap")},
            "parallel.strategy is pmap; with strict-reproducibility it must be auto",
        ),
        ({"parallel": ParallelConfig(mesh="data=2")}, "parallel.mesh is data=2; with strict-reproducibility"),
    ],
)
def test_what_depends_on_the_machine_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TrainConfig(), strict_reproducibility=True, **changes)


def test_the_command_line_gives_the_same_bits(tmp_path, capsys):
    """One device against two and then one: another number of threads would already change the sums of a product."""
    text, cache = write_text(tmp_path), tmp_path / "cache"
    small = SMALL.replace("--model.layers 2", "--model.layers 1").replace("--sample-tokens 8", "--sample-tokens 0")
    arguments = f"{small} --data.path {text} --data.batch-size 16 --model.vocab-size 258"
    for plan in ((2, 1), (1,)):
        train(arguments, plan, 6, tmp_path / str(len(plan)), cache)
    assert digest(tmp_path / "1", 6) == digest(tmp_path / "2", 6)
    for flag in ("strict-reproducibility False", "parallel.gradient-accumulation 2", "parallel.virtual-shards 4"):
        assert main(f"train --resume --out {tmp_path / '1'} --steps 7 --{flag}".split()) == 2
        err = capsys.readouterr().err
        assert f"was trained with {flag.split()[0]}" in err and len(err.splitlines()) == 1
