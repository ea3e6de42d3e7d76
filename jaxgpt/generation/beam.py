"""Beam search: the most likely whole texts instead of the most likely next token (Graves 2012, section 3).

The search is arrays: K running and K finished texts for each of B prompts, which one program, `advance`, makes longer
by a token. Which texts run on and when to stop is as in `transformers` (version 5); a text's score is the sum of its
log-probabilities over `length_divisor`. R are the rows of the model's batch: K running texts a prompt.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgpt.config import GenerationConfig, LengthRule
from jaxgpt.generation.decode import NOT_FINITE, Decoder, bucket, padded
from jaxgpt.generation.sampling import Number, Rules, process_logits, rules
from jaxgpt.models.rows import column_maxima, log_sum_exp, top_k

OUT = -math.inf  # the score of what does not exist; what exists is above it, whatever divides it
FEWEST = 8  # prompts: a smaller batch takes hardly less time, and would have to be compiled


@dataclass(frozen=True)
class Beam:
    """A finished text: its new tokens, the log-probability of each, and its score."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    score: float


@flax.struct.dataclass
class Candidates:
    """For each prompt, C ways to go on: a running text, its next token, that one's log-probability, the sum with it."""

    parent: Int[Array, "B C"]
    token: Int[Array, "B C"]
    logprob: Float[Array, "B C"]
    total: Float[Array, "B C"]

    def best(self, count: int, scores: Float[Array, "B C"]) -> Candidates:
        """The `count` of the greatest scores, best first, which become their `total`."""
        total, places = jax.lax.top_k(scores, count)
        chosen = jax.tree.map(lambda x: jnp.take_along_axis(x, places, axis=1), self)
        return dataclasses.replace(chosen, total=total)


@flax.struct.dataclass
class Texts:
    """For each prompt, K texts, best first; where fewer exist, the others score OUT.

    Their new tokens, `length` of them, begin at the same place of S; before it is the prompt, where a rule needs it.
    The score of a running text is the sum of its log-probabilities.
    """

    tokens: Int[Array, "B K S"]
    logprobs: Float[Array, "B K S"]
    length: Int[Array, "B K"]
    score: Float[Array, "B K"]

    def take(self, places: Int[Array, "B J"]) -> Texts:
        """These texts of each prompt, in this order."""
        return jax.tree.map(lambda x: x[jnp.arange(len(places))[:, None], places], self)

    def extended(self, by: Candidates, place: Int[Array, "B 1"]) -> Texts:
        """The texts with one token more, which comes to `place` of S."""
        old, here = self.take(by.parent), jnp.arange(self.tokens.shape[-1]) == place[..., None]
        tokens = jnp.where(here, by.token[..., None], old.tokens)
        return Texts(tokens, jnp.where(here, by.logprob[..., None], old.logprobs), old.length + 1, by.total)


@flax.struct.dataclass
class Search:
    """The search for B prompts: where what is new begins in S, and how many tokens that may be.

    Where it is not open, it is over: `finished` stays as it is and `running` means nothing.
    """

    running: Texts
    finished: Texts
    begin: Int[Array, " B"]
    limit: Int[Array, " B"]
    open: Bool[Array, " B"]


def length_divisor(rule: LengthRule, length: int | Int[Array, "*shape"], penalty: Number) -> Any:
    """What divides the sum of a text's log-probabilities.

    Args:
        rule: hf, fairseq: length^penalty; wu: ((5 + length) / 6)^penalty (Wu et al. 2016, equation 14).
        length: all new tokens, with the stop token if there is one. By fairseq and wu there is (see `beam_search`), by
            hf not where the text ended at its limit: `transformers` counts the same (`cur_len + 1 -
            decoder_prompt_len`, before `cur_len` counts the newest).
    """
    return ((5.0 + length) / 6.0 if rule == "wu" else length * 1.0) ** penalty


def beam_search(
    decoder: Decoder,
    parameters: Any,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    config: GenerationConfig,
    stop_tokens: Sequence[int],
) -> list[list[Beam]]:
    """The `config.samples` best texts for each prompt, best first, each prompt as it would be alone.

    There are fewer only if no more exist: with few tokens and a small limit, or where the rules forbid all others.
    `config.samples` is at most `config.beams`.

    Args:
        prompts: token ids; each with its limit of new ones must fit the context.
        limits: most new tokens of each prompt, the stop token included; nothing is found for a prompt whose limit is 0,
            which only makes the batch one of a size that is compiled.
        stop_tokens: what ends a text; it is the text's last token. By the length rules fairseq and wu a text that
            reaches its limit ends with the first of them, however unlikely; by hf with any token.

    Raises:
        ValueError: an empty prompt.
        FloatingPointError: the model's logits are NaN.
    """
    rule, stops = rules(config, stop_tokens), np.array(stop_tokens, np.int32)
    logits, cache = decoder.prefill(parameters, prompts, max(limits))
    history = rule.need_history and decoder.prompt_in_cache  # what an encoder has read was not said before
    search = _start([prompt if history else [] for prompt in prompts], limits, config.beams, logits.dtype)
    rows = np.repeat(np.arange(len(prompts)), config.beams)
    logits, cache = logits[rows], decoder.take(cache, rows) if config.beams > 1 else cache
    search = jax.device_put(search, logits.sharding)  # as it will be after a step, or that would be compiled twice
    found: list[list[Beam]] = [[] for _ in prompts]
    numbers = np.arange(len(prompts))  # of the prompts that are in the batch
    for made in range(1, max(limits) + 1):
        search, finite, rows, tokens = advance(
            search, logits, rule, stops, float(config.length_penalty), config.min_new_tokens,
            length_rule=config.length_rule, early_stopping=config.early_stopping,
        )  # fmt: skip
        if made < max(limits):  # begun before it is known whether it is needed, so that nothing waits for the answer
            cache = decoder.take(cache, rows) if config.beams > 1 else cache
            logits, cache = decoder.step(parameters, tokens, cache)
            logits = logits[:, 0]
        is_open, is_finite = jax.device_get((search.open, finite))
        if not is_finite:
            raise FloatingPointError(NOT_FINITE)
        going = np.flatnonzero(is_open)
        size = max(FEWEST, 1 << (len(going) - 1).bit_length())  # a power of two, so that few programs are compiled
        if len(going) == 0 or size <= len(is_open) // 4:
            for place in np.flatnonzero(~is_open[: len(numbers)]).tolist():
                found[numbers[place]] = _beams(search, place, config.samples)
            if len(going) == 0:
                break
            numbers, groups = numbers[going], np.resize(going, size)
            search, logits, rows = _keep(search, logits, groups, len(going))
            cache = decoder.take(cache, rows, groups)
    return found


def _start(prompts: Sequence[Sequence[int]], limits: Sequence[int], beams: int, dtype: Any) -> Search:
    """One running text for each prompt, without a new token; the prompts are empty if no rule needs them."""
    width = bucket(max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)))
    score = jnp.full((len(prompts), beams), OUT, jnp.promote_types(dtype, jnp.float32))
    tokens, length = np.repeat(padded(prompts, width)[:, None], beams, axis=1), jnp.zeros(score.shape, jnp.int32)
    finished = Texts(jnp.array(tokens), jnp.zeros(tokens.shape, score.dtype), length, score)
    running = dataclasses.replace(finished, score=score.at[:, 0].set(0.0))
    begin = jnp.array([len(prompt) for prompt in prompts], jnp.int32)
    return Search(running, finished, begin, jnp.array(limits, jnp.int32), jnp.array(limits) > 0)


@functools.partial(jax.jit, static_argnames=("length_rule", "early_stopping"))
def advance(
    search: Search,
    logits: Float[Array, "R V"],
    rule: Rules,
    stops: Int[Array, " n"],
    penalty: Number,
    min_new_tokens: int | Int[Array, ""],
    *,
    length_rule: LengthRule,
    early_stopping: str,
) -> tuple[Search, Bool[Array, ""], Int[Array, " R"], Int[Array, "R 1"]]:
    """Make all texts a token longer: of the best K those that end are finished, and the best K that do not run on.

    Returns:
        The new search, whether no logits that matter are NaN, and for each running text, each row of the model's
        next batch, the row that it continues and its new token.
    """
    old, beams = search.running, search.finished.score.shape[1]
    length = old.length[:, :1] + 1
    last, place = length >= search.limit[:, None], search.begin[:, None] + length - 1
    forced = last if length_rule != "hf" and len(stops) else jnp.zeros_like(last)
    new, finite = _candidates(search, logits, rule, stops, length <= min_new_tokens, forced)

    def ends(these: Candidates) -> Bool[Array, "B C"]:
        return last | jnp.any(these.token[..., None] == stops, axis=-1)

    best = new.best(beams, new.total)
    scores = best.total / length_divisor(length_rule, length, penalty).astype(best.total.dtype)
    ended = best.best(beams, jnp.where(ends(best) & search.open[:, None], scores, OUT))
    both = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), search.finished, old.extended(ended, place))
    finished = both.take(jax.lax.top_k(both.score, beams)[1])
    going = new.best(beams, jnp.where(ends(new), OUT, new.total))
    running = old.extended(going, place)

    # What the best running text could score, were all to come certain: the more divides a negative sum, the better.
    longest = search.limit if early_stopping == "never" else length[:, 0]
    reach = jnp.where(penalty > 0, longest, length[:, 0])
    bound, worst = running.score[:, 0] / length_divisor(length_rule, reach, penalty), finished.score[:, -1]
    better = worst == OUT if early_stopping == "true" else bound > worst
    is_open = search.open & better & (running.score[:, 0] > OUT)
    rows = jnp.arange(len(last), dtype=jnp.int32)[:, None] * old.score.shape[1] + going.parent
    new_search = Search(running, finished, search.begin, search.limit, is_open)
    return new_search, finite, rows.ravel(), going.token.reshape(-1, 1)


def _candidates(
    search: Search,
    logits: Float[Array, "R V"],
    rule: Rules,
    stops: Int[Array, " n"],
    too_early: Bool[Array, "B 1"],
    forced: Bool[Array, "B 1"],
) -> tuple[Candidates, Bool[Array, ""]]:
    """The best ways to go on from each text, and whether no logits that matter are NaN.

    Args:
        too_early, forced: where no stop token may come, and where only the first may.
    """
    running, count = search.running, search.finished.score.shape[1] + len(stops)
    batch, texts = running.score.shape
    logits = logits.astype(running.score.dtype)
    few = min(count, logits.shape[-1])
    given, maxima = logits, column_maxima(logits, few)
    total = log_sum_exp(logits, maxima)  # makes log-probabilities; subtracted where few are left, if it can be
    if rule.repetition_penalty is not None:  # which changes the sizes of log-probabilities
        logits, total = logits - total, jnp.where(jnp.isnan(total), total, 0.0)
    seen = running.tokens.reshape(batch * texts, -1) if rule.need_history else None
    counts = (search.begin[:, None] + running.length).ravel()
    allowed = process_logits(logits, rule, seen, counts, jnp.repeat(too_early, texts))
    # The best K + n of each row are enough, for K of them do not end the text. If there are fewer tokens, some are OUT.
    best, tokens = top_k(allowed, few, maxima if allowed is given else None)
    beyond = ((0, 0), (0, count - best.shape[-1]))
    best, tokens = jnp.pad(best - total, beyond, constant_values=OUT), jnp.pad(tokens, beyond)
    if len(stops):
        rows, first = jnp.repeat(forced, texts)[:, None], jnp.arange(count) == 0
        best = jnp.where(rows, jnp.where(first, logits[:, stops[0], None] - total, OUT), best)
        tokens = jnp.where(rows, stops[0], tokens)
    exists = (running.score > OUT)[..., None]
    sums = jnp.where(exists, running.score[..., None] + best.reshape(batch, texts, count), OUT)
    parent = jnp.broadcast_to(jnp.arange(texts, dtype=jnp.int32)[:, None], sums.shape)
    unknown = jnp.isnan(total).reshape(batch, texts, 1) & exists & search.open[:, None, None]
    return Candidates(*(x.reshape(batch, -1) for x in (parent, tokens, best, sums))), ~jnp.any(unknown)


@jax.jit
def _keep(
    search: Search, logits: Float[Array, "R V"], prompts: Int[Array, " G"], count: int | Int[Array, ""]
) -> tuple[Search, Float[Array, "r V"], Int[Array, " r"]]:
    """The search for these prompts, the logits of their rows, and those rows.

    Prompts from `count` on only fill up the batch.
    """
    kept = jax.tree.map(lambda x: x[prompts], search)
    beams = search.running.score.shape[1]
    rows = (prompts[:, None] * beams + jnp.arange(beams)).ravel()
    return dataclasses.replace(kept, open=kept.open & (jnp.arange(len(prompts)) < count)), logits[rows], rows


def _beams(search: Search, number: int, count: int) -> list[Beam]:
    """The best finished texts of one prompt."""
    best, begin = [np.asarray(x)[number, :count] for x in jax.tree.leaves(search.finished)], search.begin[number]
    return [
        Beam(tuple(tokens[begin:][:length].tolist()), tuple(logprobs[begin:][:length].tolist()), float(score))
        for tokens, logprobs, length, score in zip(*best, strict=True)
        if score > OUT
    ]
