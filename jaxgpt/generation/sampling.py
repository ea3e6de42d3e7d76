"""From logits to a token: pure functions. Dimension letters: see `models/attention.py`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Set all but the k largest logits of each row to -inf; of equal ones, those with the lower id stay."""
    values, indices = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return jnp.full_like(logits, -jnp.inf).at[jnp.arange(logits.shape[0])[:, None], indices].set(values)


def sample_token(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    temperature: Float[Array, ""],
    top_k: int | None = None,
) -> Int[Array, " B"]:
    """Draw one token a row from softmax(logits / temperature), among the `top_k` most likely if given.

    Temperature 0 takes the most likely token. Each row has its own key, so what it draws depends on no other row.
    """
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    draw = jax.vmap(jax.random.categorical)(keys, logits / jnp.where(temperature > 0, temperature, 1.0))
    return jnp.where(temperature > 0, draw, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
