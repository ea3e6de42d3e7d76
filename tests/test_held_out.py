"""The held-out split: all of it is measured, the best is known, and a signal changes nothing."""

import json
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import Regression

from jaxgpt.config import ParallelConfig, RunConfig
from jaxgpt.hosts import ALONE
from jaxgpt.training.held_out import HeldOut
from jaxgpt.training.parallel import choose_layout
from jaxgpt.training.stop import Stop
from jaxgpt.training.watchdog import Watchdog


class Numbers(Regression):
    """A task whose held-out split is some numbers, in batches of 8, and whose loss is their mean times a slope."""

    def __init__(self, numbers=(1.0,) * 24):
        super().__init__()
        self.numbers, self.stop = np.asarray(numbers, np.float32), None

    def evaluation_sums(self, parameters, batch):
        return jnp.sum(parameters["slope"] * batch["x"]), jnp.float32(batch["x"].size)

    def evaluation_batches(self, share):
        for start in range(0, len(self.numbers), 8):
            yield {"x": self.numbers[start : start + 8]}
            if self.stop is not None:
                self.stop.requested = True


@dataclass(frozen=True)
class HighestIsBest(RunConfig):
    """A run that its loss, of all things, is to rise in."""

    @property
    def selection(self):
        return "eval/loss", True


def held_out(task=None, config=RunConfig, **settings):
    layout = choose_layout(ParallelConfig("single"), 8)
    return HeldOut(task or Numbers(), config(**settings), layout, Watchdog(None), ALONE)


def told(memory, values, first=0):
    """What it says of states whose loss is so and so."""
    for step, value in enumerate(values, first):
        assert memory.evaluate({"slope": jnp.float32(value)}, step, Stop())
    return memory


@pytest.mark.parametrize("size", [8, 40])
def test_the_whole_split_is_measured(size):
    numbers = np.random.default_rng(size).normal(size=size)
    memory = told(held_out(Numbers(numbers)), [2.0], first=7)
    assert memory.figures == pytest.approx({"eval/loss": 2 * numbers.mean()}, rel=1e-5)
    assert memory.selecting(7) == memory.figures["eval/loss"] and np.isnan(memory.selecting(8))


@pytest.mark.parametrize(("config", "sign"), [(RunConfig, 1.0), (HighestIsBest, -1.0)])
def test_patience_counts_evaluations_since_the_best(config, sign):
    memory = told(held_out(config=config, patience=2), [sign * x for x in (3.0, 2.0, float("nan"), 1.0, 1.0)])
    assert memory.fruitless == 1 and not memory.out_of_patience
    assert told(memory, [sign * 1.5], first=5).out_of_patience
    assert not told(held_out(config=config), [sign * x for x in (1.0, 2.0, 3.0, 4.0)]).out_of_patience


def test_what_a_checkpoint_keeps_goes_on():
    before = told(held_out(patience=2), [1.0, 2.0])
    after = held_out(patience=2)
    after.remember(json.loads(json.dumps(before.memory())))
    assert after.memory() == before.memory() and after.step == 1 and after.seconds < 60
    assert told(after, [1.5], first=2).out_of_patience


def test_a_signal_in_the_middle_leaves_what_was_known():
    task = Numbers()
    memory = told(held_out(task), [1.0])
    task.stop, before = Stop(), memory.memory()
    assert not memory.evaluate({"slope": jnp.float32(0.5)}, 1, task.stop)
    assert memory.memory() == before
