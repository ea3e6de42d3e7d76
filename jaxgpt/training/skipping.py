"""Steps that are not taken: with a loss or gradient that is not finite or, if so wished, far above those before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

WINDOW = 128  # steps that a spike is measured against, and half of them before there can be one
SPREAD_FLOOR = 1e-6  # of the mean: below it two values differ by rounding


@flax.struct.dataclass
class RecentSteps:
    """Loss and gradient norm of the last steps that were taken, a ring of W.

    As in any state, the fields are arrays, or in trees beside it what is said of each: a shape, a sharding.
    """

    losses: Any
    """(W,) float32"""
    norms: Any
    """(W,) float32"""
    taken: Any
    """how many steps were taken, an int32 scalar; the next one's place in the ring follows"""


def no_steps(spikes: float | None) -> RecentSteps | tuple[()]:
    """What a run begins with; nothing where spikes are not looked for, so that no checkpoint has to hold it."""
    if spikes is None:
        return ()
    return RecentSteps(jnp.zeros(WINDOW, jnp.float32), jnp.zeros(WINDOW, jnp.float32), jnp.zeros((), jnp.int32))


def is_good(
    recent: RecentSteps | tuple[()], loss: Float[Array, ""], norm: Float[Array, ""], spikes: float | None
) -> Bool[Array, ""]:
    """Whether a step is to be taken: both figures are finite and neither is a spike.

    A spike lies more than `spikes` standard deviations above the mean of the recent steps (Levanter's SkipStepConfig,
    MaxText's skip_step_on_spikes). The figures are those of the whole batch, so every device decides alike.
    """
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if spikes is None:
        return good
    assert isinstance(recent, RecentSteps)
    known = jnp.arange(WINDOW) < recent.taken
    for figure, values in ((loss, recent.losses), (norm, recent.norms)):
        mean = jnp.mean(values, where=known)
        spread = jnp.maximum(jnp.std(values, where=known), SPREAD_FLOOR * jnp.abs(mean))
        good &= (recent.taken < WINDOW // 2) | (figure <= mean + spikes * spread)
    return good


def remember(recent: Any, loss: Float[Array, ""], norm: Float[Array, ""]) -> Any:
    """The recent steps after one more that was taken, in place of the oldest."""
    if not isinstance(recent, RecentSteps):
        return recent
    place = recent.taken % WINDOW
    losses, norms = (
        values.at[place].set(figure.astype(values.dtype))
        for figure, values in ((loss, recent.losses), (norm, recent.norms))
    )
    return RecentSteps(losses, norms, recent.taken + 1)


@dataclass
class Skipped:
    """How many steps of a run were not taken, on the host's side."""

    limit: int
    """the run ends after so many in a row"""
    total: int = 0
    in_a_row: int = 0

    def count(self, skipped: bool) -> None:
        """Take note of one more step."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0


def reason(loss: float, norm: float) -> str:
    """Why a step with these figures was not taken."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(norm):
        return f"the gradient norm is {norm}"
    return f"loss {loss:.4g} and gradient norm {norm:.4g} are far from those before"
