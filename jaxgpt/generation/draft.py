"""Guesses of a small model for a great one (speculative decoding, Leviathan et al. 2023, Chen et al. 2023)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt.config import GenerationConfig
from jaxgpt.generation.decode import Decoder, Text, choose
from jaxgpt.generation.sampling import rules
from jaxgpt.models.cache import KVCache


class Draft:
    """A draft model beside `Decoder.decode`: `guess` says what it would write itself, by the same rules.

    It draws with the random key that the model will draw with at that place, so that of like distributions both draw
    the same token; and only such a token is kept, so the text is the model's own.
    """

    def __init__(self, decoder: Decoder, parameters: Any, config: GenerationConfig, stop_tokens: Sequence[int]) -> None:
        """`decoder` and `parameters` are the draft model's.

        Raises:
            ValueError: its context has no room for two tokens and the guesses.
        """
        if decoder.context < config.draft_tokens + 2:
            raise ValueError(
                f"draft-tokens is {config.draft_tokens}; the draft's context of {decoder.context} has room for "
                f"{decoder.context - 2}"
            )
        self.count = config.draft_tokens
        self._decoder, self._parameters, self._config = decoder, parameters, config
        self._rule = rules(config, stop_tokens)
        self._cache: KVCache | None = None
        self._begin: list[int] = []

    def guess(self, texts: Sequence[Text]) -> list[list[int]]:
        """`count` tokens that may follow each text, which has at least two.

        Of the guesses before, those that were right are in the cache still: at most the newest two tokens are not.
        """
        cache = self._read(texts)
        guesses: list[list[int]] = [[] for _ in texts]
        newest = [text.tokens[-2:] for text in texts]
        behind = 2
        while True:
            known = [
                len(text.tokens) + len(ahead) - start - behind
                for text, start, ahead in zip(texts, self._begin, guesses, strict=True)
            ]
            cache = dataclasses.replace(cache, length=jnp.array(known, jnp.int32))
            logits, cache = self._decoder.step(self._parameters, np.array(newest, np.int32), cache)
            chosen = choose(logits[:, -1], list(zip(texts, guesses, strict=True)), self._config, self._rule)
            for ahead, (token, _) in zip(guesses, chosen, strict=True):
                ahead.append(token)
            if len(guesses[0]) == self.count:
                self._cache = cache
                return guesses
            newest, behind = [ahead[-1:] for ahead in guesses], 1

    def _read(self, texts: Sequence[Text]) -> KVCache:
        """The cache; where a text outgrows it, all are read anew, of that one the newer half of what fits."""
        context = self._decoder.context
        full = [
            text.finish is None and len(text.tokens) - start + self.count > context
            for text, start in zip(texts, self._begin or [0] * len(texts), strict=True)
        ]
        if self._cache is not None and not any(full):
            return self._cache
        before = self._begin or [0] * len(texts)
        self._begin = []
        for text, start, outgrown in zip(texts, before, full, strict=True):
            kept = max(2, (context - self.count) // 2) if outgrown else len(text.tokens) - start
            self._begin.append(len(text.tokens) - (2 if text.finish is not None else kept))
        windows = [text.tokens[start:] for text, start in zip(texts, self._begin, strict=True)]
        room = max(text.limit - text.made for text in texts)
        return self._decoder.prefill(self._parameters, windows, room, self.count)[1]
