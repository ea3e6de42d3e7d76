"""Decoding with a key-value cache: one prefill of the prompt, then one token at a time.

Works on any function `(parameters, tokens, count, cache) -> (logits, cache)`; see `models.gpt.next_token_logits`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgpt.config import SamplingConfig
from jaxgpt.generation.sampling import sample_token
from jaxgpt.models.attention import KVCache

# (parameters, tokens (B, T), how many of the T count, cache) -> (logits of the next token (B, V), cache)
Step = Callable[[Any, Int[Array, "B T"], Int[Array, ""], KVCache], tuple[Float[Array, "B V"], KVCache]]


class Decoder:
    """A step function compiled for decoding: once for each bucket of prompt lengths, once for single tokens.

    `new_cache()` returns an empty cache for one row; its capacity is the context.
    """

    def __init__(self, step: Step, new_cache: Callable[[], KVCache]) -> None:
        self._new_cache = new_cache
        self._capacity = jax.eval_shape(lambda: new_cache().key).shape[2]
        self._advance = jax.jit(functools.partial(_advance, step), static_argnames="top_k", donate_argnums=3)

    def tokens(self, parameters: Any, prompt: Sequence[int], sampling: SamplingConfig) -> Iterator[int]:
        """Yield tokens that continue `prompt`, without end.

        The same prompt, seed and parameters give the same tokens. When the context is full, the newer half of what it
        holds becomes the prompt of a fresh cache: learned positions cannot move, so the window does.

        Raises:
            ValueError: an empty prompt.
        """
        if not prompt:
            raise ValueError("the prompt is empty; generation needs at least one token to continue")
        key = jax.random.key(sampling.seed)
        temperature = np.float32(sampling.temperature)
        seen = list(prompt)
        window, cache, cached = seen[-self._capacity :], self._new_cache(), 0
        while True:
            size = min(self._capacity, 1 << (len(window) - 1).bit_length())  # few sizes, so few compilations
            padded = np.zeros((1, size), np.int32)
            padded[0, : len(window)] = window
            token_key = jax.random.fold_in(key, len(seen))
            token, cache = self._advance(
                parameters, padded, np.int32(len(window)), cache, token_key, temperature, top_k=sampling.top_k
            )
            cached += len(window)
            seen.append(int(token[0]))
            yield seen[-1]
            window = seen[-1:]
            if cached == self._capacity:
                window, cache, cached = seen[-max(1, self._capacity // 2) :], self._new_cache(), 0


def _advance(
    step: Step,
    parameters: Any,
    tokens: Int[Array, "1 T"],
    count: Int[Array, ""],
    cache: KVCache,
    key: Array,
    temperature: Float[Array, ""],
    *,
    top_k: int | None,
) -> tuple[Int[Array, " 1"], KVCache]:
    logits, cache = step(parameters, tokens, count, cache)
    return sample_token(logits, key[None], temperature, top_k), cache
