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
from jaxgpt.models.attention import KVCache, Scale, dropout, empty_cache, fold_in
from jaxgpt.models.layers import MLP, MultiHeadAttention, PositionalEncoding
from jaxgpt.models.losses import unembed

Parameters = Mapping[str, Any]


class Block(nn.Module):
    """One Transformer block: x + attention(norm(x)), then x + mlp(norm(x)); with `norm="post"`, norm(x + ...) instead.

    `layer` counts blocks from 0; the dropout keys are the same for all. It is also the step of a scan over layers: `x`
    is carried and nothing else comes out, since there is no cache then.
    """

    config: GPTConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer: int | Int[Array, ""],
        dropout_keys: Key[Array, " B"] | None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        c = self.config
        keys = fold_in(dropout_keys, layer)
        weights_dropout = c.dropout if c.attention_dropout is None else c.attention_dropout
        attention = MultiHeadAttention(
            c.heads, c.bias, c.init_std, residual_std(c), weights_dropout, c.attention, c.parameter_dtype,
            c.compute_dtype, name="attention",
        )  # fmt: skip
        mlp = MLP(
            c.hidden_width, c.activation, c.bias, c.init_std, residual_std(c), c.parameter_dtype, c.compute_dtype,
            name="mlp",
        )  # fmt: skip
        attention_norm, mlp_norm = layer_norm(c, "attention_norm"), layer_norm(c, "mlp_norm")
        before = c.norm == "pre"

        attended, cache = attention(
            attention_norm(x) if before else x, cache, layer, fold_in(keys, 0), attention_scale(c, layer)
        )
        x = x + dropout(attended, c.dropout, fold_in(keys, 1))
        x = x if before else attention_norm(x)
        x = x + dropout(mlp(mlp_norm(x) if before else x), c.dropout, fold_in(keys, 2))
        return x if before else mlp_norm(x), cache


class GPT(nn.Module):
    """Decoder-only Transformer. `apply(variables, tokens)` returns hidden states (B, T, D); see `unembed` for logits.

    Parameters of all blocks lie stacked on a leading L axis (`blocks`), applied by a scan; or, for decoding, one by one
    (see `decoding_parameters`).
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
            cache: what came before `tokens` (see `empty_cache`), with parameters laid out for decoding; without it they
                start at position 0.
            dropout_keys: a key for each row; None means deterministic.

        Returns:
            Hidden states after the last norm, in the compute dtype, and the cache with `tokens` added (or None).

        Raises:
            ValueError: more tokens than the context or the cache holds; a cache, and parameters not laid out for it.
        """
        c = self.config
        length = tokens.shape[1]
        limit = c.context if cache is None else cache.capacity
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
        positions = jnp.arange(length)[None]
        if cache is not None:
            # What stands beyond the context is padding, where the NaN of a position that is none would spread.
            positions = jnp.minimum(positions + cache.length[:, None], c.context - 1)
        x = (embedding(tokens) + encoding(positions)).astype(c.compute_dtype)
        share = c.dropout if c.embedding_dropout is None else c.embedding_dropout
        x = dropout(x, share, fold_in(dropout_keys, c.layers))

        if self.has_variable("params", "block_0"):
            for layer in range(c.layers):
                x, cache = Block(c, name=f"block_{layer}")(x, layer, dropout_keys, cache)
        elif cache is None:
            layers = jnp.arange(c.layers, dtype=jnp.int32)
            x, _ = _scan_over_layers(c)(c, name="blocks")(x, layers, dropout_keys)
        else:
            raise ValueError("with a cache, the parameters must be laid out by decoding_parameters")
        if cache is not None:
            cache = dataclasses.replace(cache, length=cache.length + length)
        return layer_norm(c, "final_norm")(x) if c.norm == "pre" else x, cache


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


def attention_scale(config: GPTConfig, layer: int | Int[Array, ""]) -> Scale:
    """What multiplies the attention scores of a block; None means 1 / sqrt(H), as published."""
    if config.scale_attention and not config.scale_attention_by_layer:
        return None
    scale = 1.0 / math.sqrt(config.head_width) if config.scale_attention else 1.0
    return scale / (layer + 1) if config.scale_attention_by_layer else scale


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


def decoding_parameters(parameters: Parameters) -> Parameters:
    """Lay the parameters out for decoding: `block_0`, `block_1`, ... one by one, their matrices (out, in).

    A token's work is to read every matrix once. Of stacked ones XLA copies a layer's part first, and the products of a
    few rows take half as long again with (in, out) (measured on CPU). Same values, twice the memory as long as both are
    kept; parameters that are laid out already come back as they are.
    """
    if "blocks" not in parameters:
        return parameters
    blocks = cast(dict[str, Any], parameters["blocks"])
    layers = len(blocks["attention_norm"]["scale"])
    rest = {name: leaf for name, leaf in parameters.items() if name != "blocks"}
    return rest | {f"block_{layer}": _one_transposed_block(blocks, layer) for layer in range(layers)}


def _one_transposed_block(blocks: Mapping[str, Any], layer: int) -> Parameters:
    block: dict[str, Any] = {}
    for name, leaf in blocks.items():
        if isinstance(leaf, Mapping):
            block[name] = _one_transposed_block(leaf, layer)
        elif name == "kernel":
            block["transposed"] = leaf[layer].T
        else:
            block[name] = leaf[layer]
    return block


def prefill(
    config: GPTConfig, parameters: Parameters, tokens: Int[Array, "B T"], counts: Int[Array, " B"], capacity: int
) -> tuple[Float[Array, "B V"], KVCache]:
    """Read prompts: the logits of the token that follows each, and a cache with room for `capacity` tokens a row.

    Args:
        parameters: in either layout; laid out by `decoding_parameters` they are read faster.
        tokens: a prompt a row, padded at its end with any id (so that few lengths are compiled).
        counts: how many of a row's tokens are its prompt, at least 1. Later positions change no earlier one, so what
            is behind them does not matter.
    """
    cache = empty_cache(tokens.shape[0], capacity)
    hidden, cache = _apply(config, parameters, tokens, cache)
    last = hidden[jnp.arange(len(counts)), counts - 1]
    return unembed(last, output_head(parameters)), dataclasses.replace(cache, length=counts)


def decode_step(
    config: GPTConfig, parameters: Parameters, tokens: Int[Array, "B T"], cache: KVCache
) -> tuple[Float[Array, "B T V"], KVCache]:
    """Continue each row of `cache` by T tokens, one as a rule: the logits of what follows each, and the new cache.

    The rows must have room for them in the cache. T > 1 checks guesses: set `length` back to what was right.
    """
    hidden, cache = _apply(config, parameters, tokens, cache)
    return unembed(hidden, output_head(parameters)), cache


def _apply(
    config: GPTConfig, parameters: Parameters, tokens: Int[Array, "B T"], cache: KVCache
) -> tuple[Float[Array, "B T D"], KVCache]:
    variables = {"params": decoding_parameters(parameters)}
    return cast(tuple[Array, KVCache], GPT(config).apply(variables, tokens, cache=cache))
