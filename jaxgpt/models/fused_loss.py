"""The output head and its loss in one: the logits of a few positions at a time, and their gradients at once."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.models.losses import smoothed_divergence, smoothing_entropy, unembed
from jaxgpt.models.rows import greatest
from jaxgpt.models.sharding import add_up_rows

# Logits computed at a time, at least: the products of fewer rows are slower (measured on CPU, with 10,000 tokens).
ROWS = 256


def smoothed_divergence_sums(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    smoothing: float,
    cap: float | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sums of what `losses.smoothed_divergence` gives for `unembed(hidden, head, cap)`: (divergence, nll).

    The logits of all positions never exist at once, and where gradients are wanted, they are computed with the loss:
    the exponentials of the logits are all that they need. (Not so with a `cap`: then they are computed twice.) Use the
    gradient of the first sum only; the second is a measurement.
    """

    def sums(head: Array, hidden: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
        if cap is None:
            return _sums(hidden, head, targets, weights, smoothing)
        return _sums_of_parts(hidden, head, targets, weights, smoothing, cap)

    return add_up_rows(sums, head, hidden, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sums(hidden: Array, head: Array, targets: Array, weights: Array, smoothing: float) -> tuple[Array, Array]:
    return _sums_of_parts(hidden, head, targets, weights, smoothing, None)


def _sums_of_parts(
    hidden: Array, head: Array, targets: Array, weights: Array, smoothing: float, cap: float | None
) -> tuple[Array, Array]:
    parts = _parts(hidden, targets, weights)

    @jax.checkpoint
    def of_part(sums: Any, part: Any) -> Any:
        hidden, targets, weights = part
        divergence, nll = smoothed_divergence(unembed(hidden, head, cap), targets, smoothing)
        return (sums[0] + jnp.sum(divergence * weights), sums[1] + jnp.sum(nll * weights)), None

    zero = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
    return jax.lax.scan(of_part, (zero, zero), parts)[0]


def _parts(
    hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], weights: Float[Array, "B T"]
) -> tuple[Float[Array, "C R D"], Int[Array, "C R"], Float[Array, "C R"]]:
    """Cut along T, so that the rows, which devices may share, stay side by side: R = B times a few positions.

    Those that are missing at the end have no weight.
    """
    batch, length = targets.shape
    count = -(-length // -(-ROWS // batch))
    positions = -(-length // count)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, count * positions - length), *((0, 0),) * (x.ndim - 2)))
        return x.swapaxes(0, 1).reshape(count, positions * batch, *x.shape[2:])

    return cut(hidden), cut(targets), cut(weights)


def _forward(hidden: Array, head: Array, targets: Array, weights: Array, smoothing: float) -> tuple[Any, Any]:
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    matrix, size = head.astype(hidden.dtype), head.shape[0]
    mean_row = jnp.mean(matrix.astype(dtype), axis=0)

    def of_part(carried: Any, part: Any) -> Any:
        divergence, nll, of_head = carried
        hidden, targets, weights = part
        logits = jnp.matmul(hidden, matrix.T, preferred_element_type=dtype)
        highest = greatest(logits)
        powers = jnp.exp(logits - highest)
        total = jnp.sum(powers, axis=-1, keepdims=True)
        of_target = matrix[targets].astype(dtype)
        wide = hidden.astype(dtype)
        log_total = (highest + jnp.log(total))[:, 0]
        own = log_total - jnp.sum(wide * of_target, axis=-1)
        spread = log_total - wide @ mean_row
        # d divergence / d logits = weight (softmax - (1 - smoothing) onehot - smoothing / V): the first term goes
        # through two products, the others through rows of the head.
        weights = weights[:, None]
        share = weights / total
        powers = powers.astype(hidden.dtype)
        of_hidden = share * jnp.matmul(powers, matrix, preferred_element_type=dtype)
        of_hidden -= weights * ((1.0 - smoothing) * of_target + smoothing * mean_row)
        scaled = (share * wide).astype(hidden.dtype)
        of_head = of_head + jnp.matmul(powers.T, scaled, preferred_element_type=dtype)
        of_head = of_head - (smoothing / size) * jnp.sum(weights * wide, axis=0)
        of_head = of_head.at[targets].add(-(1.0 - smoothing) * weights * wide)
        per_token = (1.0 - smoothing) * own + smoothing * spread
        sums = (divergence + jnp.sum(per_token * weights[:, 0]), nll + jnp.sum(own * weights[:, 0]), of_head)
        return sums, of_hidden.astype(hidden.dtype)

    zero = jnp.zeros((), dtype)
    start = (zero, zero, jnp.zeros(head.shape, dtype))
    (divergence, nll, of_head), of_hidden = jax.lax.scan(of_part, start, _parts(hidden, targets, weights))
    batch, length, width = hidden.shape
    of_hidden = of_hidden.reshape(-1, batch, width)[:length].swapaxes(0, 1)
    divergence = divergence - smoothing_entropy(smoothing, size) * jnp.sum(weights)
    return (divergence, nll), (of_hidden, of_head.astype(head.dtype))


def _backward(smoothing: float, kept: Any, gradient: tuple[Array, Array]) -> tuple[Any, ...]:
    of_hidden, of_head = kept
    scale = gradient[0]
    return (of_hidden * scale).astype(of_hidden.dtype), (of_head * scale).astype(of_head.dtype), None, None


_sums.defvjp(_forward, _backward)
