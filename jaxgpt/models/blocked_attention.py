"""Attention with its gradients written out: of short sequences at once, of long ones block by block.

Dimension letters: see `attention.py`; queries, keys and values lie head by head. The derivative of softmax needs one
number a query, <dO, O>, and the exponentials of the scores (Dao et al. 2022, appendix B.2).

Both functions take `segments`, the numbers of queries and of keys: a query sees the keys that bear its number (None:
all); `scale`, a factor of the scores, to which no gradient flows; and for dropout of the weights a rate and a key for
each row of the batch (see `attention.dropout`). Scores and sums are computed in at least float32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from jaxgpt.models.rows import row_sums

BLOCK = 128  # queries at a time; measured on CPU: 256 is slower
SLAB = 1024  # keys at a time, at most: products so wide are twice as fast on CPU as those of 128

Segments = tuple[Int[Array, "B T"], Int[Array, "B S"]] | None
DropoutKeys = Key[Array, " B"] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def whole_attention(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B N S H"],
    value: Float[Array, "B N S H"],
    scale: Float[Array, ""],
    segments: Segments,
    dropout_keys: DropoutKeys,
    dropout_rate: float,
    causal: bool,
    window: int | None = None,
) -> Float[Array, "B N T H"]:
    """softmax(scale Q K^T) V with all scores at once; for the gradients their exponentials are kept (B, N, S, T).

    Where it is `causal`, query t sees keys 0..t, or the last `window` of them. One that sees nothing gets the mean
    of all values.
    """
    return _whole_forward(query, key, value, scale, segments, dropout_keys, dropout_rate, causal, window)[0]


def _whole_forward(
    query: Array,
    key: Array,
    value: Array,
    scale: Array,
    segments: Segments,
    keys: DropoutKeys,
    rate: float,
    causal: bool,
    window: int | None,
) -> tuple[Array, Any]:
    mask = _visible(query.shape[2], key.shape[2], 0, window) if causal else None
    scores = _scores(key, _turned(query), scale, segments, mask)
    powers = jnp.exp(scores - jnp.max(scores, -2, keepdims=True))
    total = jnp.sum(powers, -2, keepdims=True)
    weights = powers * _kept(powers, rate, keys, 0)
    heads = _turned(jnp.matmul(_turned(value), weights.astype(value.dtype)) / total).astype(value.dtype)
    return heads, (query, key, value, scale, keys, heads, powers, total)


def _whole_backward(rate: float, causal: bool, window: int | None, residuals: Any, gradient: Array) -> tuple[Any, ...]:
    query, key, value, scale, keys, heads, powers, total = residuals
    kept = _kept(powers, rate, keys, 0)
    of_heads = gradient / _turned(total)
    inner = _turned(row_sums(of_heads * heads))
    of_heads = of_heads.astype(value.dtype)
    of_weights = jnp.matmul(value, _turned(of_heads), preferred_element_type=powers.dtype)
    of_scores = (powers * (of_weights * kept - inner)).astype(query.dtype)
    of_value = jnp.matmul((powers * kept).astype(value.dtype), of_heads)
    factor = scale.astype(query.dtype)
    of_query = _turned(factor * jnp.matmul(_turned(key), of_scores))
    return of_query, factor * jnp.matmul(of_scores, query), of_value, None, None, None


whole_attention.defvjp(_whole_forward, _whole_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def blocked_attention(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B N T H"],
    value: Float[Array, "B N T H"],
    scale: Float[Array, ""],
    segments: Segments,
    dropout_keys: DropoutKeys,
    dropout_rate: float,
    window: int | None = None,
) -> Float[Array, "B N T H"]:
    """Causal softmax(scale Q K^T) V by blocks of queries and slabs of keys, T as `padded_length` gives it.

    Queries and keys have the same segments.
    Scores exist of one block of queries and one slab of keys at a time, also for the gradients, which compute them
    again (Dao et al. 2022): memory grows with T, not with its square, and what lies more than a block beyond the
    diagonal's, or in slabs wholly before the `window`, is never computed.
    """
    return _blocked_forward(query, key, value, scale, segments, dropout_keys, dropout_rate, window)[0]


def padded_length(length: int) -> int:
    """The least T of at least `length` that divides into equal slabs of whole blocks."""
    slabs = -(-length // SLAB)
    return slabs * BLOCK * -(-length // (slabs * BLOCK))


def _blocked_forward(
    query: Array,
    key: Array,
    value: Array,
    scale: Array,
    segments: Segments,
    keys: DropoutKeys,
    rate: float,
    window: int | None,
) -> tuple[Array, Any]:
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    queries, slabs_of_keys, values = _in_slabs(query), _in_slabs(key), _in_slabs(value)
    numbers, width = _segments_in_slabs(segments), queries.shape[-2]

    def of_slab(_: None, i: Array) -> tuple[None, Any]:
        def of_block(block: slice) -> tuple[Array, Array]:
            own = _turned(queries[i][:, :, block])

            def with_keys(j: Array, sums: Any, seen: slice = slice(0, width)) -> Any:
                highest, total, heads = sums
                mask = _mask_of_pair(i * width + block.start, j * width + seen.start, seen, j is i, window)
                pair = _pair_of(numbers, i, block, j, seen)
                scores = _scores(slabs_of_keys[j][:, :, seen], own, scale, pair, mask)
                new = jnp.maximum(highest, jnp.max(scores, -2, keepdims=True))
                powers, shrunk = jnp.exp(scores - new), jnp.exp(highest - new)
                weights = (powers * _kept(powers, rate, keys, _place(i, block, j))).astype(value.dtype)
                attended = jnp.matmul(_turned(values[j][:, :, seen]), weights, preferred_element_type=dtype)
                return new, total * shrunk + jnp.sum(powers, -2, keepdims=True), heads * shrunk + attended

            row = (*own.shape[:2], 1, own.shape[3])
            start = (jnp.full(row, jnp.finfo(dtype).min), jnp.zeros(row, dtype), jnp.zeros(own.shape, dtype))
            sums = jax.lax.fori_loop(_first_slab(i, block, width, window), i, with_keys, start)
            highest, total, heads = with_keys(i, sums, _seen_of_own_slab(block, width, window))
            return _turned(heads / total).astype(value.dtype), _turned(highest + jnp.log(total))

        return None, tuple(jnp.concatenate(parts, 2) for parts in zip(*map(of_block, _blocks(width)), strict=True))

    _, (heads, log_totals) = jax.lax.scan(of_slab, None, jnp.arange(len(queries), dtype=jnp.int32))
    return _joined(heads), (query, key, value, scale, segments, keys, _joined(heads), log_totals)


def _blocked_backward(rate: float, window: int | None, residuals: Any, gradient: Array) -> tuple[Any, ...]:
    query, key, value, scale, segments, dropout_keys, heads, log_totals = residuals
    dtype = log_totals.dtype
    inner = _in_slabs(row_sums(gradient.astype(dtype) * heads.astype(dtype)))
    queries, keys, values, of_heads = (_in_slabs(x) for x in (query, key, value, gradient))
    numbers, width = _segments_in_slabs(segments), queries.shape[-2]

    def of_slab(sums: Any, i: Array) -> tuple[Any, Array]:
        def of_block(sums: Any, block: slice) -> Any:
            own, of_own = queries[i][:, :, block], of_heads[i][:, :, block]
            log_total, own_inner = (_turned(x[i][:, :, block]) for x in (log_totals, inner))

            def with_keys(j: Array, sums: Any, seen: slice = slice(0, width)) -> Any:
                of_query, of_key, of_value = sums
                mask = _mask_of_pair(i * width + block.start, j * width + seen.start, seen, j is i, window)
                key, pair = keys[j][:, :, seen], _pair_of(numbers, i, block, j, seen)
                powers = jnp.exp(_scores(key, _turned(own), scale, pair, mask) - log_total)
                kept = _kept(powers, rate, dropout_keys, _place(i, block, j))
                of_weights = jnp.matmul(values[j][:, :, seen], _turned(of_own), preferred_element_type=dtype)
                of_scores = (powers * (of_weights * kept - own_inner)).astype(query.dtype)
                weights = (powers * kept).astype(value.dtype)
                of_query = of_query + jnp.matmul(_turned(key), of_scores, preferred_element_type=dtype)
                of_key = of_key.at[j, :, :, seen].add(jnp.matmul(of_scores, own, preferred_element_type=dtype))
                of_value = of_value.at[j, :, :, seen].add(jnp.matmul(weights, of_own, preferred_element_type=dtype))
                return of_query, of_key, of_value

            start = (jnp.zeros((*own.shape[:2], *own.shape[:1:-1]), dtype), *sums)
            sums = jax.lax.fori_loop(_first_slab(i, block, width, window), i, with_keys, start)
            return with_keys(i, sums, _seen_of_own_slab(block, width, window))

        of_queries = []
        for block in _blocks(width):
            of_query, *sums = of_block(sums, block)
            of_queries.append(_turned(scale * of_query).astype(query.dtype))
        return tuple(sums), jnp.concatenate(of_queries, 2)

    zeros = (jnp.zeros(keys.shape, dtype), jnp.zeros(values.shape, dtype))
    (of_key, of_value), of_query = jax.lax.scan(of_slab, zeros, jnp.arange(len(queries), dtype=jnp.int32))
    of_key, of_value = (scale * _joined(of_key)).astype(key.dtype), _joined(of_value).astype(value.dtype)
    return _joined(of_query), of_key, of_value, None, None, None


blocked_attention.defvjp(_blocked_forward, _blocked_backward)


def _scores(
    keys: Array, queries: Array, scale: Array, segments: Segments, mask: Bool[Array, "S T"] | None
) -> Float[Array, "B N S T"]:
    """Products of keys (S, H) and queries (H, T), scaled; the lowest number where a query may not look."""
    dtype = jnp.promote_types(keys.dtype, jnp.float32)
    scores = jnp.matmul(keys, queries, preferred_element_type=dtype) * scale.astype(dtype)
    if segments is not None:
        same = segments[0][:, None, None, :] == segments[1][:, None, :, None]
        mask = same if mask is None else mask & same
    return scores if mask is None else jnp.where(mask, scores, jnp.finfo(dtype).min)


def _visible(queries: int, keys: int, ahead: Any, window: int | None) -> Bool[Array, "S T"]:
    """The keys that causal queries see, the first query standing so many places `ahead` of the first key."""
    distance = ahead + jnp.arange(queries) - jnp.arange(keys)[:, None]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _blocks(width: int) -> list[slice]:
    """The blocks of queries in a slab."""
    return [slice(start, start + BLOCK) for start in range(0, width, BLOCK)]


def _seen_of_own_slab(block: slice, width: int, window: int | None) -> slice:
    """The keys of a block's own slab that it sees any of, and as many more as leave few different lengths to copy."""
    start = 0 if window is None else max(0, block.start - window + 1) // BLOCK * BLOCK
    return slice(start, min(width, -(-block.stop // (2 * BLOCK)) * 2 * BLOCK))


def _first_slab(i: Array, block: slice, width: int, window: int | None) -> Array | int:
    """The first slab of keys of which a block of slab i of queries sees anything."""
    return 0 if window is None else jnp.maximum(0, (i * width + block.start - window + 1) // width)


def _mask_of_pair(query: Array, key: Array, seen: slice, own: bool, window: int | None) -> Any:
    """Of a block of queries and the keys `seen` of one slab, which begin at these places; None: all of them."""
    ahead = query - key
    return _visible(BLOCK, seen.stop - seen.start, ahead, window) if own or window is not None else None


def _kept(powers: Array, rate: float, keys: DropoutKeys, place: Any) -> Array | float:
    """What dropout multiplies weights by, 0 or 1 / (1 - rate): the same in the backward pass."""
    if keys is None or rate == 0.0:
        return 1.0
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, place)
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, powers.shape[1:]))(keys)
    return jnp.where(keep, 1.0 / (1.0 - rate), 0.0).astype(powers.dtype)


def _place(i: Array, block: slice, j: Array) -> Array:
    """A number of its own for each pair of a block of queries and a slab of keys, j <= i."""
    return (i * (i + 1) // 2 + j) * (SLAB // BLOCK) + block.start // BLOCK


def _in_slabs(x: Float[Array, "B N T H"]) -> Float[Array, "slabs B N width H"]:
    """Slabs first, so that each lies in one piece."""
    slabs = -(-x.shape[2] // SLAB)
    return jnp.moveaxis(x.reshape(*x.shape[:2], slabs, -1, x.shape[-1]), 2, 0)


def _joined(slabs: Float[Array, "slabs B N width H"]) -> Float[Array, "B N T H"]:
    return jnp.moveaxis(slabs, 0, 2).reshape(*slabs.shape[1:3], -1, slabs.shape[-1])


def _turned(x: Shaped[Array, "... R C"]) -> Shaped[Array, "... C R"]:
    return x.swapaxes(-1, -2)


def _segments_in_slabs(segments: Segments) -> Int[Array, "slabs B width"] | None:
    """Of queries and keys alike: where attention is causal, they have the same."""
    if segments is None:
        return None
    numbers = segments[0]
    return numbers.reshape(len(numbers), -(-numbers.shape[1] // SLAB), -1).swapaxes(0, 1)


def _pair_of(numbers: Any, i: Array, block: slice, j: Array, seen: slice) -> Segments:
    """The segments of a block of queries and of the keys `seen` of one slab."""
    return None if numbers is None else (numbers[i][:, block], numbers[j][:, seen])
