"""Decoding: the cache changes nothing, a seed is a text, the window slides when the context is full."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import GPTConfig, SamplingConfig
from jaxgpt.generation.decode import Decoder
from jaxgpt.models.gpt import GPT, init_cache, init_parameters, next_token_logits, output_head
from jaxgpt.models.losses import unembed

CONTEXT = 8
MODEL = GPTConfig(
    vocab_size=23, context=CONTEXT, layers=2, heads=2, width=8, unroll=1, init_std=0.5,
    parameter_dtype="float64", compute_dtype="float64",
)  # fmt: skip
GREEDY = SamplingConfig(temperature=0.0)


@pytest.fixture(scope="module")
def model():
    """Parameters, a decoder and the whole model without a cache, all in float64."""
    jax.config.update("jax_enable_x64", True)
    parameters = init_parameters(MODEL, jax.random.key(0))
    decoder = Decoder(functools.partial(next_token_logits, MODEL), functools.partial(init_cache, MODEL, 1))

    @jax.jit
    def all_logits(tokens):
        hidden, _ = GPT(MODEL).apply({"params": parameters}, tokens)
        return unembed(hidden, output_head(parameters))

    def logits(window):
        """Of the token after `window`, recomputed from nothing."""
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(window)] = window
        return np.array(all_logits(padded)[0, len(window) - 1])

    yield parameters, decoder, logits
    jax.config.update("jax_enable_x64", False)


def take(model, prompt, count, sampling=GREEDY):
    parameters, decoder, _ = model
    return list(itertools.islice(decoder.tokens(parameters, prompt, sampling), count))


@pytest.mark.parametrize("prompt", [[5], [3, 1, 4], [2, 7, 1, 8, 2, 8, 1], [1, 2, 3, 4, 5, 6, 7, 8]])
def test_cached_tokens_are_the_uncached_ones(model, prompt):
    """Greedy in float64, up to the end of the context and one token beyond."""
    seen = list(prompt)
    for token in take(model, prompt, CONTEXT - len(prompt) + 1):
        assert token == model[2](seen).argmax()
        seen.append(token)


@pytest.mark.parametrize("prompt", [[5], list(range(CONTEXT)), list(range(20))])
def test_the_window_slides_to_its_newer_half(model, prompt):
    """Far beyond the context: always what the model says of the window, which loses its older half when full."""
    tokens = take(model, prompt, 4 * CONTEXT)
    seen, window = list(prompt), list(prompt)[-CONTEXT:]
    for token in tokens:
        assert token == model[2](window).argmax()
        seen.append(token)
        window = seen[-CONTEXT // 2 :] if len(window) == CONTEXT else [*window, token]
    assert len(tokens) == 4 * CONTEXT


def test_after_the_slide_it_is_a_fresh_start(model):
    tokens = [5, *take(model, [5], 3 * CONTEXT)]
    half = tokens[CONTEXT + 1 - CONTEXT // 2 : CONTEXT + 1]
    following = tokens[CONTEXT + 1 : CONTEXT + 1 + CONTEXT // 2]
    assert take(model, half, CONTEXT // 2) == following


def test_a_seed_is_a_text(model):
    sampling = SamplingConfig(temperature=1.0, top_k=10, seed=7)
    first = take(model, [1, 2], 20, sampling)
    assert take(model, [1, 2], 20, sampling) == first
    assert take(model, [1, 2], 5, sampling) == first[:5]
    assert take(model, [1, 2], 20, SamplingConfig(temperature=1.0, top_k=10, seed=8)) != first
    assert set(first) <= set(range(23))


def test_one_of_the_most_likely_is_the_most_likely(model):
    assert take(model, [1, 2], 5, SamplingConfig(temperature=3.0, top_k=1)) == take(model, [1, 2], 5)


def test_two_texts_at_once_do_not_mix(model):
    parameters, decoder, _ = model
    one, other = (decoder.tokens(parameters, prompt, GREEDY) for prompt in ([1, 2], [9]))
    mixed = [(next(one), next(other)) for _ in range(12)]
    assert [list(tokens) for tokens in zip(*mixed, strict=True)] == [take(model, [1, 2], 12), take(model, [9], 12)]


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="the prompt is empty"):
        take(model, [], 1)


def test_a_context_of_one_token_is_enough():
    config = GPTConfig(vocab_size=5, context=1, layers=1, heads=1, width=4, unroll=1)
    parameters = init_parameters(config, jax.random.key(0))
    decoder = Decoder(functools.partial(next_token_logits, config), functools.partial(init_cache, config, 1))
    tokens = list(itertools.islice(decoder.tokens(parameters, [1, 2, 3], GREEDY), 4))
    assert len(tokens) == 4 and isinstance(tokens[0], int)
    assert jnp.isfinite(jnp.array(tokens)).all()
