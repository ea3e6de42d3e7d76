"""The optimiser: one Optax chain, built from the config."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxgpt.config import OptimizerConfig
from jaxgpt.models.rows import sum_of_rows

Schedule = Callable[[Float[Array, ""]], Float[Array, ""]]


def make_schedule(config: OptimizerConfig, steps: int, width: int = 1) -> Schedule:
    """Return the learning rate as a share of its peak, as a function of the position in the run (0 .. `steps`).

    Warm-up is linear from 0 and reaches the peak at `warmup_steps` (or `warmup_share` of n); then, with w the
    warm-up and n the steps: cosine and linear fall to `final_learning_rate` at n; inverse-sqrt is sqrt(w /
    position) (Vaswani et al. 2017, section 5.3), noam the same times 1 / sqrt(D w), D the model's width, which is
    that section's formula times the learning rate; wsd stays at the peak and falls linearly in the last
    `decay_share` of the run (Hu et al. 2024).
    """
    warmup, floor = float(config.warmup_steps), config.final_learning_rate / config.learning_rate
    warmup = warmup if config.warmup_share is None else config.warmup_share * steps
    peak = (width * max(1, warmup)) ** -0.5 if config.schedule == "noam" else 1.0

    def schedule(position: Float[Array, ""]) -> Float[Array, ""]:
        rise = jnp.minimum(1.0, position / max(1, warmup)) if warmup else 1.0
        done = jnp.clip((position - warmup) / max(1, steps - warmup), 0.0, 1.0)
        if config.schedule == "cosine":
            fall = floor + (1.0 - floor) * 0.5 * (1.0 + jnp.cos(math.pi * done))
        elif config.schedule == "linear":
            fall = 1.0 + (floor - 1.0) * done
        elif config.schedule in ("inverse-sqrt", "noam"):
            fall = peak * jnp.sqrt(max(1, warmup) / jnp.maximum(position, max(1, warmup)))
        elif config.schedule == "wsd":
            left = (steps - position) / max(1.0, config.decay_share * steps)
            fall = floor + (1.0 - floor) * jnp.clip(left, 0.0, 1.0)
        else:
            fall = jnp.ones_like(position)
        return rise * fall

    return schedule


def scale_by_position(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Scale updates by the schedule at `position`, an argument of `update`: 0 at the first step, a float.

    Not a count in the state: a run that ends by the clock moves along its schedule by the share of its time.
    """

    def update(updates: Any, state: optax.EmptyState, params: Any = None, *, position: Array, **_: Any) -> Any:
        rate = schedule(position)
        return jax.tree.map(lambda u: (rate * u).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def global_norm(tree: Any) -> Float[Array, ""]:
    """The root of the sum of all squares, in at least float32; the sums as products, half the time on CPU."""

    def squares(x: Array) -> Array:
        return jnp.sum(sum_of_rows(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))).reshape(len(x), -1)))

    return jnp.sqrt(sum(squares(jnp.atleast_1d(leaf)) for leaf in jax.tree.leaves(tree)))


def clip_by_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """Shrink updates whose global norm is above `limit` to it (Pascanu et al. 2013).

    `norm` is an argument of `update`, because who calls it knows it already; None: it is computed.
    """

    def update(updates: Any, state: optax.EmptyState, params: Any = None, *, norm: Any = None, **_: Any) -> Any:
        norm = global_norm(updates) if norm is None else norm
        factor = jnp.where(norm < limit, 1.0, limit / norm)
        return jax.tree.map(lambda u: (factor * u).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def decay_by_layer(share: float) -> optax.GradientTransformation:
    """Scale updates by depth (Howard and Ruder 2018, section 3.2): the top block's by `share`, the next by its square.

    What is above the blocks keeps its own, and the embeddings have that of a layer below the lowest. Where only the
    last blocks are trained, those are the blocks.
    """

    def scaled(updates: Any, parameters: Any) -> Any:
        depth = max((len(x) for path, x in jax.tree_util.tree_leaves_with_path(updates) if _in_blocks(path)), default=0)

        def one(path: tuple[Any, ...], update: Array) -> Array:
            if _in_blocks(path):
                rates = share ** jnp.arange(depth, 0, -1, dtype=jnp.float32)
                return (update * rates.reshape(-1, *(1,) * (update.ndim - 1))).astype(update.dtype)
            embedded = any(name.endswith("_embedding") for name in _names(path))
            return (update * share ** (depth + 1)).astype(update.dtype) if embedded else update

        return jax.tree_util.tree_map_with_path(one, updates)

    return optax.stateless(scaled)


def _in_blocks(path: tuple[Any, ...]) -> bool:
    return "blocks" in _names(path)


def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a parameter is a weight matrix or an embedding table; only these decay.

    Biases and norm scales are vectors, also where blocks are stacked on a leading L axis.
    """
    return leaf.ndim - _in_blocks(path) >= 2


def make_optimizer(config: OptimizerConfig, steps: int, width: int = 1) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, AdamW (Loshchilov and Hutter 2019) or Muon (Jordan 2024), scale by the schedule.

    `update(gradients, state, parameters, position=..., norm=...)`. Only matrices decay, not biases and norm scales (see
    `is_matrix`). Muon takes the blocks' matrices and leaves the rest to AdamW. `width` is the model's (schedule noam).
    """

    def decayed(parameters: Any) -> Any:
        return jax.tree_util.tree_map_with_path(is_matrix, parameters)

    rule = optax.adamw(
        config.learning_rate,
        config.beta1,
        config.beta2,
        config.epsilon,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    if config.name == "muon":
        muon = optax.contrib.muon(
            config.muon_learning_rate,
            beta=config.muon_beta,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_muon_dimensions,
        )
        rule = optax.partition({"muon": muon, "adamw": rule}, _groups)
    rules = [rule] if config.layer_decay == 1.0 else [rule, decay_by_layer(config.layer_decay)]
    clip = optax.identity() if config.clip_norm is None else clip_by_norm(config.clip_norm)
    return optax.with_extra_args_support(
        optax.chain(clip, *rules, scale_by_position(make_schedule(config, steps, width)))
    )


def _groups(parameters: Any) -> Any:
    """Which rule changes which parameter: Muon the blocks' matrices, AdamW the rest."""

    def group(path: tuple[Any, ...], leaf: Any) -> str:
        return "muon" if _in_blocks(path) and is_matrix(path, leaf) else "adamw"

    return jax.tree_util.tree_map_with_path(group, parameters)


def _muon_dimensions(parameters: Any) -> Any:
    """Of Muon's parameters (L, in, out): each layer is a matrix of its own."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2), parameters)


def _names(path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(entry, "key", entry)) for entry in path]
