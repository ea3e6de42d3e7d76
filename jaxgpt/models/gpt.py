"""GPT-2 as a pure function (Radford et al. 2019): tokens and parameters in, hidden states out."""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxgpt.config import GPTConfig
from jaxgpt.models.attention import KVCache, empty_cache, fold_in
from jaxgpt.models.blocks import Parameters, apply_blocks, decoding_parameters, embedding_dropout, vocab_size
from jaxgpt.models.layers import PositionalEncoding, initializer
from jaxgpt.models.losses import unembed


class GPT(nn.Module):
    """Decoder-only Transformer. `apply(variables, tokens)` returns hidden states (B, T, D); see `unembed` for logits.

    Its parameters are laid out for training, or for decoding (see `blocks.decoding_parameters`).
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

        init = initializer(c.init_std)
        embedding = nn.Embed(
            vocab_size(c), c.width, embedding_init=init, param_dtype=c.parameter_dtype, name="token_embedding"
        )
        if not c.tied_head:
            self.param("head", init, (vocab_size(c), c.width), c.parameter_dtype)
        encoding = PositionalEncoding(
            c.context, c.width, c.positions == "learned", c.init_std, c.parameter_dtype, name="position_embedding"
        )
        positions = jnp.arange(length)[None]
        if cache is not None:
            # What stands beyond the context is padding, where the NaN of a position that is none would spread.
            positions = jnp.minimum(positions + cache.length[:, None], c.context - 1)
        x = (embedding(tokens) + encoding(positions)).astype(c.compute_dtype)
        x = embedding_dropout(c, x, fold_in(dropout_keys, c.layers))

        std = c.init_std and c.init_std / math.sqrt(2 * c.layers)  # Radford et al. 2019, section 2.3
        x, cache = apply_blocks(self, c, c.layers, x, dropout_keys, cache, output_std=std)
        if cache is not None:
            cache = dataclasses.replace(cache, length=cache.length + length)
        return x, cache


def init_parameters(config: GPTConfig, key: Key[Array, ""]) -> Parameters:
    """Initial parameters: N(0, init_std), residual projections N(0, init_std / sqrt(2 L)), biases 0, norms 1."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(GPT(config).init)(key, tokens)["params"]


def output_head(parameters: Parameters) -> Float[Array, "V D"]:
    """The matrix that turns hidden states into logits: the head if there is one, else the token embedding."""
    return parameters["head"] if "head" in parameters else parameters["token_embedding"]["embedding"]


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
