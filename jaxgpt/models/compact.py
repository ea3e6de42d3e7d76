"""Matrices in fewer bits: int8 with a scale for each output, or bfloat16. What is computed from them is not.

A token's work at batch 1 is to read every matrix once, so a quarter of the bytes is up to four times the speed. A
matrix lies (out, in), its rows filled up with zeros to whole strips of STRIP columns and cut into P parts of as many
strips each, one part behind the other: `compact` (P, O, J), int8 or, for bfloat16, its bits as uint16 (XLA on CPU would
first make float32 of a bfloat16 array), with `scales` (O,) for int8. So a row is read in P places at once, and the
processor fetches ahead in each of them: a matrix that is in no cache takes half the time that it takes in one part.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped, UInt16

from jaxgpt.config import Weights

Compact = Int[Array, "P O J"] | UInt16[Array, "P O J"]

STRIP = 64  # a line of the processor's cache in int8
PARTS = 16  # at most: processors follow about twice as many (measured on CPU)
LANES = 32  # numbers that are multiplied at once; of 16, 32 and 64 the fastest (measured on CPU)
CHAINS = 4  # sums side by side, so that one addition need not wait for another
FEW_ROWS = 16  # up to so many the product upcasts a matrix for each anew; beyond, once into memory


def compact(matrix: Float[Array, "O I"], weights: Weights) -> dict[str, Array]:
    """The matrix in fewer bits: each weight is rounded to the nearest that there is.

    int8 has 127 steps on each side of 0; the largest weight of a row is the last of them (Dettmers et al. 2022,
    section 2, row by row).
    """
    padded = jnp.pad(matrix.astype(jnp.float32), ((0, 0), (0, -matrix.shape[1] % STRIP)))
    if weights == "bfloat16":
        return {"compact": _in_parts(jax.lax.bitcast_convert_type(padded.astype(jnp.bfloat16), jnp.uint16))}
    scales = jnp.max(jnp.abs(padded), axis=1) / 127.0
    steps = jnp.round(padded / jnp.where(scales == 0.0, 1.0, scales)[:, None])
    # A weight that is no number would become one: its row's scale says so.
    return {"compact": _in_parts(jnp.nan_to_num(steps).astype(jnp.int8)), "scales": scales}


def _in_parts(matrix: Shaped[Array, "O I"]) -> Shaped[Array, "P O J"]:
    rows, width = matrix.shape
    parts = next(n for n in range(PARTS, 0, -1) if width // STRIP % n == 0)
    return matrix.reshape(rows, parts, -1).swapaxes(0, 1)


def _in_rows(parts: Shaped[Array, "P ... J"]) -> Shaped[Array, "... I"]:
    return jnp.moveaxis(parts, 0, -2).reshape(*parts.shape[1:-1], -1)


def upcast(compact: Int[Array, ...] | UInt16[Array, ...]) -> Float[Array, ...]:
    """What `compact` holds in float32, without its scales."""
    if compact.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(compact.astype(jnp.uint32) << 16, jnp.float32)
    return compact.astype(jnp.float32)


def take_rows(
    tokens: Int[Array, "B T"], width: int, compact: Compact, scales: Float[Array, " O"] | None = None
) -> Float[Array, "B T D"]:
    """The rows of these numbers as float32; a number outside has NaN."""
    rows = upcast(_in_rows(jnp.take(compact, tokens, axis=1, mode="fill"))[..., :width])
    return rows if scales is None else rows * jnp.take(scales, tokens, axis=0, mode="fill")[..., None]


def compact_product(
    x: Float[Array, "M I"], compact: Compact, scales: Float[Array, " O"] | None = None
) -> Float[Array, "M O"]:
    """x W^T in at least float32."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    x = jnp.pad(x.astype(dtype), ((0, 0), (0, -x.shape[1] % STRIP)))
    if len(x) > FEW_ROWS or jax.default_backend() != "cpu":
        y = x @ _in_rows(upcast(compact)).astype(dtype).T
    else:
        y = _few_rows(x, compact)
    return y if scales is None else y * scales.astype(dtype)


def _few_rows(x: Float[Array, "M I"], compact: Compact) -> Float[Array, "M O"]:
    """The product without a product: XLA on CPU writes what a product reads to memory first, upcast.

    Each row of W as pieces of LANES, multiplied and added element by element: one loop that reads, upcasts and adds
    LANES at a time (a sum along the row would be added up one number after another).
    """
    parts, rows, width = compact.shape
    pieces = compact.reshape(parts, rows, 1, width // LANES, LANES)
    others = x.reshape(1, len(x), parts, width // LANES, LANES)
    places = [(part, piece) for piece in range(width // LANES) for part in range(parts)]
    terms = [upcast(pieces[p, :, :, k]).astype(x.dtype) * others[:, :, p, k] for p, k in places]
    chains = [functools.reduce(operator.add, terms[first::CHAINS]) for first in range(min(CHAINS, len(terms)))]
    partial = jax.lax.optimization_barrier(functools.reduce(operator.add, chains))
    if len(x) == 1:
        return jnp.sum(partial, axis=-1).T
    ones = jnp.ones((LANES, 1), x.dtype)  # many rows are added up faster by a product
    return jnp.matmul(partial.reshape(-1, LANES), ones, precision="highest").reshape(rows, len(x)).T
