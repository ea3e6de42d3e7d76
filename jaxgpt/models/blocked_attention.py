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

from jaxgpt.models.rows import greatest, row_sums

BLOCK = 128  # queries and keys at a time; measured on CPU: 256 is slower

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
    """softmax(scale Q K^T) V with all scores at once; for the gradients their exponentials are kept (B, N, T, S).

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
    scores = _scores(query, _turned(key), scale, segments, mask)
    powers = jnp.exp(scores - greatest(scores))
    total = row_sums(powers)
    weights = powers * _kept(powers, rate, keys, 0)
    heads = (jnp.matmul(weights.astype(value.dtype), value) / total).astype(value.dtype)
    return heads, (query, key, value, scale, keys, heads, powers, total)


def _whole_backward(rate: float, causal: bool, window: int | None, residuals: Any, gradient: Array) -> tuple[Any, ...]:
    query, key, value, scale, keys, heads, powers, total = residuals
    kept = _kept(powers, rate, keys, 0)
    of_heads = gradient / total
    inner = row_sums(of_heads * heads)
    of_heads = of_heads.astype(value.dtype)
    of_weights = jnp.matmul(of_heads, _turned(value), preferred_element_type=powers.dtype)
    of_scores = (powers * (of_weights * kept - inner)).astype(query.dtype)
    of_value = jnp.matmul(_turned((powers * kept).astype(value.dtype)), of_heads)
    factor = scale.astype(query.dtype)
    of_query, of_key = factor * jnp.matmul(of_scores, key), factor * jnp.matmul(_turned(of_scores), query)
    return of_query, of_key, of_value, None, None, None


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
    """Causal softmax(scale Q K^T) V by blocks of queries and keys, T a multiple of `BLOCK` (Dao et al. 2022).

    Queries and keys have the same segments.
    Scores exist of one pair of blocks at a time, also for the gradients, which compute them again: memory grows with
    T, not with its square, and what lies above the diagonal, or wholly before the `window`, is never computed.
    """
    return _blocked_forward(query, key, value, scale, segments, dropout_keys, dropout_rate, window)[0]


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
    queries, values, turned_keys = _in_blocks(query), _in_blocks(value), _turned(_in_blocks(key))
    numbers = _segments_in_blocks(segments)

    def of_queries(_: None, i: Array) -> tuple[None, Any]:
        own = queries[i]

        def with_keys(j: Array, sums: Any, diagonal: bool = False) -> Any:
            highest, total, heads = sums
            mask = _mask_of_pair(i, j, diagonal, window)
            scores = _scores(own, turned_keys[j], scale, _pair_of(numbers, i, j), mask)
            new = jnp.maximum(highest, greatest(scores))
            powers, shrunk = jnp.exp(scores - new), jnp.exp(highest - new)
            weights = (powers * _kept(powers, rate, keys, _place(i, j))).astype(value.dtype)
            heads = heads * shrunk + jnp.matmul(weights, values[j], preferred_element_type=dtype)
            return new, total * shrunk + row_sums(powers), heads

        column = (*own.shape[:-1], 1)
        start = (jnp.full(column, jnp.finfo(dtype).min), jnp.zeros(column, dtype), jnp.zeros(own.shape, dtype))
        sums = jax.lax.fori_loop(_first_block(i, window), i, with_keys, start)
        highest, total, heads = with_keys(i, sums, diagonal=True)
        return None, ((heads / total).astype(value.dtype), highest + jnp.log(total))

    _, (heads, log_totals) = jax.lax.scan(of_queries, None, jnp.arange(len(queries), dtype=jnp.int32))
    heads = _joined(heads)
    return heads, (query, key, value, scale, segments, keys, heads, log_totals)


def _blocked_backward(rate: float, window: int | None, residuals: Any, gradient: Array) -> tuple[Any, ...]:
    """All with keys in rows and queries in columns, so that every product's factors lie as they are read."""
    query, key, value, scale, segments, dropout_keys, heads, log_totals = residuals
    dtype = log_totals.dtype
    inner = _turned(_in_blocks(row_sums(gradient.astype(dtype) * heads.astype(dtype))))
    queries, keys, values, of_heads = (_in_blocks(x) for x in (query, key, value, gradient))
    turned_queries, turned_keys, turned_of_heads = (_turned(x) for x in (queries, keys, of_heads))
    log_totals, numbers = _turned(log_totals), _segments_in_blocks(segments)

    def of_queries(sums: Any, i: Array) -> tuple[Any, Array]:
        def with_keys(j: Array, sums: Any, diagonal: bool = False) -> Any:
            of_query, of_key, of_value = sums
            mask = _mask_of_pair(i, j, diagonal, window)
            mask = None if mask is None else _turned(mask)
            scores = _scores(keys[j], turned_queries[i], scale, _pair_of(numbers, j, i), mask)
            powers = jnp.exp(scores - log_totals[i])
            kept = _kept(powers, rate, dropout_keys, _place(i, j), turned=True)
            of_weights = jnp.matmul(values[j], turned_of_heads[i], preferred_element_type=dtype)
            of_scores = (powers * (of_weights * kept - inner[i])).astype(query.dtype)
            weights = (powers * kept).astype(value.dtype)
            of_query = of_query + jnp.matmul(turned_keys[j], of_scores, preferred_element_type=dtype)
            of_key = of_key.at[j].add(jnp.matmul(of_scores, queries[i], preferred_element_type=dtype))
            of_value = of_value.at[j].add(jnp.matmul(weights, of_heads[i], preferred_element_type=dtype))
            return of_query, of_key, of_value

        start = (jnp.zeros(turned_queries.shape[1:], dtype), *sums)
        sums = jax.lax.fori_loop(_first_block(i, window), i, with_keys, start)
        of_query, *rest = with_keys(i, sums, diagonal=True)
        return tuple(rest), (scale * of_query).astype(query.dtype)

    zeros = (jnp.zeros(keys.shape, dtype), jnp.zeros(values.shape, dtype))
    (of_key, of_value), of_query = jax.lax.scan(of_queries, zeros, jnp.arange(len(queries), dtype=jnp.int32))
    of_key, of_value = (scale * _joined(of_key)).astype(key.dtype), _joined(of_value).astype(value.dtype)
    return _joined(_turned(of_query)), of_key, of_value, None, None, None


blocked_attention.defvjp(_blocked_forward, _blocked_backward)


def _scores(
    rows: Array, columns: Array, scale: Array, segments: Segments, mask: Bool[Array, "1 1 T S"] | None
) -> Float[Array, "B N T S"]:
    """Products of (T, H) and (H, S), scaled; the lowest number where a query may not look."""
    dtype = jnp.promote_types(rows.dtype, jnp.float32)
    scores = jnp.matmul(rows, columns, preferred_element_type=dtype) * scale.astype(dtype)
    if segments is not None:
        same = segments[0][:, None, :, None] == segments[1][:, None, None, :]
        mask = same if mask is None else mask & same
    return scores if mask is None else jnp.where(mask, scores, jnp.finfo(dtype).min)


def _visible(queries: int, keys: int, ahead: Any, window: int | None) -> Bool[Array, "1 1 T S"]:
    """What causal queries see that stand `ahead` of the keys by so many places."""
    distance = ahead + jnp.arange(queries)[:, None] - jnp.arange(keys)
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return seen[None, None]


def _mask_of_pair(i: Array, j: Array, diagonal: bool, window: int | None) -> Bool[Array, "1 1 block block"] | None:
    """Of a block of queries and one of keys before it, of which all is seen if there is no window."""
    return _visible(BLOCK, BLOCK, (i - j) * BLOCK, window) if diagonal or window is not None else None


def _first_block(i: Array, window: int | None) -> Array | int:
    """The first block of keys of which block i of queries sees anything."""
    return 0 if window is None else jnp.maximum(0, i - (window + BLOCK - 2) // BLOCK)


def _kept(powers: Array, rate: float, keys: DropoutKeys, place: Any, *, turned: bool = False) -> Array | float:
    """What dropout multiplies weights by, 0 or 1 / (1 - rate): the same in the backward pass, be it turned."""
    if keys is None or rate == 0.0:
        return 1.0
    shape = (powers.shape[1], *powers.shape[:1:-1]) if turned else powers.shape[1:]
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, place)
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, shape))(keys)
    kept = jnp.where(keep, 1.0 / (1.0 - rate), 0.0).astype(powers.dtype)
    return _turned(kept) if turned else kept


def _place(i: Array, j: Array) -> Array:
    """A number of its own for each pair of blocks, j <= i."""
    return i * (i + 1) // 2 + j


def _in_blocks(x: Float[Array, "B N T H"]) -> Float[Array, "blocks B N block H"]:
    """Blocks first, so that each lies in one piece."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, BLOCK, x.shape[-1]), 2, 0)


def _joined(blocks: Float[Array, "blocks B N block H"]) -> Float[Array, "B N T H"]:
    return jnp.moveaxis(blocks, 0, 2).reshape(*blocks.shape[1:3], -1, blocks.shape[-1])


def _turned(x: Shaped[Array, "... R C"]) -> Shaped[Array, "... C R"]:
    return x.swapaxes(-1, -2)


def _segments_in_blocks(segments: Any) -> Any:
    if segments is None:
        return None
    return tuple(x.reshape(len(x), -1, BLOCK).swapaxes(0, 1) for x in segments)


def _pair_of(numbers: Any, rows: Array, columns: Array) -> Any:
    """The numbers of two blocks; queries and keys are numbered alike where attention is causal."""
    return None if numbers is None else (numbers[0][rows], numbers[0][columns])
