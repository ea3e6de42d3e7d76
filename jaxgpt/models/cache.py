"""The key-value cache, of a GPT and of a decoder. Dimension letters: see `attention.py`."""

from __future__ import annotations

import dataclasses
from typing import Any

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
    query: Float[Array, "B T N H"], cache: KVCache, layer: int, *, scale: Scale = None, window: int | None = None
) -> Float[Array, "B T N H"]:
    """Attention of the T newest tokens of each row, already in the cache at its `length`, to all up to themselves.

    Where the cache has fewer heads than the query, each of its heads serves as many of the query's, side by side.
    """
    batch, count, heads, width = query.shape
    shared = heads // cache.key[layer].shape[1]
    positions = cache.length[:, None] + jnp.arange(count)
    own = jnp.repeat(positions, shared, axis=1)[:, None, :, None]
    mask = jnp.arange(cache.capacity) <= own
    if window is not None:
        mask = mask & (jnp.arange(cache.capacity) > own - window)
    # Query heads that share keys are as many queries to them.
    together = query.reshape(batch, count, -1, shared, width).swapaxes(2, 3).reshape(batch, count * shared, -1, width)
    weights = attention_weights(together, cache.key[layer], mask, scale)
    attended = jnp.einsum("BNTS,BNSH->BTNH", weights, cache.value[layer])
    return attended.reshape(batch, count, shared, -1, width).swapaxes(2, 3).reshape(query.shape)


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
