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
from jaxgpt.models.attention import fold_in
from jaxgpt.models.blocks import Parameters, apply_blocks, decoding_parameters, embedding_dropout, vocab_size
from jaxgpt.models.cache import KVCache, empty_cache
from jaxgpt.models.fused_loss import smoothed_divergence_sums
from jaxgpt.models.losses import Head, unembed
from jaxgpt.models.positions import PositionalEncoding, TokenEmbedding, initializer


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
        segments: Int[Array, "B T"] | None = None,
        dropout_keys: Key[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Run the model.

        Args:
            tokens: ids in [0, V). An id outside gives NaN, never another token's vector.
            cache: what came before `tokens` (see `empty_cache`), with parameters laid out for decoding; without it they
                start at position 0.
            segments: numbers of the documents that share a row, side by side: each is computed as it would be alone,
                from position 0. None: a row is one document.
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
        embedding = TokenEmbedding(vocab_size(c), c.width, init, c.parameter_dtype, name="token_embedding")
        if not (c.tied_head or self.has_variable("params", "head")):
            self.param("head", init, (vocab_size(c), c.width), c.parameter_dtype)
        positions = jnp.arange(length)[None] if segments is None else positions_within(segments)
        if cache is not None:
            # What stands beyond the context is padding, where the NaN of a position that is none would spread.
            positions = jnp.minimum(positions + cache.length[:, None], c.context - 1)
        x = embedding(tokens) * (math.sqrt(c.width) if c.scale_embeddings else 1.0)
        rotated = positions if c.positions == "rotary" else None
        if rotated is None:
            learned = c.positions == "learned"
            x = x + PositionalEncoding(
                c.context, c.width, learned, c.init_std, c.parameter_dtype, name="position_embedding"
            )(positions)
        x = x.astype(c.compute_dtype)
        x = embedding_dropout(c, x, fold_in(dropout_keys, c.layers))

        std = c.init_std and c.init_std / math.sqrt(2 * c.layers)  # Radford et al. 2019, section 2.3
        std = 0.0 if c.zero_init else std
        x, cache = apply_blocks(
            self,
            c,
            c.layers,
            x,
            dropout_keys,
            cache,
            segments=segments,
            positions=rotated,
            output_std=std,
            window=c.window,
        )
        if cache is not None:
            cache = dataclasses.replace(cache, length=cache.length + length)
        return x, cache


def positions_within(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The position of each token in its own document, from 0."""
    places = jnp.arange(segments.shape[1])[None]
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return places - jax.lax.cummax(jnp.where(begins, places, 0), axis=1)


def init_parameters(config: GPTConfig, key: Key[Array, ""]) -> Parameters:
    """Initial parameters: N(0, init_std), residual projections N(0, init_std / sqrt(2 L)), biases 0, norms 1."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    rolled = dataclasses.replace(config, unroll=1)  # the same numbers, compiled in two thirds of the time
    return jax.jit(GPT(rolled).init)(key, tokens)["params"]


def output_head(parameters: Parameters) -> Head:
    """The matrix that turns hidden states into logits: the head if there is one, else the token embedding."""
    if "head" in parameters:
        return cast(Head, parameters["head"])
    table: Parameters = parameters["token_embedding"]
    return cast(Head, table.get("embedding", table))


def next_token_logits(
    config: GPTConfig, parameters: Parameters, hidden: Float[Array, "... D"]
) -> Float[Array, "... V"]:
    """Logits of what follows each position."""
    return unembed(hidden, output_head(parameters), config.logit_cap)


def next_token_loss(
    config: GPTConfig,
    parameters: Parameters,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> Float[Array, ""]:
    """Weighted sum of the negative log-likelihood of the targets in nats; the logits never exist all at once."""
    return smoothed_divergence_sums(
        hidden, cast(Array, output_head(parameters)), targets, weights, 0.0, config.logit_cap
    )[0]


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
    return next_token_logits(config, parameters, last), dataclasses.replace(cache, length=counts)


def decode_step(
    config: GPTConfig, parameters: Parameters, tokens: Int[Array, "B T"], cache: KVCache
) -> tuple[Float[Array, "B T V"], KVCache]:
    """Continue each row of `cache` by T tokens, one as a rule: the logits of what follows each, and the new cache.

    The rows must have room for them in the cache. T > 1 checks guesses: set `length` back to what was right.
    """
    hidden, cache = _apply(config, parameters, tokens, cache)
    return next_token_logits(config, parameters, hidden), cache


def _apply(
    config: GPTConfig, parameters: Parameters, tokens: Int[Array, "B T"], cache: KVCache
) -> tuple[Float[Array, "B T D"], KVCache]:
    variables = {"params": decoding_parameters(parameters)}
    return cast(tuple[Array, KVCache], GPT(config).apply(variables, tokens, cache=cache))
