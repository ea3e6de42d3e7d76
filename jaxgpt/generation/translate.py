"""Translating many sentences: those of about the same length together, the results in the order they came in."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from jaxgpt.config import GenerationConfig, TransformerConfig, require
from jaxgpt.generation.beam import FEWEST, Beam, beam_search
from jaxgpt.generation.decode import Decoder
from jaxgpt.models import transformer

# A translation may have this many tokens for each of its source's, and so many more.
TOKENS_PER_TOKEN, MORE_TOKENS = 2, 10


def translation_decoder(config: TransformerConfig, end: int) -> Decoder:
    """The decoder of an encoder-decoder whose targets begin and end with `end`."""
    prefill = functools.partial(transformer.prefill, config, end)
    step = functools.partial(transformer.decode_step, config)
    return Decoder(prefill, step, config.context, prompt_in_cache=False)


def translate_tokens(
    decoder: Decoder,
    parameters: Any,
    sources: Sequence[Sequence[int]],
    config: GenerationConfig,
    end: int,
    batch_size: int = 64,
) -> list[list[Beam]]:
    """Translate each source; return its `config.samples` best translations, best first.

    Args:
        decoder: see `translation_decoder`.
        parameters: best laid out by `models.transformer.decoding_parameters`.
        sources: token ids without the end token, which is added; at most the context less one.
        config: `beams`, `samples`, the length rule and penalty, and, if set, `max_new_tokens` of every translation.
        end: the token that ends sources and targets.
        batch_size: sources translated together.

    Raises:
        ValueError: more translations are wanted than there are beams.
        FloatingPointError: the model's logits are NaN.
    """
    require(config.samples <= config.beams, f"samples is {config.samples}, more than beams {config.beams}")
    found: dict[tuple[int, ...], list[Beam]] = {}
    order = sorted(set(map(tuple, sources)), key=lambda source: (len(source), source))
    for start in range(0, len(order), batch_size):
        together = order[start : start + batch_size]
        prompts = [[*source, end] for source in together]
        limits = [_limit(len(prompt), config, decoder.context) for prompt in prompts]
        fillers = _size(len(together), batch_size) - len(together)
        prompts, limits = [*prompts, *prompts[:1] * fillers], [*limits, *[0] * fillers]
        beams = beam_search(decoder, parameters, prompts, limits, config, (end,))
        found |= dict(zip(together, beams, strict=False))
    return [found[tuple(source)] for source in sources]


def _size(count: int, most: int) -> int:
    """Sentences of a batch: one of few numbers, so that few programs are compiled."""
    return 1 if count == 1 else min(most, max(FEWEST, 1 << (count - 1).bit_length()))


def _limit(length: int, config: GenerationConfig, context: int) -> int:
    """Most tokens of a translation, its end token included."""
    return min(context, config.max_new_tokens or TOKENS_PER_TOKEN * length + MORE_TOKENS)
