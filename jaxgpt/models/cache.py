"""The key-value cache, of a GPT and of a decoder. Dimension letters: see `attention.py`."""

from __future__ import annotations

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgpt.models.attention import Scale, attention_weights

# XLA on CPU makes products of one query each in vectors; those of five take twice to five times as long in all.
FEW_QUERIES = 8


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far, of every layer, so that decoding computes each token once.

    A pytree that goes into `apply` and comes out new. Each row has a length of its own, so that prompts of different
    lengths share a batch: what lies beyond a row's length is never looked at, and is overwritten as the row grows. A
    layer that has seen nothing yet has no arrays (see `empty_cache`). The arrays are one pair a layer, not stacked, and
    the heads of all rows are one dimension, B N: of any other form XLA on CPU would copy a layer's arrays in each step
    instead of writing into them.
    """

    key: tuple[Float[Array, "BN S H"], ...]
    value: tuple[Float[Array, "BN S H"], ...]
    length: Int[Array, " B"]
    capacity: int = flax.struct.field(pytree_node=False)

    def has(self, layer: int) -> bool:
        """Whether `layer` has seen tokens."""
        return layer < len(self.key)

    def start(self, key: Float[Array, "B T N H"], value: Float[Array, "B T N H"]) -> KVCache:
        """Add the first tokens of the next layer, of every row, T up to S."""
        beyond = ((0, 0), (0, 0), (0, self.capacity - key.shape[1]), (0, 0))
        key, value = (_heads_joined(jnp.pad(x.swapaxes(1, 2), beyond)) for x in (key, value))
        return dataclasses.replace(self, key=(*self.key, key), value=(*self.value, value))

    def insert(self, layer: int, key: Float[Array, "B T N H"], value: Float[Array, "B T N H"]) -> KVCache:
        """Write T new keys and values of one layer at each row's `length`, which moves once all layers have: see `GPT`.

        The caller sees to it that they fit: where they do not, they would overwrite older ones.
        """
        key, value = (_write_rows(old[layer], new, self.length) for old, new in ((self.key, key), (self.value, value)))
        return dataclasses.replace(self, key=_with(self.key, layer, key), value=_with(self.value, layer, value))

    def take(self, rows: Int[Array, " R"], groups: Int[Array, " G"] | None = None) -> KVCache:
        """Return the cache of these rows, in this order; a row may come several times. Groups change nothing here."""
        key, value = (_of_rows(layers, len(self.length), rows) for layers in (self.key, self.value))
        return dataclasses.replace(self, key=key, value=value, length=jnp.take(self.length, rows))


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
        key, value = (_of_rows(layers, len(self.length), rows) for layers in (self.key, self.value))
        past = dataclasses.replace(self, key=key, value=value, length=jnp.take(self.length, rows))
        if groups is None:
            return past
        key, value, mask = jax.tree.map(
            lambda x: jnp.take(x, groups, axis=0), (self.source_key, self.source_value, self.source_mask)
        )
        return dataclasses.replace(past, source_key=key, source_value=value, source_mask=mask)


def _with(layers: tuple[Array, ...], layer: int, new: Array) -> tuple[Array, ...]:
    return (*layers[:layer], new, *layers[layer + 1 :])


def _heads_joined(x: Float[Array, "B N S H"]) -> Float[Array, "BN S H"]:
    return x.reshape(-1, *x.shape[2:])


def _of_rows(layers: tuple[Array, ...], batch: int, rows: Int[Array, " R"]) -> tuple[Array, ...]:
    """Keys or values (B N, S, H) of every layer, of these rows of the batch: (R N, S, H)."""
    return tuple(_heads_joined(jnp.take(x.reshape(batch, -1, *x.shape[1:]), rows, axis=0)) for x in layers)


def _write_rows(
    old: Float[Array, "BN S H"], new: Float[Array, "B T N H"], start: Int[Array, " B"]
) -> Float[Array, "BN S H"]:
    new = new.swapaxes(1, 2).astype(old.dtype)
    zero = jnp.zeros((), start.dtype)  # all indices of one type, also where x64 is on
    if len(start) == 1:  # one row needs no scatter, which takes a fifth longer
        return jax.lax.dynamic_update_slice(old, new[0], (zero, start[0], zero))
    rows = old.reshape(*new.shape[:2], *old.shape[1:])
    write = jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice(row, part, (zero, at, zero)))
    return _heads_joined(write(rows, new, start))


def attend_to_cache(
    query: Float[Array, "B T N H"], cache: KVCache, layer: int, *, scale: Scale = None, window: int | None = None
) -> Float[Array, "B T N H"]:
    """Attention of the T newest tokens of each row, already in the cache at its `length`, to all up to themselves.

    Where the cache has fewer heads than the query, each of its heads serves as many of the query's, side by side.
    """
    batch, count, heads, width = query.shape
    key, value = cache.key[layer], cache.value[layer]
    shared = heads * batch // len(key)
    # Query heads that share keys are as many queries to them: Q = T x shared.
    queries = query.reshape(batch, count, -1, shared, width).transpose(0, 2, 4, 1, 3).reshape(len(key), width, -1)
    own = jnp.repeat(cache.length[:, None] + jnp.arange(count), shared, axis=1)[:, None, None]
    places = jnp.arange(cache.capacity)[:, None]
    mask = places <= own if window is None else (places <= own) & (places > own - window)
    weights = _weights_of_keys(key, queries, mask, scale).astype(value.dtype)
    attended = jnp.einsum("MSQ,MSH->MQH", weights, value).reshape(batch, -1, count, shared, width)
    return attended.transpose(0, 2, 1, 3, 4).reshape(query.shape)


def _weights_of_keys(
    key: Float[Array, "BN S H"], queries: Float[Array, "BN H Q"], mask: Bool[Array, "B 1 S Q"], scale: Scale
) -> Float[Array, "BN S Q"]:
    """`attention.attention_weights` with the keys in rows, as they lie in the cache: nothing is turned but queries."""
    dtype = jnp.promote_types(key.dtype, jnp.float32)
    scores = jnp.matmul(key, queries, preferred_element_type=dtype)
    scores = scores / math.sqrt(key.shape[-1]) if scale is None else scores * scale
    of_rows = scores.reshape(len(mask), -1, *scores.shape[1:])
    return jax.nn.softmax(jnp.where(mask, of_rows, jnp.finfo(dtype).min), axis=-2).reshape(scores.shape)


def attend_to_source(
    query: Float[Array, "R T N H"], cache: DecoderCache, layer: int, *, scale: Scale = None
) -> Float[Array, "R T N H"]:
    """Attention of T tokens of each row to the real positions of its source, whose rows lie side by side."""
    key, value, mask = cache.source_key[layer], cache.source_value[layer], cache.source_mask[:, None, None, :]

    def attended(queries: Float[Array, "G Q N H"]) -> Float[Array, "G Q N H"]:
        return jnp.einsum("BNTS,BNSH->BTNH", attention_weights(queries, key, mask, scale), value)

    # The rows of one source are as many queries to the same keys.
    together = query.reshape(len(key), -1, *query.shape[2:])
    if jax.default_backend() != "cpu" or together.shape[1] > FEW_QUERIES:
        return attended(together).reshape(query.shape)
    one_by_one = [attended(together[:, place : place + 1]) for place in range(together.shape[1])]
    return jnp.concatenate(one_by_one, axis=1).reshape(query.shape)
