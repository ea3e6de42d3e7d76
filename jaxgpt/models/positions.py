"""What a token is, and where it stands: a table; sinusoids, a table, or a rotation. Letters: `attention.py`."""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.config import Dtype
from jaxgpt.models.compact import take_rows
from jaxgpt.models.sharding import constrain


def initializer(std: float | None) -> nn.initializers.Initializer:
    """Normal with this standard deviation; None: uniform, by the sides of the matrix (Glorot and Bengio 2010)."""
    return nn.initializers.glorot_uniform() if std is None else nn.initializers.normal(std)


def sinusoidal_positions(length: int, width: int) -> Float[Array, "T D"]:
    """Sinusoidal positional encoding (Vaswani et al. 2017, section 3.5).

    Row t holds sin(t / 10000^(2i/D)) in column 2i and the cosine of the same angle in column 2i + 1. `width` is even.
    """
    if width % 2:
        raise ValueError(f"sinusoidal positions need an even width, not {width}")
    frequency = jnp.exp(jnp.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angle = jnp.arange(length)[:, None] * frequency
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(length, width)


class TokenEmbedding(nn.Module):
    """Gives each token its vector: a row of a table (V, D), or of a compact one. An id outside [0, V) has NaN."""

    size: int
    width: int
    initial: nn.initializers.Initializer
    parameter_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        if self.has_variable("params", "compact"):
            matrix: Array = self.get_variable("params", "compact")
            scales: Array | None = self.get_variable("params", "scales")
            return take_rows(tokens, self.width, matrix, scales)
        table = self.param("embedding", self.initial, (self.size, self.width), self.parameter_dtype)
        return jnp.take(constrain(table, "vocabulary", "width"), tokens, axis=0)


class PositionalEncoding(nn.Module):
    """Gives each position its vector (D): a trained table of `context` rows, or the fixed sinusoids.

    Learned positions are GPT's (Radford et al. 2018); Vaswani et al. 2017 found both equally good.
    """

    context: int
    width: int
    learned: bool = True
    init_std: float | None = 0.02
    parameter_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, positions: Int[Array, "*#B T"]) -> Float[Array, "*#B T D"]:
        if self.learned:
            table = self.param(
                "embedding", initializer(self.init_std), (self.context, self.width), self.parameter_dtype
            )
        else:
            table = sinusoidal_positions(self.context, self.width).astype(self.parameter_dtype)
        return jnp.take(constrain(table, "length", "width"), positions, axis=0)


def rotary(x: Float[Array, "B T N H"], positions: Int[Array, "#B T"]) -> Float[Array, "B T N H"]:
    """Rotate the pairs (x_i, x_(i + H/2)) of each head by position x 10000^(-2i/H) (Su et al. 2021, section 3.2.2).

    The product of a query and a key so rotated depends on how far apart they stand only.
    """
    half = x.shape[-1] // 2
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    frequency = jnp.exp(jnp.arange(half, dtype=dtype) * (-math.log(10_000.0) / half))
    angle = positions[:, :, None, None].astype(dtype) * frequency
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    first, second = x[..., :half], x[..., half:]
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)
