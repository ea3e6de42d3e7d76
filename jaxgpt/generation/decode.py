"""Decoding with a key-value cache: one prefill of the prompts, then a step for each token, of all rows at once.

Works on any pair of functions `prefill` and `decode_step`; see `models.gpt` for theirs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgpt.config import GenerationConfig, GPTConfig
from jaxgpt.generation.sampling import Rules, choose_token, rules
from jaxgpt.models import gpt
from jaxgpt.models.cache import KVCache

# (parameters, tokens (B, T), how many of a row's T count (B,), capacity) -> (logits of the next token (B, V), cache)
Prefill = Callable[[Any, Int[Array, "B T"], Int[Array, " B"], int], tuple[Float[Array, "B V"], KVCache]]
# (parameters, tokens (B, T), cache) -> (logits of what follows each (B, T, V), cache)
Step = Callable[[Any, Int[Array, "B T"], KVCache], tuple[Float[Array, "B T V"], KVCache]]

LONGEST_NGRAM = 3  # what the newest tokens must have in common with earlier ones for a guess, at most
SMALLEST_BUCKET = 16
NOT_FINITE = "the model's logits are not finite; jaxgpt verify says more about its weights"


@dataclass
class Text:
    """One text being made: `Decoder.decode` lengthens it."""

    tokens: list[int]
    """the prompt, then what is new"""
    prompt: int
    """how many of them are the prompt"""
    limit: int
    """most new tokens"""
    sample: int = 0
    """which of the texts of its prompt it is; with the seed it decides its random draws"""
    logprobs: list[float] = field(default_factory=list)
    """log-probability of each new token under the model, in nats"""
    finish: Literal["stop", "length"] | None = None
    """why it ended; None while it goes on. Whoever reads the text may end it"""

    @property
    def new(self) -> list[int]:
        """The new tokens."""
        return self.tokens[self.prompt :]

    @property
    def made(self) -> int:
        """How many they are."""
        return len(self.tokens) - self.prompt


@runtime_checkable
class Guesser(Protocol):
    """What guesses tokens ahead, for `Decoder.decode` to check."""

    count: int
    """how many, of each text, each time"""

    def guess(self, texts: Sequence[Text]) -> list[list[int]]:
        """Guess what may follow each text."""


@dataclass
class Lookup:
    """Guesses from the text itself: what followed the last place that was like its end (prompt lookup, Saxena 2023)."""

    count: int

    def guess(self, texts: Sequence[Text]) -> list[list[int]]:
        """Guess what may follow each text."""
        return [guess(text.tokens, self.count) for text in texts]


class Decoder:
    """A model's `prefill` and `decode_step`, compiled for buckets of lengths, so that a new length rarely compiles."""

    def __init__(self, prefill: Prefill, decode_step: Step, context: int, *, prompt_in_cache: bool = True) -> None:
        """`context` is the most tokens the model sees; the prompt is among them, or an encoder reads it."""
        self.context, self.prompt_in_cache = context, prompt_in_cache
        self._prefill = jax.jit(prefill, static_argnums=3)
        self._step = jax.jit(decode_step, donate_argnums=2)
        self._take = jax.jit(lambda cache, rows, groups: cache.take(rows, groups))

    def prefill(
        self, parameters: Any, windows: Sequence[Sequence[int]], room: int, slack: int = 0
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Read token sequences of any lengths; the cache has room for `room` more each, up to the context, and `slack`.

        Raises:
            ValueError: a sequence is empty.
        """
        if not all(windows):
            raise ValueError("the prompt is empty; generation needs at least one token to continue")
        longest = max(map(len, windows))
        tokens = padded(windows, bucket(longest, self.context))
        lengths = np.array([len(window) for window in windows], np.int32)
        before = longest if self.prompt_in_cache else 1
        capacity = bucket(min(self.context, before + room), self.context) + slack
        return self._prefill(parameters, tokens, lengths, capacity)

    def _prefill_once(
        self, parameters: Any, windows: Sequence[Sequence[int]], room: int, slack: int
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """The same, and equal sequences, as those of several samples are, are read once."""
        numbers = {window: number for number, window in enumerate(dict.fromkeys(map(tuple, windows)))}
        logits, cache = self.prefill(parameters, list(numbers), room, slack)
        if len(numbers) == len(windows):
            return logits, cache
        rows = jnp.array([numbers[tuple(window)] for window in windows], jnp.int32)
        return logits[rows], self._take(cache, rows, rows)

    def take(
        self, cache: KVCache, rows: Int[np.ndarray | Array, " R"], groups: Int[np.ndarray, " G"] | None = None
    ) -> KVCache:
        """The cache of these rows, in this order.

        Of what it holds once for several rows, those of one prompt, it keeps that of the prompts `groups`, each for R/G
        consecutive rows; None: all, as they are.
        """
        return self._take(cache, rows, groups)

    def step(
        self, parameters: Any, tokens: Int[np.ndarray | Array, "B T"], cache: KVCache
    ) -> tuple[Float[Array, "B T V"], KVCache]:
        """Continue each row by T tokens; the old cache is used up (donated)."""
        return self._step(parameters, tokens, cache)

    def decode(
        self,
        parameters: Any,
        texts: Sequence[Text],
        config: GenerationConfig,
        stop_tokens: Sequence[int],
        guesser: Guesser | None = None,
    ) -> Iterator[None]:
        """Lengthen each text, each as it would be alone, and yield after every step until all have ended.

        A text ends before a stop token, at its limit, or when the caller says so. When the context is full, the newer
        half of what it holds is read anew: learned positions cannot move, so the window does.

        Each step checks the guesses of `guesser` (default: `config.lookup` from the text itself) besides the token that
        it makes: the tokens are chosen exactly as without, only several at once where guesses were right.

        Raises:
            ValueError: an empty prompt.
            FloatingPointError: the model's logits are NaN.
        """
        rule = rules(config, stop_tokens)
        ahead: Guesser = Lookup(config.lookup) if guesser is None else guesser
        begin = [max(0, len(text.tokens) - self.context) for text in texts]
        while True:
            windows = [
                text.tokens[start:] if text.finish is None else text.tokens[-1:]
                for text, start in zip(texts, begin, strict=True)
            ]
            room = max(text.limit - text.made for text in texts)
            first, cache = self._prefill_once(parameters, windows, room, ahead.count)
            logits = first[:, None]
            guesses: list[list[int]] = [[] for _ in texts]
            while True:
                chosen = _choose_at_each_place(logits, texts, guesses, config, rule)
                for row, text in enumerate(texts):
                    # A position beyond the context is no position: what was computed there does not count.
                    space = self.context - (len(text.tokens) - 1 - begin[row])
                    _accept(text, chosen[row][:space], guesses[row], stop_tokens)
                yield
                going = [row for row, text in enumerate(texts) if text.finish is None]
                if not going:
                    return
                full = [row for row in going if len(texts[row].tokens) - begin[row] > self.context]
                if full:
                    for row in full:
                        begin[row] = len(texts[row].tokens) - max(1, self.context // 2)
                    break
                guesses = ahead.guess(texts)
                newest = [[text.tokens[-1], *guessed] for text, guessed in zip(texts, guesses, strict=True)]
                known = [min(len(t.tokens) - 1 - start, self.context) for t, start in zip(texts, begin, strict=True)]
                cache = dataclasses.replace(cache, length=jnp.array(known, jnp.int32))
                logits, cache = self.step(parameters, np.array(newest, np.int32), cache)


def _choose_at_each_place(
    logits: Float[Array, "B T V"],
    texts: Sequence[Text],
    guesses: Sequence[Sequence[int]],
    config: GenerationConfig,
    rule: Rules,
) -> list[list[tuple[int, float]]]:
    """The token at each of the T places of each row, were the guesses before it right, and its log-probability."""
    places = logits.shape[1]
    rows = [(text, ahead[:place]) for text, ahead in zip(texts, guesses, strict=True) for place in range(places)]
    pairs = choose(logits.reshape(len(rows), -1), rows, config, rule)
    return [pairs[start : start + places] for start in range(0, len(pairs), places)]


def choose(
    logits: Float[Array, "R V"], rows: Sequence[tuple[Text, Sequence[int]]], config: GenerationConfig, rule: Rules
) -> list[tuple[int, float]]:
    """The token that follows each text and the guesses after it, and its log-probability."""
    positions = np.array([len(text.tokens) + len(ahead) for text, ahead in rows], np.int32)
    samples = np.array([text.sample for text, _ in rows], np.int32)
    prompts = np.array([text.prompt for text, _ in rows])
    seen = None
    if rule.need_history:
        seen = padded([[*text.tokens, *ahead] for text, ahead in rows], bucket(int(positions.max())))
    tokens, logprobs = choose_token(
        logits, rule, np.int32(config.seed), samples, positions, positions - prompts < config.min_new_tokens, seen
    )
    return list(zip(np.asarray(tokens).tolist(), np.asarray(logprobs).tolist(), strict=True))


def _accept(
    text: Text, chosen: Sequence[tuple[int, float]], guesses: Sequence[int], stop_tokens: Sequence[int]
) -> None:
    """Add tokens as long as each was computed from the right ones before it; end the text where it ends."""
    for place, (token, logprob) in enumerate(chosen):
        if text.finish is not None or (place and guesses[place - 1] != text.tokens[-1]):
            return
        if math.isnan(logprob):
            raise FloatingPointError(NOT_FINITE)
        if token in stop_tokens:
            text.finish = "stop"
            return
        text.tokens.append(token)
        text.logprobs.append(logprob)
        if text.made >= text.limit:
            text.finish = "length"


def guess(tokens: Sequence[int], count: int) -> list[int]:
    """Guess `count` tokens: what followed the last earlier place with the same newest tokens, the more the better."""
    if count == 0:
        return []
    array = np.array(tokens)
    for n in range(min(LONGEST_NGRAM, len(array) - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(array[:-1], n)
        places = np.flatnonzero((windows == array[-n:]).all(axis=1))
        if len(places):
            following = tokens[places[-1] + n : places[-1] + n + count]
            return [*following, *[tokens[-1]] * (count - len(following))]
    return [tokens[-1]] * count


def bucket(length: int, most: int | None = None) -> int:
    """The power of two at or above `length`, but not above `most`: few sizes, so few compilations."""
    size = max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())
    return size if most is None else min(size, most)


def padded(rows: Sequence[Sequence[int]], width: int) -> Int[np.ndarray, "B T"]:
    """The rows as one array, filled up with zeros at the end."""
    array = np.zeros((len(rows), width), np.int32)
    for row, tokens in zip(array, rows, strict=True):
        row[: len(tokens)] = tokens
    return array


def gpt_decoder(config: GPTConfig) -> Decoder:
    """The decoder of a GPT; its parameters are best laid out by `models.gpt.decoding_parameters`."""
    return Decoder(functools.partial(gpt.prefill, config), functools.partial(gpt.decode_step, config), config.context)
