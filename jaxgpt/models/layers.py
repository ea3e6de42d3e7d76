"""The layers that every model here is built from. Dimension letters: see `attention.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgpt.config import ActivationName, AttentionName, Dtype
from jaxgpt.models.attention import (
    DecoderCache,
    KVCache,
    Scale,
    attend_to_cache,
    attention_weights,
    dropout,
    masked_self_attention,
    self_attention,
)


def sinusoidal_positions(length: int, width: int) -> Float[Array, "T D"]:
    """Sinusoidal positional encoding (Vaswani et al. 2017, section 3.5).

    Row t holds sin(t / 10000^(2i/D)) in column 2i and the cosine of the same angle in column 2i + 1. `width` is even.
    """
    if width % 2:
        raise ValueError(f"sinusoidal positions need an even width, not {width}")
    frequency = jnp.exp(jnp.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angle = jnp.arange(length)[:, None] * frequency
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(length, width)


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
        return jnp.take(table, positions, axis=0)


def initializer(std: float | None) -> nn.initializers.Initializer:
    """Normal with this standard deviation; None: uniform, by the sides of the matrix (Glorot and Bengio 2010)."""
    return nn.initializers.glorot_uniform() if std is None else nn.initializers.normal(std)


class Dense(nn.Module):
    """y = x W + b on the last axis, W (in, out) as in GPT-2's Conv1D.

    All leading axes are flattened to one first: the gradient of a three-dimensional product makes XLA transpose and
    recompute its neighbours on CPU (a fifth of a small model's step). Where the parameters hold `transposed` (out, in)
    instead of `kernel`, that is used (see `models.blocks.decoding_parameters`).
    """

    features: int
    bias: bool = True
    init_std: float | None = 0.02
    parameter_dtype: Dtype = "float32"
    compute_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        flat = x.reshape(-1, x.shape[-1]).astype(self.compute_dtype)
        if self.has_variable("params", "transposed"):
            y = (self.get_variable("params", "transposed").astype(self.compute_dtype) @ flat.T).T
        else:
            kernel = self.param(
                "kernel", initializer(self.init_std), (x.shape[-1], self.features), self.parameter_dtype
            )
            y = flat @ kernel.astype(self.compute_dtype)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), self.parameter_dtype).astype(y.dtype)
        return y.reshape(*x.shape[:-1], self.features)


def activation(name: ActivationName) -> Callable[[Float[Array, ...]], Float[Array, ...]]:
    """The non-linearity of the feed-forward layer; GPT-2's is `gelu_new`, GELU in its tanh form."""
    functions: dict[str, Callable[[Array], Array]] = {
        "gelu_new": partial(jax.nn.gelu, approximate=True),
        "gelu": partial(jax.nn.gelu, approximate=False),
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
        "tanh": jnp.tanh,
    }
    return functions[name]


class MLP(nn.Module):
    """Position-wise feed-forward network (Vaswani et al. 2017, section 3.3)."""

    hidden: int
    activation: ActivationName = "gelu_new"
    bias: bool = True
    init_std: float | None = 0.02
    output_std: float | None = 0.02
    parameter_dtype: Dtype = "float32"
    compute_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        dense = partial(Dense, parameter_dtype=self.parameter_dtype, compute_dtype=self.compute_dtype)
        hidden = dense(self.hidden, self.bias, self.init_std, name="up")(x)
        return dense(x.shape[-1], self.bias, self.output_std, name="down")(activation(self.activation)(hidden))


class MultiHeadAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2) of a sequence to itself.

    One product makes queries, keys and values of all heads, (D, 3 D) in the order of GPT-2's `c_attn`; each head
    attends in its own D / N dimensions; a last product mixes the heads. The width must divide by `heads`.

    Called with x (B, T, D): causal attention within x; not causal where a `mask` says which of its positions are real.
    Called with a cache too: x continues what the cache holds of `layer`, and the cache with x's own keys and values
    added comes back. `scale` multiplies the scores (default: 1 / sqrt(H)).
    """

    heads: int
    bias: bool = True
    init_std: float | None = 0.02
    output_std: float | None = 0.02
    dropout: float = 0.0
    implementation: AttentionName = "auto"
    parameter_dtype: Dtype = "float32"
    compute_dtype: Dtype = "float32"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: KVCache | None = None,
        layer: int | Int[Array, ""] = 0,
        dropout_keys: Key[Array, " B"] | None = None,
        scale: Scale = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        batch, length, width = x.shape
        dense = partial(Dense, parameter_dtype=self.parameter_dtype, compute_dtype=self.compute_dtype)
        qkv = dense(3 * width, self.bias, self.init_std, name="qkv")(x)
        query, key, value = (split_heads(part, self.heads) for part in jnp.split(qkv, 3, axis=-1))
        if mask is not None:
            heads = self_attention(
                query, key, value, mask=mask[:, None, None, :], scale=scale, dropout_rate=self.dropout,
                dropout_keys=dropout_keys,
            )  # fmt: skip
        elif cache is not None and isinstance(layer, int) and cache.has(layer):
            cache = cache.insert(layer, key, value)
            heads = attend_to_cache(query, cache, layer, scale=scale)
        else:
            cache = cache and cache.start(key, value)
            heads = masked_self_attention(
                query, key, value, implementation=self.implementation, scale=scale, dropout_rate=self.dropout,
                dropout_keys=dropout_keys,
            )  # fmt: skip
        y = dense(width, self.bias, self.output_std, name="out")(heads.reshape(batch, length, width))
        return y, cache


def split_heads(x: Float[Array, "B T D"], heads: int) -> Float[Array, "B T N H"]:
    """Give each head its own part of the width.

    Raises:
        ValueError: the heads do not divide it.
    """
    if x.shape[-1] % heads:
        raise ValueError(f"{heads} heads do not divide the width {x.shape[-1]}")
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


class CrossAttention(nn.Module):
    """Multi-head attention of a decoder to the encoder's output (Vaswani et al. 2017, section 3.2.3).

    One product makes the queries (D, D), one the keys and values of the source (D, 2 D).

    Called with x (B, T, D) and the source (B, S, D), of which `mask` says what is real (None: all). Called with a cache
    that has the source's keys and values of `layer`, the source itself is not looked at; without them they are added.
    The weights (B, N, T, S) are sown as "weights" among the intermediates, for whoever asks for them.
    """

    heads: int
    bias: bool = True
    init_std: float | None = 0.02
    output_std: float | None = 0.02
    dropout: float = 0.0
    parameter_dtype: Dtype = "float32"
    compute_dtype: Dtype = "float32"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        source: Float[Array, "G S D"] | None,
        mask: Bool[Array, "G S"] | None,
        cache: DecoderCache | None = None,
        layer: int | Int[Array, ""] = 0,
        dropout_keys: Key[Array, " B"] | None = None,
        scale: Scale = None,
    ) -> tuple[Float[Array, "B T D"], DecoderCache | None]:
        width = x.shape[-1]
        dense = partial(Dense, parameter_dtype=self.parameter_dtype, compute_dtype=self.compute_dtype)
        query = split_heads(dense(width, self.bias, self.init_std, name="query")(x), self.heads)
        if cache is not None and isinstance(layer, int) and cache.has_source(layer):
            key, value = cache.source_key[layer], cache.source_value[layer]
        elif source is None:
            raise ValueError("there is neither a source to attend to nor a cache of its keys and values")
        else:
            pair = dense(2 * width, self.bias, self.init_std, name="key_value")(source)
            key, value = (split_heads(part, self.heads).swapaxes(1, 2) for part in jnp.split(pair, 2, axis=-1))
            cache = cache and cache.start_source(key, value)
        # The rows of one source side by side are as many queries to the same keys.
        together = query.reshape(len(key), -1, *query.shape[2:])
        weights = attention_weights(together, key, None if mask is None else mask[:, None, None, :], scale)
        self.sow("intermediates", "weights", weights)
        weights = dropout(weights, self.dropout, dropout_keys)
        heads = jnp.einsum("BNTS,BNSH->BTNH", weights, value)
        return dense(width, self.bias, self.output_std, name="out")(heads.reshape(x.shape)), cache
