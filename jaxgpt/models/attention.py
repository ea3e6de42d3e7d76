"""Attention: the reference form, the causal form in blocks, and the key-value cache.

Dimension letters, here and everywhere: B batch, T query length, S key length, N heads, H head width,
D model width, F hidden width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgpt.config import AttentionName

# Queries a block: measured on CPU, 64 and 256 are slower at every length from 256 to 2,048.
QUERY_BLOCK = 128

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


def self_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    *,
    mask: Bool[Array, "#B #N #T S"] | None = None,
    scale: Scale = None,
    dropout_rate: float = 0.0,
    dropout_keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention: softmax(Q K^T / sqrt(H)) V (Vaswani et al. 2017, section 3.2.1).

    The reference form, with the whole score matrix (B, N, T, S) in memory. Scores and softmax are computed in at least
    float32. A query whose mask is False everywhere gets the mean of all values: mask such rows in the loss. `scale`
    multiplies the scores instead of 1 / sqrt(H).
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("BTNH,BSNH->BNTS", query, key, preferred_element_type=dtype)
    weights = _weights(scores, query, mask, scale)
    weights = dropout(weights, dropout_rate, dropout_keys)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, value)


def _weights(
    scores: Float[Array, "B N T S"],
    query: Float[Array, "B T N H"],
    mask: Bool[Array, "#B #N #T S"] | None,
    scale: Scale,
) -> Float[Array, "B N T S"]:
    """Scores to what each query takes of each value, in the query's dtype."""
    scores = scores / math.sqrt(query.shape[-1]) if scale is None else scores * scale
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(scores, axis=-1).astype(query.dtype)


def blocked_masked_self_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N H"],
    *,
    scale: Scale = None,
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
            scale=scale,
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
    scale: Scale = None,
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
    return attend(query, key, value, scale=scale, dropout_rate=dropout_rate, dropout_keys=dropout_keys)


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far, of every layer, so that decoding computes each token once.

    A pytree that goes into `apply` and comes out new. Each row has a length of its own, so that prompts of different
    lengths share a batch: what lies beyond a row's length is never looked at, and is overwritten as the row grows. A
    layer that has seen nothing yet has no arrays (see `empty_cache`). The arrays are one pair a layer, not stacked: of
    a stacked array XLA would copy a layer's part to read it.
    """

    key: tuple[Float[Array, "B N S H"], ...]
    value: tuple[Float[Array, "B N S H"], ...]
    length: Int[Array, " B"]
    capacity: int = flax.struct.field(pytree_node=False)

    def has(self, layer: int) -> bool:
        """Whether `layer` has seen tokens."""
        return layer < len(self.key)

    def start(self, key: Float[Array, "B T N H"], value: Float[Array, "B T N H"]) -> KVCache:
        """Add the first tokens of the next layer, of every row, T up to S."""
        beyond = ((0, 0), (0, 0), (0, self.capacity - key.shape[1]), (0, 0))
        key, value = (jnp.pad(x.swapaxes(1, 2), beyond) for x in (key, value))
        return dataclasses.replace(self, key=(*self.key, key), value=(*self.value, value))

    def insert(self, layer: int, key: Float[Array, "B T N H"], value: Float[Array, "B T N H"]) -> KVCache:
        """Write T new keys and values of one layer at each row's `length`, which moves once all layers have: see `GPT`.

        The caller sees to it that they fit: where they do not, they would overwrite older ones.
        """
        key, value = (_write_rows(old[layer], new, self.length) for old, new in ((self.key, key), (self.value, value)))
        return dataclasses.replace(self, key=_with(self.key, layer, key), value=_with(self.value, layer, value))

    def take(self, rows: Int[Array, " R"], groups: Int[Array, " G"] | None = None) -> KVCache:
        """Return the cache of these rows, in this order; a row may come several times. Groups change nothing here."""
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), self)


def empty_cache(batch: int, capacity: int) -> KVCache:
    """A cache of `batch` rows for up to `capacity` tokens each, before any token."""
    return KVCache((), (), jnp.zeros(batch, jnp.int32), capacity)


@flax.struct.dataclass
class DecoderCache(KVCache):
    """The cache of a decoder that also looks at a source: besides its own past, the keys and values of that.

    They are projected once, with the first tokens. G sources may each have several rows (R = G x beams, those of a
    source side by side): what belongs to a source is kept once.
    """

    source_key: tuple[Float[Array, "G N source H"], ...]
    source_value: tuple[Float[Array, "G N source H"], ...]
    source_mask: Bool[Array, "G source"]

    def has_source(self, layer: int) -> bool:
        """Whether the keys and values of `layer` are there."""
        return layer < len(self.source_key)

    def start_source(self, key: Float[Array, "G N source H"], value: Float[Array, "G N source H"]) -> DecoderCache:
        """Add those of the next layer."""
        return dataclasses.replace(self, source_key=(*self.source_key, key), source_value=(*self.source_value, value))

    def take(self, rows: Int[Array, " R"], groups: Int[Array, " G"] | None = None) -> DecoderCache:
        """Return the cache of these rows, in this order; `groups` are their sources, None: the same as before."""

        def taken(tree: Any, places: Int[Array, " n"]) -> Any:
            return jax.tree.map(lambda x: jnp.take(x, places, axis=0), tree)

        key, value, length = taken((self.key, self.value, self.length), rows)
        past = dataclasses.replace(self, key=key, value=value, length=length)
        if groups is None:
            return past
        source = taken((self.source_key, self.source_value, self.source_mask), groups)
        return dataclasses.replace(
            past, **dict(zip(("source_key", "source_value", "source_mask"), source, strict=True))
        )


def _with(layers: tuple[Array, ...], layer: int, new: Array) -> tuple[Array, ...]:
    return (*layers[:layer], new, *layers[layer + 1 :])


def _write_rows(
    old: Float[Array, "B N S H"], new: Float[Array, "B T N H"], start: Int[Array, " B"]
) -> Float[Array, "B N S H"]:
    new = new.swapaxes(1, 2).astype(old.dtype)
    zero = jnp.zeros((), start.dtype)  # all indices of one type, also where x64 is on
    if old.shape[0] == 1:  # one row needs no scatter, which takes a fifth longer
        return jax.lax.dynamic_update_slice(old, new, (zero, zero, start[0], zero))
    return jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice(row, part, (zero, at, zero)))(old, new, start)


def attend_to_cache(
    query: Float[Array, "B T N H"], cache: KVCache, layer: int, *, scale: Scale = None
) -> Float[Array, "B T N H"]:
    """Attention of the T newest tokens of each row, already in the cache at its `length`, to all up to themselves."""
    positions = cache.length[:, None] + jnp.arange(query.shape[1])
    mask = jnp.arange(cache.capacity) <= positions[:, None, :, None]
    weights = attention_weights(query, cache.key[layer], mask, scale)
    return jnp.einsum("BNTS,BNSH->BTNH", weights, cache.value[layer])


def attention_weights(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B N S H"],
    mask: Bool[Array, "#B #N #T S"] | None,
    scale: Scale = None,
) -> Float[Array, "B N T S"]:
    """How much each query takes of each value, of keys that lie head by head, as in a cache: softmax(Q K^T / sqrt(H)).

    Each row of weights adds up to 1.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    return _weights(jnp.einsum("BTNH,BNSH->BNTS", query, key, preferred_element_type=dtype), query, mask, scale)
