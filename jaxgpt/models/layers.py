"""The layers that every model here is built from. Dimension letters: see `attention.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgpt.config import ActivationName, AttentionName, Dtype
from jaxgpt.models.attention import Scale, attention, attention_weights, dropout
from jaxgpt.models.cache import DecoderCache, KVCache, attend_to_cache, attend_to_source
from jaxgpt.models.compact import compact_product
from jaxgpt.models.norms import unit_mean_square
from jaxgpt.models.positions import initializer, rotary
from jaxgpt.models.rows import sum_of_rows


@jax.custom_vjp
def add_bias(x: Float[Array, "M O"], bias: Float[Array, " O"]) -> Float[Array, "M O"]:
    """x + b for each row. The gradient of b is a product, 1^T G, not the sum that it stands for.

    XLA on CPU fuses a sum with whatever makes G, which is then computed once more: with the gradient of the residual
    stream, that is every layer behind (a tenth to two thirds of a small model's step, the more the more rows).
    """
    return x + bias.astype(x.dtype)


def _add_bias_forward(x: Array, bias: Array) -> tuple[Array, Array]:
    return add_bias(x, bias), bias


def _add_bias_backward(bias: Array, gradient: Array) -> tuple[Array, Array]:
    return gradient, sum_of_rows(gradient).astype(bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


class Dense(nn.Module):
    """y = x W + b on the last axis, W (in, out) as in GPT-2's Conv1D.

    All leading axes are flattened to one first: the gradient of a three-dimensional product makes XLA transpose and
    recompute its neighbours on CPU (a fifth of a small model's step). Where the parameters hold `compact` instead of
    `kernel`, that is used (see `models.compact`); where they hold `lora_a` (in, r) and `lora_b` (r, out), x A B is
    added (Hu et al. 2021; see `models.lora`).
    """

    features: int
    bias: bool = True
    init_std: float | None = 0.02
    parameter_dtype: Dtype = "float32"
    compute_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        flat = x.reshape(-1, x.shape[-1]).astype(self.compute_dtype)
        if self.has_variable("params", "compact"):
            matrix: Array = self.get_variable("params", "compact")
            scales: Array | None = self.get_variable("params", "scales")
            y = compact_product(flat, matrix, scales).astype(self.compute_dtype)
        else:
            kernel = self.param(
                "kernel", initializer(self.init_std), (x.shape[-1], self.features), self.parameter_dtype
            )
            y = flat @ kernel.astype(self.compute_dtype)
        if self.has_variable("params", "lora_a"):
            a: Array = self.get_variable("params", "lora_a")
            b: Array = self.get_variable("params", "lora_b")
            y = y + flat @ a.astype(self.compute_dtype) @ b.astype(self.compute_dtype)
        if self.bias:
            y = add_bias(y, self.param("bias", nn.initializers.zeros, (self.features,), self.parameter_dtype))
        return y.reshape(*x.shape[:-1], self.features)


def activation(name: ActivationName) -> Callable[[Float[Array, ...]], Float[Array, ...]]:
    """The non-linearity of the feed-forward layer; GPT-2's is `gelu_new`, GELU in its tanh form."""
    functions: dict[str, Callable[[Array], Array]] = {
        "gelu_new": partial(jax.nn.gelu, approximate=True),
        "gelu": partial(jax.nn.gelu, approximate=False),
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
        "tanh": jnp.tanh,
        "relu-squared": lambda x: jnp.square(jax.nn.relu(x)),
        "swiglu": _swiglu,
    }
    return functions[name]


def _swiglu(x: Float[Array, "... G"]) -> Float[Array, "... F"]:
    """SiLU of the first half times the second, G = 2 F (Shazeer 2020)."""
    gate, value = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * value


def features_before(name: ActivationName, hidden: int) -> int:
    """What the first matrix of the feed-forward layer makes, so that its activation gives `hidden`: gates are twice."""
    return 2 * hidden if name == "swiglu" else hidden


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
        hidden = dense(features_before(self.activation, self.hidden), self.bias, self.init_std, name="up")(x)

        def down(module: MLP, hidden: Float[Array, "B T G"]) -> Float[Array, "B T D"]:
            active = activation(self.activation)(hidden)
            return dense(x.shape[-1], self.bias, self.output_std, name="down", parent=module)(active)

        # For the gradient `hidden` is kept, and nothing that follows from it: neither what goes into the last product
        # nor the steps of the activation's formula (five for GELU). Of layers that are unrolled XLA keeps the former.
        return nn.checkpoint(down, prevent_cse=False)(self, hidden)


class MultiHeadAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2) of a sequence to itself.

    One product makes queries, keys and values of all heads, (D, 3 D) in the order of GPT-2's `c_attn`; each head
    attends in its own D / N dimensions; a last product mixes the heads. The width must divide by `heads`. With
    `kv_heads` there are fewer of keys and values, (D, D + 2 K H), each for N / K heads of queries. `qk_norm` brings
    queries and keys to unit mean square; `window` lets each position see the last so many only; `positions` (#B, T),
    where given, rotate queries and keys (see `positions.rotary`).

    Called with x (B, T, D): causal attention within x, each document for itself where `segments` numbers them (see
    `masked_self_attention`); not causal where a `mask` says which of its positions are real.
    Called with a cache too: x continues what the cache holds of `layer`, and the cache with x's own keys and values
    added comes back. `scale` multiplies the scores (default: 1 / sqrt(H)).
    """

    heads: int
    bias: bool = True
    init_std: float | None = 0.02
    output_std: float | None = 0.02
    dropout: float = 0.0
    implementation: AttentionName = "auto"
    kv_heads: int | None = None
    qk_norm: bool = False
    window: int | None = None
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
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "#B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        batch, length, width = x.shape
        kv_heads = self.kv_heads or self.heads
        kv_width = width * kv_heads // self.heads
        dense = partial(Dense, parameter_dtype=self.parameter_dtype, compute_dtype=self.compute_dtype)
        qkv = dense(width + 2 * kv_width, self.bias, self.init_std, name="qkv")(x)
        parts = jnp.split(qkv, [width, width + kv_width], axis=-1)
        query, key, value = (
            split_heads(part, n) for part, n in zip(parts, (self.heads, kv_heads, kv_heads), strict=True)
        )
        if self.qk_norm:
            query, key = unit_mean_square(query), unit_mean_square(key)
        if positions is not None:
            query, key = rotary(query, positions), rotary(key, positions)
        if cache is not None and isinstance(layer, int) and cache.has(layer):
            cache = cache.insert(layer, key, value)
            heads = attend_to_cache(query, cache, layer, scale=scale, window=self.window)
        else:
            cache = cache and cache.start(key, value)
            numbers = (segments, segments) if segments is not None else None if mask is None else everyone_to(mask)
            key, value = (jnp.repeat(x, self.heads // kv_heads, axis=2) for x in (key, value))
            heads = attention(
                query, key, value, causal=mask is None, window=self.window, segments=numbers,
                implementation=self.implementation, scale=scale, dropout_rate=self.dropout, dropout_keys=dropout_keys,
            )  # fmt: skip
        y = dense(width, self.bias, self.output_std, name="out")(heads.reshape(batch, length, width))
        return y, cache


def everyone_to(mask: Bool[Array, "B S"], queries: int | None = None) -> tuple[Int[Array, "B T"], Int[Array, "B S"]]:
    """Segments with which each of T queries (default: S) sees the keys that `mask` says are real."""
    batch, keys = mask.shape
    return jnp.ones((batch, queries or keys), jnp.int32), mask.astype(jnp.int32)


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
    implementation: AttentionName = "auto"
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
        if cache is not None and isinstance(layer, int):
            heads = attend_to_source(query, cache, layer, scale=scale)
        elif self.is_mutable_collection("intermediates"):
            weights = attention_weights(query, key, None if mask is None else mask[:, None, None, :], scale)
            self.sow("intermediates", "weights", weights)
            heads = jnp.einsum("BNTS,BNSH->BTNH", dropout(weights, self.dropout, dropout_keys), value)
        else:
            numbers = None if mask is None else everyone_to(mask, x.shape[1])
            heads = attention(
                query, key.swapaxes(1, 2), value.swapaxes(1, 2), segments=numbers, implementation=self.implementation,
                scale=scale, dropout_rate=self.dropout, dropout_keys=dropout_keys,
            )  # fmt: skip
        return dense(width, self.bias, self.output_std, name="out")(heads.reshape(x.shape)), cache
