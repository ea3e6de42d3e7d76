"""Beam search: the most likely whole texts instead of the most likely next token (Graves 2012, section 3).

The scores, and when to stop, are those of `transformers` (version 5): a finished text scores the sum of its
log-probabilities divided by its new tokens, the stop token included, to the power `length_penalty`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgpt.config import GenerationConfig
from jaxgpt.generation.decode import NOT_FINITE, Decoder, bucket, padded
from jaxgpt.generation.sampling import Rules, process_logits, rules

OUT = -1e9  # the score of what is out of the running


@dataclass(frozen=True)
class Beam:
    """A text: its new tokens, the log-probability of each, and its score: while it grows, their sum."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    score: float

    def extended(self, token: int, total: float) -> Beam:
        """The same with one token more and the sum `total`."""
        return Beam((*self.tokens, token), (*self.logprobs, total - self.score), total)


@dataclass
class Search:
    """The search for one prompt: what is still growing, what has finished, best first."""

    prompt: list[int]
    limit: int
    running: list[Beam]
    finished: list[Beam]
    open: bool = True

    def advance(
        self, candidates: Sequence[tuple[int, int, float]], config: GenerationConfig, stops: Sequence[int]
    ) -> list[int]:
        """Take the best candidates (beam, token, sum), best first; return which beam each running one continues."""
        length = len(self.running[0].tokens) + 1
        beams = [(parent, self.running[parent].extended(token, total)) for parent, token, total in candidates]
        ends = [length == self.limit or beam.tokens[-1] in stops for _, beam in beams]
        for (_, beam), end in list(zip(beams, ends, strict=True))[: config.beams]:
            full = config.early_stopping == "true" and len(self.finished) == config.beams
            if end and not full:
                score = beam.score / length**config.length_penalty
                self.finished.append(Beam(beam.tokens, beam.logprobs, score))
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[: config.beams]
        growing = [pair for pair, end in zip(beams, ends, strict=True) if not end][: config.beams]
        self.open = len(growing) == config.beams and self._can_improve(growing[0][1], config)
        if self.open:
            self.running = [beam for _, beam in growing]
        return [parent for parent, _ in growing]

    def _can_improve(self, best: Beam, config: GenerationConfig) -> bool:
        if len(self.finished) < config.beams:
            return True
        if config.early_stopping == "true":
            return False
        longest = config.early_stopping == "never" and config.length_penalty > 0
        length = self.limit if longest else len(best.tokens)
        return best.score / length**config.length_penalty > self.finished[-1].score


def beam_search(
    decoder: Decoder,
    parameters: Any,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    config: GenerationConfig,
    stop_tokens: Sequence[int],
) -> list[list[Beam]]:
    """The `config.samples` best texts for each prompt, best first, each prompt as it would be alone.

    Args:
        prompts: token ids; each with its limit of new ones must fit the context.
        limits: most new tokens of each prompt.
        stop_tokens: what ends a text; it is the text's last token.

    Raises:
        ValueError: an empty prompt, or more beams than the vocabulary has tokens.
        FloatingPointError: the model's logits are NaN.
    """
    start = [Beam((), (), 0.0)] + [Beam((), (), OUT)] * (config.beams - 1)
    searches = [Search(prompt, limit, list(start), []) for prompt, limit in zip(prompts, limits, strict=True)]
    first, cache = decoder.prefill(parameters, [prompt for prompt in prompts for _ in start], max(limits))
    if config.beams > first.shape[-1]:
        raise ValueError(f"beams is {config.beams}, more than the vocabulary of {first.shape[-1]} tokens")
    logits = first[:, None]
    rule = rules(config, stop_tokens)
    # Enough candidates that, were the best ones all to end, as many could go on.
    count = min(max(2, 1 + len(stop_tokens)) * config.beams, config.beams * logits.shape[-1])
    while True:
        beams = [(search, beam) for search in searches for beam in search.running]
        counts = np.array([len(search.prompt) + len(beam.tokens) for search, beam in beams], np.int32)
        seen = None
        if rule.need_history:
            seen = padded([[*search.prompt, *beam.tokens] for search, beam in beams], bucket(int(counts.max())))
        too_early = np.array([len(beam.tokens) < config.min_new_tokens for _, beam in beams])
        totals, places = _best(
            logits[:, 0], rule, seen, counts, too_early, np.array([beam.score for _, beam in beams]),
            beams=config.beams, count=count,
        )  # fmt: skip
        if np.isnan(totals).any():
            raise FloatingPointError(NOT_FINITE)
        parents, tokens = np.divmod(np.asarray(places), logits.shape[-1])
        rows = np.arange(len(beams))
        for number, search in enumerate(searches):
            if search.open:
                best = zip(
                    parents[number].tolist(), tokens[number].tolist(), np.asarray(totals[number]).tolist(), strict=True
                )
                continues = search.advance(list(best), config, stop_tokens)
                if search.open:
                    rows[number * config.beams : (number + 1) * config.beams] = number * config.beams + np.array(
                        continues
                    )
        if not any(search.open for search in searches):
            return [search.finished[: config.samples] for search in searches]
        newest = [beam.tokens[-1:] or (0,) for search in searches for beam in search.running]  # none: ended at once
        logits, cache = decoder.step(parameters, np.array(newest, np.int32), decoder.take(cache, rows))


@functools.partial(jax.jit, static_argnames=("beams", "count"))
def _best(
    logits: Float[Array, "R V"],
    rule: Rules,
    seen: Int[Array, "R S"] | None,
    counts: Int[Array, " R"],
    too_early: Bool[Array, " R"],
    scores: Float[Array, " R"],
    *,
    beams: int,
    count: int,
) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """Of all continuations of each prompt's beams, the `count` of the greatest sum, and which (beam * V + token)."""
    logprobs = process_logits(jax.nn.log_softmax(logits, axis=-1), rule, seen, counts, too_early)
    totals = (logprobs + scores[:, None].astype(logprobs.dtype)).reshape(-1, beams * logits.shape[-1])
    best, places = jax.lax.top_k(totals, count)
    return best, places
