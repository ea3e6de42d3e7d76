"""Matrices in fewer bits: int8 with a scale for each output, or bfloat16. What is computed from them is not.

A token's work at batch 1 is to read every matrix once, so a quarter of the bytes is up to four times the speed. A
matrix lies (out, in), its rows filled up with zeros to a multiple of LANES: `compact` (O, J), int8 or, for bfloat16,
its bits as uint16 (XLA on CPU would first make float32 of a bfloat16 array), with `scales` (O,) for int8.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt16

from jaxgpt.config import Weights

Compact = Int[Array, "O J"] | UInt16[Array, "O J"]

LANES = 32  # numbers that are multiplied at once; of 16, 32 and 64 the fastest (measured on CPU)
CHAINS = 4  # sums side by side, so that one addition need not wait for another
FEW_ROWS = 16  # up to so many the product upcasts a matrix for each anew; beyond, once into memory


def compact(matrix: Float[Array, "O I"], weights: Weights) -> dict[str, Array]:
    """The matrix in fewer bits: each weight is rounded to the nearest that there is.

    int8 has 127 steps on each side of 0; the largest weight of a row is the last of them (Dettmers et al. 2022,
    section 2, row by row).
    """
    padded = jnp.pad(matrix.astype(jnp.float32), ((0, 0), (0, -matrix.shape[1] % LANES)))
    if weights == "bfloat16":
        return {"compact": jax.lax.bitcast_convert_type(padded.astype(jnp.bfloat16), jnp.uint16)}
    scales = jnp.max(jnp.abs(padded), axis=1) / 127.0
    steps = jnp.round(padded / jnp.where(scales == 0.0, 1.0, scales)[:, None])
    # A weight that is no number would become one: its row's scale says so.
    return {"compact": jnp.nan_to_num(steps).astype(jnp.int8), "scales": scales}


def upcast(compact: Int[Array, ...] | UInt16[Array, ...]) -> Float[Array, ...]:
    """What `compact` holds in float32, without its scales."""
    if compact.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(compact.astype(jnp.uint32) << 16, jnp.float32)
    return compact.astype(jnp.float32)


def take_rows(
    tokens: Int[Array, "B T"], width: int, compact: Compact, scales: Float[Array, " O"] | None = None
) -> Float[Array, "B T D"]:
    """The rows of these numbers as float32; a number outside has NaN."""
    rows = upcast(jnp.take(compact, tokens, axis=0, mode="fill")[..., :width])
    return rows if scales is None else rows * jnp.take(scales, tokens, axis=0, mode="fill")[..., None]


def compact_product(
    x: Float[Array, "M I"], compact: Compact, scales: Float[Array, " O"] | None = None
) -> Float[Array, "M O"]:
    """x W^T in at least float32."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    x = jnp.pad(x.astype(dtype), ((0, 0), (0, compact.shape[1] - x.shape[1])))
    if len(x) > FEW_ROWS or jax.default_backend() != "cpu":
        y = x @ upcast(compact).astype(dtype).T
    else:
        y = _few_rows(x, compact)
    return y if scales is None else y * scales.astype(dtype)


def _few_rows(x: Float[Array, "M J"], compact: Compact) -> Float[Array, "M O"]:
    """The product without a product: XLA on CPU writes what a product reads to memory first, upcast.

    Each row of W as J / LANES pieces, multiplied and added element by element: one loop that reads, upcasts and adds
    LANES at a time (a sum along the row would be added up one number after another).
    """
    rows, width = compact.shape
    pieces = compact.reshape(rows, 1, width // LANES, LANES)
    others = x.reshape(1, len(x), width // LANES, LANES)
    terms = [upcast(pieces[:, :, k]).astype(x.dtype) * others[:, :, k] for k in range(width // LANES)]
    chains = [functools.reduce(operator.add, terms[first::CHAINS]) for first in range(min(CHAINS, len(terms)))]
    partial = jax.lax.optimization_barrier(functools.reduce(operator.add, chains))
    if len(x) == 1:
        return jnp.sum(partial, axis=-1).T
    ones = jnp.ones((LANES, 1), x.dtype)  # many rows are added up faster by a product
    return jnp.matmul(partial.reshape(-1, LANES), ones, precision="highest").reshape(rows, len(x)).T
