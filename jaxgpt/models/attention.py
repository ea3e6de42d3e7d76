"""Attention: one function, and the forms it chooses from.

Dimension letters, here and everywhere: B batch, T query length, S key length, N heads, H head width,
D model width, F hidden width, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgpt.config import AttentionName
from jaxgpt.models.blocked_attention import BLOCK, blocked_attention, padded_length, whole_attention
from jaxgpt.models.device_attention import cudnn_attention, splash_attention

Scale = float | Float[Array, ""] | None


def dropout(x: Float[Array, "B ..."], rate: float, keys: Key[Array, " B"] | None) -> Float[Array, "B ..."]:
    """Zero a share `rate` of `x` and scale the rest by 1 / (1 - rate) (Srivastava et al. 2014).

    Each row has its own key, so that what a row loses depends on the row alone: not on the device it is on, nor on
    the micro-batch it is in. `keys=None` means deterministic: `x` comes back as it is.
    """
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def fold_in(keys: Key[Array, " B"] | None, number: int | Int[Array, ""]) -> Key[Array, " B"] | None:
    """Derive the keys of one place (a layer, a site in it) from a row's keys; None stays None."""
    if keys is None:
        return None
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)


def causal_mask(queries: int, keys: int, offset: int = 0) -> Bool[Array, "1 1 T S"]:
    """True where query t, which stands at position offset + t, may look at key position s: s <= offset + t."""
    positions = offset + jnp.arange(queries)
    return (jnp.arange(keys)[None, :] <= positions[:, None])[None, None]


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    *,
    causal: bool = False,
    window: int | None = None,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    implementation: AttentionName = "auto",
    scale: Scale = None,
    dropout_rate: float = 0.0,
    dropout_keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention: softmax(Q K^T / sqrt(H)) V (Vaswani et al. 2017, section 3.2.1).

    Args:
        query, key, value: each head's own part of the width.
        causal: position t sees positions 0..t (section 3.2.3 there); T = S.
        window: where it is causal, the last so many of them, t among them (Beltagy et al. 2020).
        segments: numbers of queries and of keys: a query sees the keys that bear its number. So documents that share a
            row see only themselves, and nothing sees padding (numbered otherwise). None: everything is seen. What a
            query gives that sees nothing is not defined: give it no weight in the loss.
        implementation: "reference", "blocked", "cudnn", "splash" (see `implementations`), or "auto".
        scale: of the scores instead of 1 / sqrt(H); no gradient flows to it.
        dropout_rate, dropout_keys: of the weights; which ones go depends on the implementation too.

    Returns:
        What each query takes of the values, in their dtype. Scores and softmax are computed in at least float32.

    Raises:
        ValueError: the implementation cannot do what is asked for.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    factor = jnp.asarray(1.0 / math.sqrt(query.shape[-1]) if scale is None else scale, dtype)
    dropped = dropout_rate > 0.0 and dropout_keys is not None
    if implementation == "auto":
        lengths = (query.shape[1], key.shape[1])
        implementation = best_implementation(jax.default_backend(), query.dtype, lengths, query.shape[3], causal)
        implementation = "blocked" if dropped else implementation
    if implementation == "reference":
        mask = visible(query.shape[1], key.shape[1], causal, segments, window)
        return reference_attention(
            query, key, value, mask=mask, scale=factor, dropout_rate=dropout_rate, dropout_keys=dropout_keys
        )
    if implementation == "blocked":
        return _blocked(query, key, value, factor, segments, dropout_keys, dropout_rate, causal, window)
    if dropped:
        raise ValueError(f"attention {implementation} has no dropout of its weights; blocked has")
    kernel = {"cudnn": cudnn_attention, "splash": splash_attention}[implementation]
    return kernel(query, key, value, factor, causal, segments, window)


def _blocked(
    query: Array,
    key: Array,
    value: Array,
    scale: Array,
    segments: Any,
    keys: Any,
    rate: float,
    causal: bool,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """Head by head; long causal ones block by block, made up to whole blocks with what no real position sees."""
    length = query.shape[1]
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    if not causal or length <= BLOCK:
        return whole_attention(query, key, value, scale, segments, keys, rate, causal, window).swapaxes(1, 2)
    beyond = padded_length(length) - length
    query, key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, beyond), (0, 0))) for x in (query, key, value))
    if segments is not None:
        segments = tuple(jnp.pad(x, ((0, 0), (0, beyond)), mode="edge") for x in segments)
    heads = blocked_attention(query, key, value, scale, segments, keys, rate, window)
    return heads[:, :, :length].swapaxes(1, 2)


def best_implementation(
    backend: str, dtype: Any, lengths: tuple[int, int], head_width: int, causal: bool
) -> AttentionName:
    """The one for this backend, shape (T and S) and dtype: a vendor's kernel where it takes them, otherwise blocked."""
    if backend == "gpu" and dtype in (jnp.bfloat16, jnp.float16):
        return "cudnn" if head_width % 8 == 0 and head_width <= 128 and not any(n % 2 for n in lengths) else "blocked"
    if backend == "tpu" and causal:
        return "splash" if lengths[0] % 128 == 0 and head_width % 64 == 0 else "blocked"
    return "blocked"


def visible(
    queries: int,
    keys: int,
    causal: bool,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
    window: int | None = None,
) -> Bool[Array, "#B 1 T S"] | None:
    """Which keys each query may see, as a mask; None: all."""
    mask = causal_mask(queries, keys) if causal else None
    if mask is not None and window is not None:
        mask = mask & ~causal_mask(queries, keys, -window)
    if segments is None:
        return mask
    same = segments[0][:, None, :, None] == segments[1][:, None, None, :]
    return same if mask is None else mask & same


def reference_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    *,
    mask: Bool[Array, "#B #N #T S"] | None = None,
    scale: Scale = None,
    dropout_rate: float = 0.0,
    dropout_keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B T N H"]:
    """The formula as it is written, with the whole score matrix (B, N, T, S) in memory; the others are tested by it."""
    weights = attention_weights(query, key.swapaxes(1, 2), mask, scale)
    weights = dropout(weights, dropout_rate, dropout_keys)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, value)


def attention_weights(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B N S H"],
    mask: Bool[Array, "#B #N #T S"] | None,
    scale: Scale = None,
) -> Float[Array, "B N T S"]:
    """How much each query takes of each value, of keys that lie head by head: softmax(Q K^T / sqrt(H)).

    Each row of weights adds up to 1. A query whose mask is False everywhere takes the same of all values.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("BTNH,BNSH->BNTS", query, key, preferred_element_type=dtype)
    scores = scores / math.sqrt(query.shape[-1]) if scale is None else scores * scale
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(scores, axis=-1).astype(query.dtype)
