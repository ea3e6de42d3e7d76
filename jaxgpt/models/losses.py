"""From hidden states to a loss: the output head and the cross entropy. Dimension letters: see `attention.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.models.compact import compact_product

# The output head: a matrix, or one in fewer bits (see `models.compact`).
Head = Float[Array, "V D"] | Mapping[str, Array]

# So many rows, as in decoding, are faster as columns on the right of the head (measured on CPU: one row by a third).
FEW_ROWS = 16


def unembed(hidden: Float[Array, "... D"], head: Head, cap: float | None = None) -> Float[Array, "... V"]:
    """Logits over the vocabulary, in at least float32. GPT-2's head is its token embedding, with no scaling.

    With a `cap` C they stay within +-C: C tanh(logit / C) (Gemma Team 2024, section 2).

    Separate from the model, because task heads, decoding (last position only) and fused losses need the hidden states.
    """
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if isinstance(head, Mapping):
        logits = compact_product(flat, **head)
    elif len(flat) <= FEW_ROWS:
        logits = jnp.matmul(head.astype(hidden.dtype), flat.T, preferred_element_type=dtype).T
    else:
        logits = jnp.matmul(flat, head.astype(hidden.dtype).T, preferred_element_type=dtype)
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    return logits.reshape(*hidden.shape[:-1], logits.shape[-1])


def negative_log_likelihood(logits: Float[Array, "... V"], targets: Int[Array, ...]) -> Float[Array, ...]:
    """-log softmax(logits) at each target, in nats."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def cross_entropy(
    logits: Float[Array, "... V"], targets: Int[Array, ...], weights: Float[Array, ...]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Negative log-likelihood of the targets in nats: (weighted sum, sum of the weights).

    A sum and a weight instead of a mean, so that micro-batches, devices and hosts can be added up and divided once.
    Masking is by weight; no token id means padding.
    """
    return jnp.sum(negative_log_likelihood(logits, targets) * weights), jnp.sum(weights)


def smoothed_divergence(
    logits: Float[Array, "... V"], targets: Int[Array, ...], smoothing: float
) -> tuple[Float[Array, ...], Float[Array, ...]]:
    """Label smoothing (Szegedy et al. 2016; Vaswani et al. 2017, section 5.4): (divergence, negative log-likelihood).

    The target's distribution q gives 1 - smoothing to the target and spreads `smoothing` over all V tokens, the target
    included. The divergence is KL(q || softmax(logits)) in nats: 0 is the best there is, whatever the smoothing.
    """
    nll = negative_log_likelihood(logits, targets)
    spread = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)  # -log p, averaged over the vocabulary
    entropy = smoothing_entropy(smoothing, logits.shape[-1])
    return (1.0 - smoothing) * nll + smoothing * spread - entropy, nll


def smoothing_entropy(smoothing: float, size: int) -> float:
    """Entropy in nats of the distribution q of `smoothed_divergence` over `size` tokens."""
    if smoothing == 0.0:
        return 0.0
    other = smoothing / size
    own = 1.0 - smoothing + other
    return -own * math.log(own) - (size - 1) * other * math.log(other)
