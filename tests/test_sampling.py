"""Sampling: draws follow the filtered distribution, ties by the lower id, rules as plain Python, rows independent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import GenerationConfig
from jaxgpt.generation.sampling import (
    ban_repeated_ngrams,
    choose_token,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    process_logits,
    row_keys,
    rules,
    sample_token,
)

# Compiled, so that they take NumPy's arrays.
top_k, top_p, min_p = jax.jit(keep_top_k, static_argnums=1), jax.jit(keep_top_p), jax.jit(keep_min_p)
penalize, ban = jax.jit(penalize_repetition), jax.jit(ban_repeated_ngrams, static_argnums=3)
process = jax.jit(process_logits)

TIES = np.array([1.0, 2, 0, 2, -1, 1, 2, 0.5, -3, 0, 1, -8])
PLAIN = GenerationConfig(temperature=1.0)
EVERYTHING = GenerationConfig(
    temperature=0.7, top_k=6, top_p=0.9, min_p=0.02, repetition_penalty=1.4, no_repeat_ngram=2, min_new_tokens=3
)


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def order_of(logits):
    """Ids from the most likely on, the lower id first among equals."""
    return sorted(range(len(logits)), key=lambda token: (-logits[token], token))


def nucleus(logits, p):
    """The ids that top-p keeps, by its definition."""
    probability, kept, total = softmax(logits), [], 0.0
    for token in order_of(logits):
        if kept and total >= p:
            break
        kept.append(token)
        total += probability[token]
    return kept


def only(logits, ids):
    return np.array([value if token in ids else -np.inf for token, value in enumerate(logits)])


def filtered(logits, config):
    """What may be drawn, in plain Python: temperature, top-k, top-p, min-p, each seeing what the last left."""
    logits = logits / config.temperature
    if config.top_k is not None:
        logits = only(logits, order_of(logits)[: config.top_k])
    if config.top_p is not None:
        logits = only(logits, nucleus(logits, config.top_p))
    if config.min_p is not None:
        logits = only(logits, np.flatnonzero(softmax(logits) >= config.min_p * softmax(logits).max() * (1 - 1e-9)))
    return logits


def assert_fair(observed, probability):
    """Pearson's chi-square: what cannot be never is, what can be is as often as it should."""
    assert not observed[probability == 0].any()
    expected = observed.sum() * probability[probability > 0]
    freedom = len(expected) - 1
    statistic = np.sum((observed[probability > 0] - expected) ** 2 / expected)
    assert statistic < freedom + 6 * np.sqrt(2 * freedom) + 1e-9, f"{statistic:.1f} with {freedom} degrees of freedom"


@pytest.mark.parametrize(
    ("change", "size"),
    [
        ({}, 12),
        ({"temperature": 0.5}, 12),
        ({"temperature": 3.0}, 12),
        ({"top_k": 2}, 2),  # 1, 3 of the three equal ones
        ({"top_k": 5}, 5),
        ({"top_k": 1}, 1),
        ({"top_p": 0.35}, 2),
        ({"top_p": 0.8}, 5),
        ({"top_p": 1e-9}, 1),
        ({"min_p": 1.0}, 3),  # all equal ones
        ({"min_p": float(np.exp(-1))}, 6),
        ({"min_p": 0.1}, 9),
        ({"temperature": 1.5, "top_k": 8, "top_p": 0.9, "min_p": 0.4}, 6),
    ],
)
def test_draws_follow_the_filtered_distribution(x64, change, size):
    config = dataclasses.replace(PLAIN, **change)
    allowed = filtered(TIES, config)
    assert np.isfinite(allowed).sum() == size
    samples, positions = (x.ravel().astype(np.int32) for x in np.indices((100, 1000)))
    tokens, logprobs = choose_token(
        jnp.broadcast_to(TIES, (100_000, 12)), rules(config, ()), 7, samples, positions, np.zeros(100_000, bool)
    )
    probability = softmax(allowed)
    assert_fair(np.bincount(tokens, minlength=12), probability)
    np.testing.assert_allclose(logprobs, np.log(softmax(TIES))[tokens], atol=1e-12)
    # The draws at neighbouring positions, and of neighbouring samples, are independent.
    table = np.array(tokens).reshape(100, 1000)
    for first, second in ((table[:, :-1], table[:, 1:]), (table[:-1], table[1:])):
        pairs = np.bincount(first.ravel() * 12 + second.ravel(), minlength=144)
        likely = (probability > 0.03)[:, None] & (probability > 0.03)
        together = np.outer(probability, probability)
        seen = np.append(pairs[likely.ravel()], pairs[~likely.ravel()].sum())
        assert_fair(seen, np.append(together[likely], together[~likely].sum()))


def test_every_key_is_another():
    samples, positions = (jnp.asarray(x.ravel(), jnp.int32) for x in np.indices((40, 60)))
    keys = [jax.random.key_data(row_keys(seed, samples, positions)) for seed in (0, 1)]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 2 * 40 * 60


@pytest.mark.parametrize("k", [1, 3, 8, 100])
def test_exactly_k_are_kept_also_of_equal_ones(k):
    logits = jnp.array([[0.0, 1, 1, 1, 0, 1, -2, 1], [5, 5, 5, 5, 5, 5, 5, 5], [7, 6, 5, 4, 3, 2, 1, 0]])
    for row, kept in zip(np.array(logits), np.array(top_k(logits, k)), strict=True):
        np.testing.assert_array_equal(kept, only(row, order_of(row)[:k]))


@pytest.mark.parametrize("steps", [1, 1000])  # many ties, or none
def test_top_p_is_the_smallest_nucleus(x64, steps):
    random = np.random.default_rng(steps)
    for p in [*random.uniform(0.01, 0.99, 12), 1e-12]:
        logits = np.round(random.normal(size=(20, 30)) * 2 * steps) / steps
        logits[:5, 10:] = -np.inf  # another filter was there before
        for row, kept in zip(logits, np.array(top_p(logits, p)), strict=True):
            np.testing.assert_array_equal(kept, only(row, nucleus(row, p)))


def test_a_probability_of_one_keeps_all_that_can_be(x64):
    logits = jax.random.normal(jax.random.key(0), (50, 200))
    np.testing.assert_array_equal(top_p(logits, 1.0), logits)
    assert rules(GenerationConfig(top_p=1.0), ()).top_p is None


def test_min_p_compares_with_the_most_likely(x64):
    random = np.random.default_rng(0)
    for p in random.uniform(0.001, 1, 20):
        logits = random.normal(size=(20, 30)) * 3
        probability = np.array([softmax(row) for row in logits])
        stays = probability >= p * probability.max(-1, keepdims=True)
        np.testing.assert_array_equal(min_p(logits, p), np.where(stays, logits, -np.inf))
        assert stays.any(-1).all()


def ragged(random, rows, longest, vocabulary):
    """Histories of random lengths, with padding that is none of theirs, and some that repeat themselves."""
    counts = random.integers(1, longest + 1, rows)
    seen = random.integers(0, vocabulary, (rows, longest))
    for row, count in zip(seen, counts, strict=True):
        row[: count - count // 2] = row[count // 2 : count].copy()
    return seen.astype(np.int32), counts.astype(np.int32)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_penalty_is_that_of_the_paper(x64, penalty):
    random = np.random.default_rng(0)
    for longest in (1, 3, 20):
        seen, counts = ragged(random, 40, longest, 23)
        logits = random.normal(size=(40, 23)) * 3
        expected = logits.copy()
        for row, tokens, count in zip(expected, seen, counts, strict=True):
            for token in set(tokens[:count].tolist()):
                row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
        result = penalize(logits, seen, counts, penalty)
        np.testing.assert_allclose(result, expected, rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_ngram_comes_twice(x64, n):
    random = np.random.default_rng(n)
    banned = 0
    for longest, vocabulary in ((1, 3), (2, 3), (3, 2), (8, 3), (20, 4), (30, 23)):
        seen, counts = ragged(random, 40, longest, vocabulary)
        logits = random.normal(size=(40, vocabulary))
        expected = logits.copy()
        for row, padded_tokens, count in zip(expected, seen, counts, strict=True):
            tokens = padded_tokens[:count].tolist()
            there = {tuple(tokens[place : place + n]) for place in range(count - n + 1)}
            if count >= n - 1:
                for token in range(vocabulary):
                    if (*tokens[count - n + 1 :], token) in there:
                        row[token] = -np.inf
        banned += np.isinf(expected).sum()
        np.testing.assert_array_equal(ban(logits, seen, counts, n), expected)
    assert banned > 100


def test_a_stop_token_is_impossible_only_where_it_is_too_early():
    logits = jax.random.normal(jax.random.key(0), (30, 23))
    early = np.random.default_rng(0).random(30) < 0.5
    rule = rules(GenerationConfig(min_new_tokens=4), [3, 17])
    result = np.array(process(logits, rule, None, None, early))
    forbidden = early[:, None] & np.isin(np.arange(23), [3, 17])
    np.testing.assert_array_equal(result, np.where(forbidden, -np.inf, logits))
    # No least number of new tokens: nothing to forbid.
    np.testing.assert_array_equal(process(logits, rules(PLAIN, [3, 17]), None, None, early), logits)


def test_no_forbidden_stop_token_is_drawn():
    logits = jnp.zeros((2000, 4)).at[:, 2].set(9.0)
    early = np.arange(2000) % 2 == 0
    numbers = np.arange(2000, dtype=np.int32)
    for temperature in (0.0, 1.0):
        rule = rules(GenerationConfig(temperature=temperature, min_new_tokens=1), [2])
        tokens, _ = choose_token(logits, rule, 0, numbers, numbers, early)
        assert not (np.array(tokens)[early] == 2).any()
        assert (np.array(tokens)[~early] == 2).mean() > 0.99


def batch(random, rows=24, longest=9):
    """Arguments of `choose_token` after the rules and the seed."""
    seen, counts = ragged(random, rows, longest, 23)
    samples = random.integers(0, 4, rows).astype(np.int32)
    return random.normal(size=(rows, 23)) * 3, samples, counts, random.random(rows) < 0.5, seen


GREEDY = dataclasses.replace(EVERYTHING, temperature=0.0)


@pytest.mark.parametrize("config", [PLAIN, EVERYTHING, GREEDY], ids=["plain", "everything", "greedy"])
def test_the_log_probability_is_the_models_own(x64, config):
    logits, samples, counts, early, seen = batch(np.random.default_rng(0), rows=200)
    tokens, logprobs = choose_token(logits, rules(config, [5, 2]), 0, samples, counts, early, seen)
    assert tokens.dtype == jnp.int32
    for row, token, logprob in zip(logits, tokens, logprobs, strict=True):
        np.testing.assert_allclose(logprob, np.log(softmax(row)[token]), atol=1e-12)


def test_rules_come_in_the_order_of_transformers(x64):
    """Repetition penalty and n-grams before the filters, which so see what is left."""
    logits, samples, counts, early, seen = batch(np.random.default_rng(1), rows=40)
    chosen = []
    for number in range(200):
        tokens, _ = choose_token(logits, rules(EVERYTHING, [5]), 0, samples + 4 * np.int32(number), counts, early, seen)
        chosen.append(np.array(tokens))
    left = np.array(ban(penalize(logits, seen, counts, 1.4), seen, counts, 2))
    for number, row in enumerate(left):
        if early[number]:
            row[5] = -np.inf
        probability = softmax(filtered(row, EVERYTHING))
        drawn = {int(tokens[number]) for tokens in chosen}
        assert drawn <= set(np.flatnonzero(probability))
        assert drawn >= set(np.flatnonzero(probability > 0.1))


def test_greedy_is_argmax_whatever_the_seed():
    logits = jax.random.normal(jax.random.key(0), (64, 20))
    numbers = np.arange(64, dtype=np.int32)
    for seed in range(3):
        rule = rules(GenerationConfig(temperature=0.0, top_k=3, top_p=0.1), ())
        tokens, _ = choose_token(logits, rule, seed, numbers, numbers, np.zeros(64, bool))
        np.testing.assert_array_equal(tokens, logits.argmax(-1))
    keys = jax.random.split(jax.random.key(0), 3)
    np.testing.assert_array_equal(sample_token(jnp.zeros((3, 5)), keys, greedy=True), [0, 0, 0])


def test_a_rows_token_depends_on_no_other_row(x64):
    random = np.random.default_rng(2)
    arguments = batch(random)
    rule = rules(EVERYTHING, [5, 2])

    def choose(rows):
        logits, *others = (x[rows] for x in arguments)
        return [np.array(x) for x in choose_token(logits, rule, 3, *others)]

    tokens, logprobs = choose(np.arange(24))
    for size in (24, 24, 24, 7, 1):
        rows = random.permutation(24)[:size]
        some, theirs = choose(rows)
        np.testing.assert_array_equal(some, tokens[rows])
        np.testing.assert_allclose(theirs, logprobs[rows], atol=1e-12)
    # Other neighbours, also ones that have nothing to say, change nothing either.
    arguments[0][1:] = np.flip(arguments[0][1:], -1)
    assert choose(np.arange(24))[0][0] == tokens[0]
    arguments[0][1:] = 0
    assert choose(np.arange(24))[0][0] == tokens[0]


def test_a_samples_number_decides_its_draw():
    numbers = np.arange(500, dtype=np.int32)
    same = np.zeros(500, np.int32)
    for samples, positions in ((numbers, same), (same, numbers)):
        tokens, _ = choose_token(jnp.zeros((500, 12)), rules(PLAIN, ()), 0, samples, positions, np.zeros(500, bool))
        assert len(np.unique(tokens)) == 12
    tokens, _ = choose_token(jnp.zeros((500, 12)), rules(PLAIN, ()), 0, same, same, np.zeros(500, bool))
    assert len(np.unique(tokens)) == 1


def test_other_numbers_compile_nothing():
    logits, samples, counts, early, seen = batch(np.random.default_rng(3))

    def choose(seed, stop, **changes):
        rule = rules(dataclasses.replace(EVERYTHING, **changes), [stop])
        choose_token(np.float32(logits), rule, np.int32(seed), samples, counts, early, seen)
        return choose_token._cache_size()

    before = choose(0, 5)
    assert choose(1, 6) == before
    assert choose(0, 5, temperature=1.9) == before
    assert choose(0, 5, top_p=0.3, min_p=0.5, repetition_penalty=2.0) == before
    assert choose(0, 5, top_k=7) == before + 1
