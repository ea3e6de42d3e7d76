"""Attention: the reference form, the causal form in blocks, and the key-value cache.

Dimension letters, here and everywhere: B batch, T query length, S key length, N heads, H head width,
D model width, F hidden width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgpt.config import AttentionName

# Queries a block: measured on CPU, 64 and 256 are slower at every length from 256 to 2,048.
QUERY_BLOCK = 128


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


def causal_mask(queries: int, keys: int, offset: int | Int[Array, ""] = 0) -> Bool[Array, "1 1 T S"]:
    """True where query t, which stands at position offset + t, may look at key position s: s <= offset + t."""
    positions = offset + jnp.arange(queries)
    return (jnp.arange(keys)[None, :] <= positions[:, None])[None, None]


def self_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    *,
    mask: Bool[Array, "#B #N T S"] | None = None,
    dropout_rate: float = 0.0,
    dropout_keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention: softmax(Q K^T / sqrt(H)) V (Vaswani et al. 2017, section 3.2.1).

    The reference form, with the whole score matrix (B, N, T, S) in memory. Scores and softmax are computed in at least
    float32. A query whose mask is False everywhere gets the mean of all values: mask such rows in the loss.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("BTNH,BSNH->BNTS", query, key, preferred_element_type=dtype) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    weights = dropout(weights, dropout_rate, dropout_keys)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, value)


def blocked_masked_self_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N H"],
    *,
    dropout_rate: float = 0.0,
    dropout_keys: Key[Array, " B"] | None = None,
    block: int = QUERY_BLOCK,
) -> Float[Array, "B T N H"]:
    """Causal attention by blocks of queries, each against the keys up to its own end.

    Equal to the reference form with a causal mask, at about half its work and memory: what lies wholly above the
    diagonal is never computed. (Its dropout draws differ from the reference form's.)
    """
    length = query.shape[1]
    blocks = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        attended = self_attention(
            query[:, start:stop],
            key[:, :stop],
            value[:, :stop],
            mask=causal_mask(stop - start, stop, start),
            dropout_rate=dropout_rate,
            dropout_keys=fold_in(dropout_keys, start),
        )
        blocks.append(attended)
    return jnp.concatenate(blocks, axis=1)


def masked_self_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N H"],
    *,
    implementation: AttentionName = "auto",
    dropout_rate: float = 0.0,
    dropout_keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B T N H"]:
    """Causal self-attention: position t sees positions 0..t (Vaswani et al. 2017, section 3.2.3; Radford et al. 2018).

    `implementation`: "reference" (full score matrix), "blocked", or "auto": blocked beyond one block of queries.
    """
    length = query.shape[1]
    if implementation == "blocked" or (implementation == "auto" and length > QUERY_BLOCK):
        attend = blocked_masked_self_attention
    else:
        attend = functools.partial(self_attention, mask=causal_mask(length, length))
    return attend(query, key, value, dropout_rate=dropout_rate, dropout_keys=dropout_keys)


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far, of every layer, so that decoding computes each token once.

    A pytree that goes into `apply` and comes out new. `length` counts the tokens that are valid; what lies beyond is
    never looked at.
    """

    key: Float[Array, "L B S N H"]
    value: Float[Array, "L B S N H"]
    length: Int[Array, ""]

    @property
    def capacity(self) -> int:
        """S, how many tokens fit."""
        return self.key.shape[2]

    def insert(
        self, layer: Int[Array, ""], key: Float[Array, "B T N H"], value: Float[Array, "B T N H"]
    ) -> tuple[KVCache, Float[Array, "B S N H"], Float[Array, "B S N H"]]:
        """Write one layer's T new keys and values at `length`; return the cache and all of that layer's.

        `length` itself moves once all layers have written: see `GPT`.
        """
        zero = jnp.zeros((), self.length.dtype)  # all indices of one type, also where x64 is on
        start = (layer, zero, self.length, zero, zero)
        keys = jax.lax.dynamic_update_slice(self.key, key[None].astype(self.key.dtype), start)
        values = jax.lax.dynamic_update_slice(self.value, value[None].astype(self.value.dtype), start)
        return dataclasses.replace(self, key=keys, value=values), keys[layer], values[layer]
