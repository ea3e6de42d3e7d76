"""The encoder-decoder of "Attention Is All You Need" (Vaswani et al. 2017): source and target in, hidden states out."""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgpt.config import TransformerConfig
from jaxgpt.models import blocks
from jaxgpt.models.attention import fold_in
from jaxgpt.models.blocks import Parameters, apply_blocks, embedding_dropout, vocab_size
from jaxgpt.models.cache import DecoderCache, KVCache
from jaxgpt.models.losses import unembed
from jaxgpt.models.positions import PositionalEncoding, TokenEmbedding


class Transformer(nn.Module):
    """Encoder and decoder over one embedding (section 3.4), which is the output head too; see `unembed` for logits.

    Parameters: `token_embedding`, the stacks of blocks `encoder` and `decoder`, and, where positions are learned,
    `source_positions` and `target_positions`.
    """

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        # Scaled by sqrt(D) when looked up, so that a token's vector has unit variance and its logits have too.
        init = nn.initializers.normal(c.width**-0.5)
        self.token_embedding = TokenEmbedding(vocab_size(c), c.width, init, c.parameter_dtype)
        learned = (c.context, c.width, c.positions == "learned", 1.0, c.parameter_dtype)
        self.source_positions, self.target_positions = PositionalEncoding(*learned), PositionalEncoding(*learned)
        self.encoder = Stack(c, c.encoder_layers)
        self.decoder = Stack(c, c.decoder_layers, cross=True)

    def __call__(
        self,
        source: Int[Array, "B S"],
        mask: Bool[Array, "B S"],
        target: Int[Array, "B T"],
        *,
        dropout_keys: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Encode, then decode a known target: its hidden states, each from the source and what is before it.

        Args:
            source: ids in [0, V); `mask` is True where they are real, whatever stands elsewhere.
            target: what the decoder reads, from its start token on. Padding at its end changes nothing before it.
            dropout_keys: a key for each row; None means deterministic.

        Raises:
            ValueError: source or target is longer than the context.
        """
        encoded = self.encode(source, mask, dropout_keys=fold_in(dropout_keys, 0))
        hidden, _ = self.decode(target, encoded, mask, dropout_keys=fold_in(dropout_keys, 1))
        return hidden

    def encode(
        self, source: Int[Array, "B S"], mask: Bool[Array, "B S"], *, dropout_keys: Key[Array, " B"] | None = None
    ) -> Float[Array, "B S D"]:
        """Hidden states of the source; those where `mask` is False mean nothing."""
        x = self._embed(source, jnp.arange(source.shape[1])[None], self.source_positions, dropout_keys)
        x, _ = self.encoder(x, dropout_keys, mask=mask)
        return x

    def decode(
        self,
        target: Int[Array, "B T"],
        source: Float[Array, "G S D"] | None,
        mask: Bool[Array, "G S"],
        *,
        cache: DecoderCache | None = None,
        dropout_keys: Key[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], DecoderCache | None]:
        """Hidden states of the target, given the encoded source; with a cache `target` continues what that holds.

        A cache that has the source's keys and values needs no `source`.
        """
        positions = jnp.arange(target.shape[1])[None]
        if cache is not None:
            positions = jnp.minimum(positions + cache.length[:, None], self.config.context - 1)
        x = self._embed(target, positions, self.target_positions, dropout_keys)
        x, past = self.decoder(x, dropout_keys, cache, source, mask)
        if past is not None:
            past = dataclasses.replace(past, length=past.length + target.shape[1])
        return x, cast(DecoderCache | None, past)

    def _embed(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "#B T"],
        encoding: PositionalEncoding,
        dropout_keys: Key[Array, " B"] | None,
    ) -> Float[Array, "B T D"]:
        c = self.config
        if tokens.shape[1] > c.context:
            raise ValueError(f"{tokens.shape[1]} tokens do not fit a context of {c.context}")
        x = (self.token_embedding(tokens) * math.sqrt(c.width) + encoding(positions)).astype(c.compute_dtype)
        return embedding_dropout(c, x, fold_in(dropout_keys, max(c.encoder_layers, c.decoder_layers)))


class Stack(nn.Module):
    """The blocks of the encoder, or, with `cross`, of the decoder (see `blocks.apply_blocks`)."""

    config: TransformerConfig
    layers: int
    cross: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        dropout_keys: Key[Array, " B"] | None,
        cache: KVCache | None = None,
        source: Float[Array, "G S D"] | None = None,
        mask: Bool[Array, "G S"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        c = self.config
        return apply_blocks(
            self,
            c,
            self.layers,
            x,
            dropout_keys,
            cache,
            source,
            mask,
            cross=self.cross,
            output_std=0.0 if c.zero_init else c.init_std,
        )


def init_parameters(config: TransformerConfig, key: Key[Array, ""]) -> Parameters:
    """Initial parameters: matrices as `init_std` says, tokens N(0, 1/sqrt(D)), positions N(0, 1), biases 0, norms 1."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    rolled = dataclasses.replace(config, unroll=1)  # the same numbers, compiled sooner
    return jax.jit(Transformer(rolled).init)(key, tokens, tokens == 0, tokens)["params"]


def output_head(parameters: Parameters) -> Float[Array, "V D"]:
    """The matrix that turns hidden states into logits: the embedding."""
    return parameters["token_embedding"]["embedding"]


def decoding_parameters(parameters: Parameters) -> Parameters:
    """Lay the decoder out for decoding (see `blocks.decoding_parameters`); the encoder runs once and stays."""
    return {**parameters, "decoder": blocks.decoding_parameters(parameters["decoder"])}


def prefill(
    config: TransformerConfig,
    start: int,
    parameters: Parameters,
    tokens: Int[Array, "B S"],
    counts: Int[Array, " B"],
    capacity: int,
) -> tuple[Float[Array, "B V"], DecoderCache]:
    """Read sources: the logits of each target's first token, and a cache with room for `capacity` tokens a row.

    Args:
        start: the token every target begins with; it takes the first place in the cache.
        parameters: in either layout; laid out by `decoding_parameters` they are read faster.
        tokens: a source a row, padded at its end with any id.
        counts: how many of a row's tokens are its source, at least 1.
    """
    model, variables = Transformer(config), {"params": decoding_parameters(parameters)}
    mask = jnp.arange(tokens.shape[1]) < counts[:, None]
    source = model.apply(variables, tokens, mask, method="encode")
    cache = DecoderCache((), (), jnp.zeros(len(tokens), jnp.int32), capacity, (), (), mask)
    first = jnp.full((len(tokens), 1), start, jnp.int32)
    hidden, started = model.apply(variables, first, source, mask, cache=cache, method="decode")
    return unembed(hidden[:, 0], output_head(parameters)), cast(DecoderCache, started)


def decode_step(
    config: TransformerConfig, parameters: Parameters, tokens: Int[Array, "R T"], cache: DecoderCache
) -> tuple[Float[Array, "R T V"], DecoderCache]:
    """Continue each row of `cache` by T tokens, one as a rule: the logits of what follows each, and the new cache."""
    variables = {"params": decoding_parameters(parameters)}
    model = Transformer(config)
    hidden, longer = model.apply(variables, tokens, None, cache.source_mask, cache=cache, method="decode")
    return unembed(hidden, output_head(parameters)), cast(DecoderCache, longer)


def attention_map(
    config: TransformerConfig, parameters: Parameters, source: Int[Array, " S"], target: Int[Array, " T"]
) -> Float[Array, "L N T S"]:
    """How much each target position looks at each source position, in every layer and head of the decoder.

    Args:
        source: one sentence, as the encoder reads it.
        target: what the decoder reads, from its start token on.
    """
    mask = jnp.ones((1, len(source)), bool)
    _, seen = Transformer(config).apply(
        {"params": parameters}, source[None], mask, target[None], mutable=["intermediates"]
    )
    (weights,) = seen["intermediates"]["decoder"]["blocks"]["cross_attention"]["weights"]
    return weights[:, 0]
