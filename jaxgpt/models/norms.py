"""Normalisation of the residual stream, with its gradients written out. Dimension letters: see `attention.py`."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgpt.config import Dtype
from jaxgpt.models.rows import row_sums, sum_of_rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalized(
    x: Float[Array, "... D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"] | None,
    epsilon: float,
    centred: bool = True,
) -> Float[Array, "... D"]:
    """Layer normalisation of each row (Ba et al. 2016): (x - mean) / sqrt(variance + epsilon) * scale + bias.

    Not `centred`, the mean is taken to be 0: that is root mean square normalisation (Zhang and Sennrich 2019).

    Mean and variance in at least float32, the variance by two passes, which is what PyTorch computes. The gradients
    are written out: two passes over the rows, and those of `scale` and `bias` as products (see `layers.add_bias`).
    """
    return _normalized(x, scale, bias, epsilon, centred)[0]


def _normalized(
    x: Array, scale: Array, bias: Array | None, epsilon: float, centred: bool
) -> tuple[Array, tuple[Array, Array]]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = _means(wide) if centred else jnp.zeros((*x.shape[:-1], 1), wide.dtype)
    apart = wide - mean
    inverse = jax.lax.rsqrt(_means(apart * apart) + epsilon)
    y = apart * inverse * scale
    return (y if bias is None else y + bias).astype(x.dtype), (mean, inverse)


def _normalized_forward(x: Array, scale: Array, bias: Array | None, epsilon: float, centred: bool) -> tuple[Array, Any]:
    y, moments = _normalized(x, scale, bias, epsilon, centred)
    return y, (x, scale, bias, moments)


def _normalized_backward(
    epsilon: float, centred: bool, kept: Any, gradient: Array
) -> tuple[Array, Array, Array | None]:
    x, scale, bias, (mean, inverse) = kept
    wide = gradient.astype(mean.dtype)
    standard = (x - mean) * inverse
    scaled = wide * scale
    of_x = scaled - standard * _means(scaled * standard) - (_means(scaled) if centred else 0.0)
    of_scale = sum_of_rows(wide * standard).astype(scale.dtype)
    of_bias = None if bias is None else sum_of_rows(wide).astype(bias.dtype)
    return (inverse * of_x).astype(x.dtype), of_scale, of_bias


def _means(x: Float[Array, "... D"]) -> Float[Array, "... 1"]:
    return row_sums(x) / x.shape[-1]


normalized.defvjp(_normalized_forward, _normalized_backward)


class Norm(nn.Module):
    """Normalisation of the last axis, as a module: `scale` starts at 1, `bias` at 0 (see `normalized`)."""

    epsilon: float
    bias: bool = True
    centred: bool = True
    parameter_dtype: Dtype = "float32"
    compute_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        width = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (width,), self.parameter_dtype)
        bias = self.param("bias", nn.initializers.zeros, (width,), self.parameter_dtype) if self.bias else None
        return normalized(x.astype(self.compute_dtype), scale, bias, self.epsilon, self.centred)


def unit_mean_square(x: Float[Array, "... H"], epsilon: float = 1e-6) -> Float[Array, "... H"]:
    """x / sqrt(mean of x^2 + epsilon) along the last axis, without parameters."""
    ones = jnp.ones(x.shape[-1], jnp.promote_types(x.dtype, jnp.float32))
    return normalized(x, ones, None, epsilon, False)
