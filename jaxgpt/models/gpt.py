"""GPT-2 as a pure function (Radford et al. 2019): tokens and parameters in, hidden states out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxgpt.config import GPTConfig
from jaxgpt.models.attention import KVCache, dropout, fold_in
from jaxgpt.models.layers import MLP, MultiHeadAttention, PositionalEncoding
from jaxgpt.models.losses import unembed

Parameters = Mapping[str, Any]


class Block(nn.Module):
    """One pre-norm Transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    The step of a scan over layers: (x, cache) is carried, `layer` counts, the dropout keys are the same for all.
    """

    config: GPTConfig

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "B T D"], KVCache | None],
        layer: Int[Array, ""],
        dropout_keys: Key[Array, " B"] | None,
    ) -> tuple[tuple[Float[Array, "B T D"], KVCache | None], None]:
        c = self.config
        x, cache = carry
        keys = fold_in(dropout_keys, layer)
        attention = MultiHeadAttention(
            c.heads, c.bias, c.init_std, residual_std(c), c.dropout, c.attention, c.parameter_dtype, c.compute_dtype,
            name="attention",
        )  # fmt: skip
        mlp = MLP(c.hidden_width, c.bias, c.init_std, residual_std(c), c.parameter_dtype, c.compute_dtype, name="mlp")

        attended, cache = attention(layer_norm(c, "attention_norm")(x), cache, layer, fold_in(keys, 0))
        x = x + dropout(attended, c.dropout, fold_in(keys, 1))
        x = x + dropout(mlp(layer_norm(c, "mlp_norm")(x)), c.dropout, fold_in(keys, 2))
        return (x, cache), None


class GPT(nn.Module):
    """Decoder-only Transformer. `apply(variables, tokens)` returns hidden states (B, T, D); see `unembed` for logits.

    Parameters of all blocks lie stacked on a leading L axis (`blocks`), applied by a scan.
    """

    config: GPTConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        cache: KVCache | None = None,
        dropout_keys: Key[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Run the model.

        Args:
            tokens: ids in [0, V). An id outside gives NaN, never another token's vector.
            cache: what came before `tokens` (see `init_cache`); without it they start at position 0.
            dropout_keys: a key for each row; None means deterministic.

        Returns:
            Hidden states after the last norm, in the compute dtype, and the cache with `tokens` added (or None).

        Raises:
            ValueError: more tokens than the context or the cache holds.
        """
        c = self.config
        length = tokens.shape[1]
        limit = c.context if cache is None else min(c.context, cache.capacity)
        if length > limit:
            raise ValueError(f"{length} tokens do not fit a context of {limit}")

        init = nn.initializers.normal(c.init_std)
        embedding = nn.Embed(
            _vocab_size(c), c.width, embedding_init=init, param_dtype=c.parameter_dtype, name="token_embedding"
        )
        if not c.tied_head:
            self.param("head", init, (_vocab_size(c), c.width), c.parameter_dtype)
        encoding = PositionalEncoding(
            c.context, c.width, c.positions == "learned", c.init_std, c.parameter_dtype, name="position_embedding"
        )
        start = 0 if cache is None else cache.length
        x = (embedding(tokens) + encoding(start + jnp.arange(length))).astype(c.compute_dtype)
        x = dropout(x, c.dropout, fold_in(dropout_keys, c.layers))

        layers = jnp.arange(c.layers, dtype=jnp.int32)
        (x, cache), _ = _scan_over_layers(c)(c, name="blocks")((x, cache), layers, dropout_keys)
        if cache is not None:
            cache = dataclasses.replace(cache, length=cache.length + length)
        return layer_norm(c, "final_norm")(x), cache


def layer_norm(config: GPTConfig, name: str) -> nn.LayerNorm:
    """Layer normalisation (Ba et al. 2016); the variance by two passes, which is what PyTorch computes."""
    return nn.LayerNorm(
        epsilon=config.norm_epsilon,
        use_bias=config.bias,
        use_fast_variance=False,
        dtype=config.compute_dtype,
        param_dtype=config.parameter_dtype,
        name=name,
    )


def residual_std(config: GPTConfig) -> float:
    """Initial scale of what is added to the residual stream 2 L times (Radford et al. 2019, section 2.3)."""
    return config.init_std / math.sqrt(2 * config.layers)


def _scan_over_layers(config: GPTConfig) -> Any:
    """`Block` repeated L times: parameters stacked, one program for all layers, unrolled where that is faster."""
    block = nn.remat(Block, prevent_cse=False) if config.remat else Block
    # A rolled scan compiles once whatever L is; on CPU it costs a small model 15-30% of its step.
    unroll = config.unroll or (config.layers if jax.default_backend() == "cpu" and config.layers <= 12 else 1)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=config.layers,
        unroll=min(unroll, config.layers),
    )


def _vocab_size(config: GPTConfig) -> int:
    if config.vocab_size is None:
        raise ValueError("model.vocab-size is not set; it is the tokenizer's unless given")
    return config.vocab_size


def init_parameters(config: GPTConfig, key: Key[Array, ""]) -> Parameters:
    """Initial parameters: N(0, init_std), residual projections N(0, init_std / sqrt(2 L)), biases 0, norms 1."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(GPT(config).init)(key, tokens)["params"]


def output_head(parameters: Parameters) -> Float[Array, "V D"]:
    """The matrix that turns hidden states into logits: the head if there is one, else the token embedding."""
    return parameters["head"] if "head" in parameters else parameters["token_embedding"]["embedding"]


def init_cache(config: GPTConfig, batch: int, capacity: int | None = None) -> KVCache:
    """An empty cache for `batch` rows of up to `capacity` tokens (default: the context), in the compute dtype."""
    shape = (config.layers, batch, capacity or config.context, config.heads, config.head_width)
    empty = jnp.zeros(shape, config.compute_dtype)
    return KVCache(key=empty, value=empty.copy(), length=jnp.zeros((), jnp.int32))


def next_token_logits(
    config: GPTConfig, parameters: Parameters, tokens: Int[Array, "B T"], count: Int[Array, ""], cache: KVCache
) -> tuple[Float[Array, "B V"], KVCache]:
    """Continue what `cache` holds by the first `count` of `tokens`; return the logits of the token that follows.

    What lies beyond `count` is padding (so that few lengths are compiled): later positions change no earlier one, and
    the cache that comes back does not count it.
    """
    hidden, extended = cast(tuple[Array, KVCache], GPT(config).apply({"params": parameters}, tokens, cache=cache))
    last = jax.lax.dynamic_index_in_dim(hidden, count - 1, axis=1, keepdims=False)
    return unembed(last, output_head(parameters)), dataclasses.replace(extended, length=cache.length + count)
