"""Translating many sentences: each as it would be alone, in the order they came in, never longer than its limit."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn

from jaxgpt.config import GenerationConfig, TransformerConfig
from jaxgpt.generation import translate
from jaxgpt.generation.translate import translate_tokens, translation_decoder
from jaxgpt.models.losses import unembed
from jaxgpt.models.transformer import Transformer, decoding_parameters, init_parameters, output_head

END, VOCABULARY, CONTEXT = 11, 12, 16
SEED = 26  # of the weights: one with which texts are of different lengths
MODEL = TransformerConfig(
    vocab_size=VOCABULARY, context=CONTEXT, heads=2, width=8, hidden=16, encoder_layers=1, decoder_layers=1,
    dropout=0.0, unroll=1, init_std=1.0, norm="pre", parameter_dtype="float64", compute_dtype="float64",
)  # fmt: skip
GREEDY = GenerationConfig(early_stopping="true")
BEAMS = GenerationConfig(beams=3, samples=2, length_penalty=0.6)


@pytest.fixture(scope="module", autouse=True)
def float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module")
def model(float64):
    """Random weights, not trained; the end token is likely now and then."""
    parameters = drawn(functools.partial(init_parameters, MODEL), SEED, 0.7)
    parameters["decoder"]["final_norm"]["bias"] *= 0.1  # so that what comes depends on what was, and no token is sure
    return parameters


@pytest.fixture(scope="module")
def decoder():
    return translation_decoder(MODEL, END)


def random_sources(seed: int, count: int, longest: int = CONTEXT - 1) -> list[list[int]]:
    """One word, the longest there may be, and everything between, in no order."""
    rng = np.random.default_rng(seed)
    sizes = [1, longest, *rng.integers(1, longest + 1, count - 2)]
    return [rng.integers(0, VOCABULARY - 1, size).tolist() for size in rng.permutation(sizes)]


@jax.jit
def _uncached(model, read, mask, target):
    hidden = Transformer(MODEL).apply({"params": model}, read, mask, target)
    return unembed(hidden, output_head(model))


def uncached_logits(model, source, said):
    """Logits (T, V) by the uncached model: it reads the source with its end token, and a target that begins with it."""
    read, target = (np.zeros((1, CONTEXT), np.int32) for _ in range(2))  # one shape, so that it is compiled once
    read[0, : len(source) + 1], target[0, : len(said)] = [*source, END], [END, *said[:-1]]
    return np.array(_uncached(model, read, np.arange(CONTEXT)[None] <= len(source), target))[0, : len(said)]


def translations(decoder, model, sources, config=GREEDY, **settings):
    return translate_tokens(decoder, decoding_parameters(model), sources, config, END, **settings)


def assert_same(ours, theirs):
    for beams, others in zip(ours, theirs, strict=True):
        assert [beam.tokens for beam in beams] == [beam.tokens for beam in others]
        np.testing.assert_allclose([b.score for b in beams], [b.score for b in others], atol=1e-9)


@pytest.mark.parametrize("config", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_each_sentence_is_translated_as_if_alone_and_in_its_place(decoder, model, config):
    sources = random_sources(1, 16)
    alone = [translations(decoder, model, [source], config)[0] for source in sources]
    assert len({beams[0].tokens for beams in alone}) > 3  # so that a wrong place shows
    for batch_size in (1, 4, 64):
        assert_same(translations(decoder, model, sources, config, batch_size=batch_size), alone)
    order = np.random.default_rng(2).permutation(len(sources)).tolist()
    shuffled = translations(decoder, model, [sources[n] for n in order], config, batch_size=4)
    assert_same(shuffled, [alone[n] for n in order])


def test_equal_sentences_get_equal_translations(decoder, model):
    sources = random_sources(3, 4)
    once, thrice = (translations(decoder, model, sources * n, BEAMS, batch_size=8) for n in (1, 3))
    assert_same(thrice, once * 3)


def test_no_sentence_is_no_translation(decoder, model):
    assert translations(decoder, model, []) == []


def test_as_many_translations_as_asked_for_best_first(decoder, model):
    sources = random_sources(4, 5)
    for samples in (1, 3):
        config = dataclasses.replace(BEAMS, samples=samples)
        for beams in translations(decoder, model, sources, config):
            assert len(beams) == samples == len({beam.tokens for beam in beams})
            assert [beam.score for beam in beams] == sorted((beam.score for beam in beams), reverse=True)


def test_a_greedy_translation_takes_the_likeliest_token_after_what_it_said(decoder, model):
    sources = random_sources(5, 5)
    for source, (beam,) in zip(sources, translations(decoder, model, sources), strict=True):
        logprobs = np.array(jax.nn.log_softmax(uncached_logits(model, source, beam.tokens)))
        assert beam.tokens == tuple(logprobs.argmax(axis=1).tolist())
        np.testing.assert_allclose(beam.logprobs, logprobs.max(axis=1), atol=1e-9)


def test_only_what_was_said_is_not_said_again(decoder, model):
    """What the encoder read does not count: each token is the likeliest that the translation does not have yet."""
    config, again = dataclasses.replace(GREEDY, no_repeat_ngram=1), 0
    sources = random_sources(7, 12)
    for source, (beam,) in zip(sources, translations(decoder, model, sources, config), strict=True):
        logits = uncached_logits(model, source, beam.tokens)
        for place, token in enumerate(beam.tokens):
            logits[place, list(beam.tokens[:place])] = -np.inf
            assert token == logits[place].argmax()
        again += bool(set(source) & set(beam.tokens))
    assert again > 3


def test_more_translations_than_beams_are_refused(decoder, model):
    with pytest.raises(ValueError, match="samples is 3, more than beams 1"):
        translations(decoder, model, [[1]], dataclasses.replace(GREEDY, samples=3))


def test_a_translation_ends_with_the_end_token_or_at_its_limit(decoder, model):
    sources = random_sources(6, 24, longest=6)
    ended = set()
    for asked in (None, 1, 5, 1_000):
        config = GenerationConfig(early_stopping="true", max_new_tokens=asked)
        for source, (beam,) in zip(sources, translations(decoder, model, sources, config), strict=True):
            rule = translate.TOKENS_PER_TOKEN * (len(source) + 1) + translate.MORE_TOKENS
            limit = min(CONTEXT, asked or rule)
            assert END not in beam.tokens[:-1] and 1 <= len(beam.tokens) <= limit
            assert beam.tokens[-1] == END or len(beam.tokens) == limit
            ended.add((asked, beam.tokens[-1] == END))
    assert ended >= set(itertools.product((None, 5, 1_000), (True, False)))


def test_a_short_source_has_a_short_limit():
    """In a context that leaves room for more than the rule."""
    model = dataclasses.replace(MODEL, context=64)
    parameters = init_parameters(model, jax.random.key(0))
    # The end token is the one that never comes.
    embedding = parameters["token_embedding"]["embedding"].at[:, 0].set(0).at[END].set(0)
    parameters |= {"token_embedding": {"embedding": embedding}}
    sources = random_sources(7, 4, longest=30)
    config = GenerationConfig(early_stopping="true", min_new_tokens=64)
    found = translate_tokens(translation_decoder(model, END), parameters, sources, config, END)
    for source, (beam,) in zip(sources, found, strict=True):
        assert len(beam.tokens) == min(64, 2 * (len(source) + 1) + 10)


def test_a_model_gone_wrong_is_said(decoder, model):
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, model)
    with pytest.raises(FloatingPointError, match="not finite"):
        translations(decoder, broken, [[1, 2]])
