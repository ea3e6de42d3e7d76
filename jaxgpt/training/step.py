"""One training step, a pure function; how it is spread over devices is `parallel.py`'s matter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from jaxgpt.models.partition import combine
from jaxgpt.training.optimizer import global_norm
from jaxgpt.training.skipping import is_good, remember

Parameters = Any
Batch = Mapping[str, Array]
# (parameters, batch, a dropout key for each row or None) -> (sum of the loss, sum of the weights)
Loss = Callable[[Parameters, Batch, Key[Array, " B"] | None], tuple[Float[Array, ""], Float[Array, ""]]]
# (parameters, batch) -> sums over one evaluation batch, numbers or arrays, which are added up over all of them
EvaluationSums = Callable[..., tuple[Float[Array, "..."], ...]]
Reduce = Callable[[Any], Any]


@flax.struct.dataclass
class TrainState:
    """All that a run carries from one step to the next. Data order and dropout follow from the seed and `step`."""

    step: Any
    """how many there were, an int32 scalar"""
    parameters: Parameters
    """those that are trained"""
    optimizer_state: optax.OptState
    frozen: Parameters = flax.struct.field(default_factory=dict)
    """those that stay as they are, often none: see `models.partition`"""
    recent: Any = ()
    """what loss spikes are measured against, nothing where they are not looked for: see `training.skipping`"""

    @property
    def model(self) -> Parameters:
        """All parameters."""
        return combine(self.parameters, self.frozen)


def identity(tree: Any) -> Any:
    """The `reduce` of a single device, or of a program over global arrays: there is nothing to add up."""
    return tree


def row_keys(seed: int, step: Int[Array, ""], rows: Int[Array, " B"]) -> Key[Array, " B"]:
    """The dropout key of each row, from (seed, step, row of the global batch): never from the device."""
    at_step = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(at_step, rows)


def loss_and_gradients(
    loss: Loss, parameters: Parameters, frozen: Parameters, batch: Batch, keys: Key[Array, " B"], micro_batches: int
) -> tuple[Float[Array, ""], Float[Array, ""], Parameters]:
    """Sums over the batch of loss, weight and gradients, computed in `micro_batches` equal parts one after another.

    Sums, not means: parts with fewer real tokens count for less, and the caller divides once. Gradients are those of
    `parameters`, not of `frozen`.
    """

    def of_parameters(parameters: Parameters, batch: Batch, keys: Key[Array, " b"]) -> tuple[Any, Any]:
        return loss(combine(parameters, frozen), batch, keys)

    def of_part(part: tuple[Batch, Key[Array, " b"]]) -> tuple[Any, Any, Any]:
        (total, weight), gradients = jax.value_and_grad(of_parameters, has_aux=True)(parameters, *part)
        return total, weight, gradients

    if micro_batches == 1:
        return of_part((batch, keys))
    # Every so many rows are a part, so that each device has its share of every part.
    parts = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), (batch, keys))
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
    )
    sums, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, of_part(part)), None), zeros, parts)
    return sums


@dataclass(frozen=True)
class Step:
    """A step in its two pure parts: sums over some rows, and what follows from the sums over all of them.

    Between the two, devices add up. Called, it is both, with `reduce` between them.
    """

    sums: Callable[[Any, Batch], Any]
    """(what it reads of the state, rows) -> a tree of sums"""
    finish: Callable[..., Any]
    """(state, sums over the global batch, *scalars) -> the result of the step"""
    reads: Callable[[Any], Any] = identity
    """the part of a state that `sums` needs"""

    def __call__(self, state: Any, batch: Batch, *scalars: Any, reduce: Reduce = identity) -> Any:
        """Run the whole step; `reduce` adds a tree up over the devices (`psum` under pmap)."""
        return self.finish(state, reduce(self.sums(self.reads(state), batch)), *scalars)


def training_step(
    *,
    loss: Loss,
    optimizer: optax.GradientTransformationExtraArgs,
    seed: int,
    micro_batches: int = 1,
    spikes: float | None = None,
) -> Step:
    """`train_step` in its two parts."""
    sums = functools.partial(gradient_sums, loss=loss, seed=seed, micro_batches=micro_batches)
    return Step(sums, functools.partial(update, optimizer=optimizer, spikes=spikes), without_optimizer)


def evaluation_step(sums: EvaluationSums) -> Step:
    """`evaluate_step` in its two parts."""
    return Step(sums, lambda parameters, sums: sums)


def without_optimizer(state: TrainState) -> TrainState:
    """The state without what only `update` needs."""
    return TrainState(state.step, state.parameters, (), state.frozen)


def gradient_sums(
    state: TrainState, batch: Batch, *, loss: Loss, seed: int, micro_batches: int = 1
) -> tuple[Float[Array, ""], Float[Array, ""], Parameters]:
    """Loss, weight and gradients summed over the rows of `batch`, with the dropout of this step."""
    keys = row_keys(seed, state.step, batch["row"])
    return loss_and_gradients(loss, state.parameters, state.frozen, batch, keys, micro_batches)


def update(
    state: TrainState,
    sums: tuple[Float[Array, ""], Float[Array, ""], Parameters],
    position: Float[Array, ""],
    *,
    optimizer: optax.GradientTransformationExtraArgs,
    spikes: float | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """The state after a step, and its metrics, from the sums over the global batch (see `train_step`)."""
    total, weight, gradients = sums
    # The norm of the sums, divided: that of the quotients would need them all written to memory first.
    norm = global_norm(gradients) / weight
    share = 1.0 / weight
    mean = total / weight
    good = is_good(state.recent, mean, norm, spikes)

    def taken(parameters: Parameters, optimizer_state: Any, recent: Any) -> tuple[Any, Any, Any]:
        means = jax.tree.map(lambda g: g * share.astype(g.dtype), gradients)
        updates, optimizer_state = optimizer.update(means, optimizer_state, parameters, position=position, norm=norm)
        return optax.apply_updates(parameters, updates), optimizer_state, remember(recent, mean, norm)

    def chosen(*before: Any) -> Any:
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), taken(*before), before)

    def branched(*before: Any) -> Any:
        return jax.lax.cond(good, taken, lambda *before: before, *before)

    # To choose between numbers keeps copies of the old state on CPU (half the optimiser's time); a branch writes over
    # it, but a GPU would make the host wait for `good`.
    before = (state.parameters, state.optimizer_state, state.recent)
    parameters, optimizer_state, recent = jax.lax.platform_dependent(*before, cpu=branched, default=chosen)
    metrics = {"loss": mean, "gradient_norm": norm, "tokens": weight, "skipped": ~good}
    return TrainState(state.step + 1, parameters, optimizer_state, state.frozen, recent), metrics


def train_step(
    state: TrainState,
    batch: Batch,
    position: Float[Array, ""],
    *,
    loss: Loss,
    optimizer: optax.GradientTransformationExtraArgs,
    seed: int,
    micro_batches: int = 1,
    spikes: float | None = None,
    reduce: Reduce = identity,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimiser step on one global batch, or none: where loss or gradient is not good, all stays but the count.

    The decision is part of the program, as the state before is gone when the host could see the loss. What stays, stays
    bit for bit (see `training.skipping`).

    Args:
        state: parameters, optimiser state and step before.
        batch: this device's rows; `batch["row"]` is each row's place in the global batch.
        position: where in the schedule this step stands, in steps.
        loss: the task's, see `Loss`.
        spikes: standard deviations that make a spike (None: any finite loss is good).
        reduce: adds a tree up over the devices (`psum` under pmap).

    Returns:
        The state after, and the metrics of this step: `loss` (mean over the weights, nats), `gradient_norm` (before
        clipping), `tokens` (the sum of the weights) and `skipped`, whether the step was not taken.
    """
    step = training_step(loss=loss, optimizer=optimizer, seed=seed, micro_batches=micro_batches, spikes=spikes)
    return step(state, batch, position, reduce=reduce)


def evaluate_step(
    parameters: Parameters,
    batch: Batch,
    *,
    sums: EvaluationSums,
    reduce: Reduce = identity,
) -> tuple[Float[Array, ...], ...]:
    """What `sums` (a task's) computes of one evaluation batch, added up over devices."""
    return evaluation_step(sums)(parameters, batch, reduce=reduce)
