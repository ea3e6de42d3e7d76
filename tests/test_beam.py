"""Beam search: the best of all texts where it can see all of them, scores that are what they say, ragged batches."""

import dataclasses
import functools
import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn

from jaxgpt.config import GenerationConfig, GPTConfig
from jaxgpt.generation.beam import beam_search, length_divisor
from jaxgpt.generation.decode import Decoder, Text, gpt_decoder, padded
from jaxgpt.models.blocks import decoding_parameters
from jaxgpt.models.cache import KVCache
from jaxgpt.models.gpt import GPT, init_parameters, output_head
from jaxgpt.models.losses import unembed

WORDS = 3  # the tokens that are at all likely; so nine beams can hold all texts of two
STOPS = (4, 10)  # tokens that come now and then
CONTEXT = 16
MODEL = GPTConfig(
    vocab_size=12, context=CONTEXT, layers=2, heads=2, width=8, unroll=1, init_std=0.5, tied_head=False,
    parameter_dtype="float64", compute_dtype="float64",
)  # fmt: skip


class Model:
    """A GPT, its decoder, and the log-probabilities of whole texts from the uncached model."""

    def __init__(self, words=None):
        stacked = drawn(functools.partial(init_parameters, MODEL), 1)
        stacked["final_norm"]["bias"] *= 0.2  # so that what comes depends on what was, and no token is sure
        if words is not None:  # one hidden number is always one, and is a hundred less for every other token
            norm = stacked["final_norm"]
            stacked["final_norm"] = {"scale": norm["scale"].at[0].set(0), "bias": norm["bias"].at[0].set(1)}
            stacked["head"] = stacked["head"].at[:, 0].set(jnp.where(jnp.arange(12) < words, 0, -100))
        self.parameters, self.decoder = decoding_parameters(stacked), gpt_decoder(MODEL)

        @jax.jit
        def log_softmax(tokens):
            hidden, _ = GPT(MODEL).apply({"params": stacked}, tokens)
            return jax.nn.log_softmax(unembed(hidden, output_head(stacked)))

        self._log_softmax = log_softmax

    def logprobs(self, prompt, tokens):
        """Of each new token."""
        text = [*prompt, *tokens]
        table = np.array(self._log_softmax(padded([text], CONTEXT))[0])
        return [table[place - 1, text[place]] for place in range(len(prompt), len(text))]

    def search(self, prompts, limits, stop_tokens=(), **settings):
        config = GenerationConfig(**settings)
        return beam_search(self.decoder, self.parameters, prompts, limits, config, stop_tokens)


@pytest.fixture(scope="module", autouse=True)
def float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module")
def model(float64):
    return Model()


@pytest.fixture(scope="module")
def narrow(float64):
    return Model(WORDS)


def all_texts(limit, stops, words=WORDS):
    """Every text that ends at a stop token, which is its last, or at the limit."""
    for length in range(1, limit + 1):
        for tokens in itertools.product(range(words), repeat=length):
            ends = tokens[-1] in stops or length == limit
            if ends and not set(tokens[:-1]) & set(stops):
                yield tokens


def ranked(model, prompt, texts, penalty):
    """(score, text), best first."""
    return sorted(((sum(model.logprobs(prompt, t)) / len(t) ** penalty, t) for t in texts), reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("stops", [(), (1,), (0, 2)])
def test_enough_beams_find_the_best_of_all_texts(narrow, penalty, stops):
    """Three likely tokens, up to three steps, nine beams: nothing likely is ever dropped."""
    prompts, limits = [[5], [1, 2, 0, 7], [9, 9, 3]], [3, 2, 3]
    found = narrow.search(prompts, limits, stops, beams=9, samples=2, length_penalty=penalty)
    for prompt, limit, beams in zip(prompts, limits, found, strict=True):
        expected = ranked(narrow, prompt, all_texts(limit, stops), penalty)[:2]
        assert [beam.tokens for beam in beams] == [tokens for _, tokens in expected]
        np.testing.assert_allclose([beam.score for beam in beams], [score for score, _ in expected], atol=1e-9)


def test_two_steps_of_as_many_beams_as_tokens_see_all_texts(model):
    found = model.search([[5], [1, 2, 3]], [2, 2], beams=12, samples=12, length_penalty=0.0)
    for prompt, beams in zip([[5], [1, 2, 3]], found, strict=True):
        expected = ranked(model, prompt, all_texts(2, (), words=12), 0.0)
        assert [beam.tokens for beam in beams] == [tokens for _, tokens in expected[:12]]


def random_prompts(random, count):
    return [random.integers(0, 12, random.integers(1, 9)).tolist() for _ in range(count)]


VARIANTS = [
    {"beams": 2, "samples": 2},
    {"beams": 5, "samples": 5, "early_stopping": "true"},
    {"beams": 4, "samples": 4, "early_stopping": "never", "length_penalty": 2.0},
    {"beams": 4, "samples": 4, "length_penalty": 0.0, "min_new_tokens": 4},
    {"beams": 3, "samples": 3, "length_rule": "wu", "length_penalty": 0.6, "early_stopping": "true"},
    {"beams": 14, "samples": 9, "length_rule": "fairseq", "early_stopping": "never"},
    {"beams": 4, "samples": 3, "length_penalty": -1.0, "no_repeat_ngram": 2, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("settings", VARIANTS)
def test_a_prompt_is_searched_as_if_alone(model, settings, monkeypatch):
    random = np.random.default_rng(0)
    prompts, limits = random_prompts(random, 6), [7, 3, 5, 2, 6, 7]
    monkeypatch.setattr("jaxgpt.generation.beam.FEWEST", 1)  # so that this batch shrinks
    together = model.search(prompts, limits, STOPS, **settings)
    for prompt, limit, beams in zip(prompts, limits, together, strict=True):
        alone = model.search([prompt], [limit], STOPS, **settings)[0]
        assert [beam.tokens for beam in beams] == [beam.tokens for beam in alone]
        np.testing.assert_allclose([b.score for b in beams], [b.score for b in alone], atol=1e-9)


def test_a_search_may_end_at_its_first_step_beside_others(model):
    """By its limit, or because all of its best candidates are stop tokens."""
    prompts, limits, stops = [[1, 2], [3], [4, 5, 6]], [1, 4, 1], ()
    for early in ("false", "true"):
        together = model.search(prompts, limits, stops, beams=2, samples=2, early_stopping=early)
        for prompt, limit, beams in zip(prompts, limits, together, strict=True):
            alone = model.search([prompt], [limit], stops, beams=2, samples=2, early_stopping=early)[0]
            assert [beam.tokens for beam in beams] == [beam.tokens for beam in alone]
        stops, limits = tuple(beam.tokens[0] for beam in together[0]), [4, 4, 4]


@pytest.mark.parametrize("settings", VARIANTS[:6])
def test_scores_are_sums_of_log_probabilities_over_the_divisor(model, settings):
    random, ends = np.random.default_rng(1), set()
    prompts, least = random_prompts(random, 6), settings.get("min_new_tokens", 0)
    rule, penalty = settings.get("length_rule", "hf"), settings.get("length_penalty", 1.0)
    for prompt, beams in zip(prompts, model.search(prompts, [6] * 6, STOPS, **settings), strict=True):
        assert len(beams) == settings["samples"]
        assert len({beam.tokens for beam in beams}) == len(beams)
        assert [beam.score for beam in beams] == sorted((beam.score for beam in beams), reverse=True)
        for beam in beams:
            logprobs = model.logprobs(prompt, beam.tokens)
            np.testing.assert_allclose(beam.logprobs, logprobs, atol=1e-9)
            np.testing.assert_allclose(
                beam.score, sum(logprobs) / length_divisor(rule, len(beam.tokens), penalty), atol=1e-9
            )
            ended = beam.tokens[-1] in STOPS
            assert ended or (len(beam.tokens) == 6 and rule == "hf")
            assert not set(beam.tokens[:-1]) & set(STOPS) and len(beam.tokens) > least
            ends.add(ended)
    assert True in ends and (False in ends or settings.get("early_stopping") == "true" or rule != "hf")


def test_samples_are_the_first_of_the_beams(model):
    all_of_them = model.search([[1, 2]], [5], STOPS, beams=6, samples=6)[0]
    for samples in (1, 3):
        assert model.search([[1, 2]], [5], STOPS, beams=6, samples=samples)[0] == all_of_them[:samples]


def test_one_beam_is_greedy(model):
    prompts = random_prompts(np.random.default_rng(2), 6)
    for stops, early in (((), "false"), (STOPS, "true")):
        texts = [Text(list(prompt), len(prompt), 6) for prompt in prompts]
        for _ in model.decoder.decode(model.parameters, texts, GenerationConfig(temperature=0.0), stops):
            pass
        for text, beams in zip(texts, model.search(prompts, [6] * 6, stops, early_stopping=early), strict=True):
            tokens = list(beams[0].tokens)
            assert (tokens[:-1] if tokens[-1] in stops else tokens) == text.new
            np.testing.assert_allclose(beams[0].logprobs[: len(text.new)], text.logprobs, atol=1e-9)


def test_a_prompt_without_a_limit_only_fills_the_batch(model):
    prompts = random_prompts(np.random.default_rng(8), 3)
    alone = model.search(prompts, [5, 3, 6], STOPS, beams=3, samples=2)
    filled = model.search([*prompts, prompts[0], [1]], [5, 3, 6, 0, 0], STOPS, beams=3, samples=2)
    assert filled[3:] == [[], []]
    for ours, theirs in zip(filled, alone, strict=False):
        assert [beam.tokens for beam in ours] == [beam.tokens for beam in theirs]


def test_more_beams_find_no_worse_text_than_greedy_on_the_whole(model):
    prompts = random_prompts(np.random.default_rng(3), 12)
    one, many = (model.search(prompts, [6] * 12, beams=beams, length_penalty=0.0) for beams in (1, 6))
    gains = [ours[0].score - other[0].score for ours, other in zip(many, one, strict=True)]
    assert np.mean(gains) > 0.1 and min(gains) > -0.5


def test_early_stopping_ends_with_enough_texts_and_never_goes_on(model):
    """`true` takes the first texts that end; `never` the best that there can be, so no worse ones."""
    prompts = random_prompts(np.random.default_rng(4), 8)
    scores, lengths = {}, {}
    for early in ("true", "false", "never"):
        found = model.search(prompts, [7] * 8, STOPS, beams=3, early_stopping=early, length_penalty=1.5)
        scores[early] = np.array([beams[0].score for beams in found])
        lengths[early] = np.mean([len(beams[0].tokens) for beams in found])
    assert (scores["never"] >= scores["false"] - 1e-12).all() and (scores["false"] >= scores["true"] - 1e-12).all()
    assert (scores["never"] > scores["true"] + 1e-6).any()
    assert lengths["never"] >= lengths["true"]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_ngram_comes_twice(model, n):
    random = np.random.default_rng(5)
    prompts = [random.permutation(12)[:size].tolist() for size in (2, 4, 1, 3)]
    repeated = 0
    for forbid in (None, n):
        for prompt, beams in zip(
            prompts, model.search(prompts, [7] * 4, beams=3, samples=3, no_repeat_ngram=forbid), strict=True
        ):
            for beam in beams:
                text = [*prompt, *beam.tokens]
                ngrams = [tuple(text[place : place + n]) for place in range(len(text) - n + 1)]
                repeated += len(set(ngrams)) < len(ngrams)
                assert forbid is None or len(set(ngrams)) == len(ngrams)
    assert repeated or n == 3


def test_what_cannot_be_searched_is_refused(model):
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.search([[1], []], [3, 3], beams=2)


def test_the_search_fills_the_context_to_its_end(model):
    prompt = [1, 2, 3, 4, 5, 6, 7, 0, 9, 10, 11, 1, 2]
    for beam in model.search([prompt], [CONTEXT - len(prompt)], beams=4, samples=4)[0]:
        assert len(beam.tokens) == 3
        np.testing.assert_allclose(beam.logprobs, model.logprobs(prompt, beam.tokens), atol=1e-9)


def test_a_model_that_is_not_finite_is_refused(model):
    parameters = jax.tree.map(lambda x: x * jnp.nan, model.parameters)
    with pytest.raises(FloatingPointError, match="not finite"):
        beam_search(model.decoder, parameters, [[1], [2]], [3, 3], GenerationConfig(beams=2), STOPS)


@flax.struct.dataclass
class ToyCache(KVCache):
    """A number for what each row has seen; and, as an encoder-decoder's, a number for each prompt, kept once."""

    state: jax.Array
    source: jax.Array

    def take(self, rows, groups=None):
        source = self.source if groups is None else self.source[groups]
        return dataclasses.replace(self, length=self.length[rows], state=self.state[rows], source=source)


class Toy:
    """A model that is a table: what may come after each of SEEN numbers, for each of SOURCES kinds of prompt."""

    SOURCES, SEEN = 3, 97

    def __init__(self, random, vocabulary):
        table = random.normal(0, 1.5, (self.SOURCES, self.SEEN, vocabulary))
        self.table = table - np.log(np.exp(table).sum(-1, keepdims=True))
        self.vocabulary, self.sizes, self.decoder = vocabulary, [], Decoder(self.prefill, self.step, 64)
        take = self.decoder.take

        def spy(cache, rows, groups=None):
            self.sizes += [] if groups is None else [len(groups)]
            return take(cache, rows, groups)

        self.decoder.take = spy

    def after(self, state, token):
        return (state * 31 + token + 1) % self.SEEN

    def prefill(self, parameters, tokens, lengths, capacity):
        state = jnp.zeros(len(tokens), jnp.int32)
        for place in range(tokens.shape[1]):
            state = jnp.where(place < lengths, self.after(state, tokens[:, place]), state)
        source = state % self.SOURCES
        return parameters[source, state], ToyCache((), (), lengths, capacity, state=state, source=source)

    def step(self, parameters, tokens, cache):
        state = self.after(cache.state, tokens[:, 0])
        source = jnp.repeat(cache.source, len(state) // len(cache.source))
        return parameters[source, state][:, None], dataclasses.replace(cache, state=state)

    def search(self, prompts, limits, stops, **settings):
        return beam_search(self.decoder, jnp.array(self.table), prompts, limits, GenerationConfig(**settings), stops)

    def logprobs(self, prompt, text):
        """Of the tokens that may follow."""
        state = source = 0
        for place, token in enumerate((*prompt, *text)):
            state = self.after(state, token)
            source = state % self.SOURCES if place == len(prompt) - 1 else source
        return self.table[source, state]

    def plain_search(self, prompt, limit, stops, beams, rule, penalty, early):
        """Beam search by the book, one prompt, one list; `early` may be "exhausted": go on while there is anything."""
        running, finished = [(0.0, ())], []
        for length in range(1, limit + 1):
            options = []
            for total, text in running:
                logprobs = self.logprobs(prompt, text)
                forced = rule != "hf" and stops and length == limit
                tokens = stops[:1] if forced else range(self.vocabulary)
                options += [(total + logprobs[token], (*text, token)) for token in tokens]
            options.sort(reverse=True)
            ended = {text for _, text in options if length == limit or text[-1] in stops}
            divisor = length_divisor(rule, length, penalty)
            finished += [(total / divisor, text) for total, text in options[:beams] if text in ended]
            finished = sorted(finished, reverse=True)[:beams]
            running = [option for option in options if option[1] not in ended][:beams]
            if not running or (len(finished) == beams and early == "true"):
                break
            if len(finished) == beams and early == "false" and running[0][0] / divisor <= finished[-1][0]:
                break
        return finished


def assert_found(found, expected):
    assert [beam.tokens for beam in found] == [text for _, text in expected]
    np.testing.assert_allclose([beam.score for beam in found], [score for score, _ in expected], atol=1e-9)


@pytest.mark.parametrize("rule", ["hf", "fairseq", "wu"])
@pytest.mark.parametrize("seed", range(2))
def test_the_search_is_exact_where_nothing_is_dropped(float64, rule, seed):
    """As many beams as there are texts, also more than tokens: all texts there are, in order."""
    random = np.random.default_rng(seed)
    toy = Toy(random, int(random.integers(2, 5)))
    penalty = float(random.choice([-1, 0, 0.6, 1, 2]))
    stops = tuple(random.permutation(toy.vocabulary)[: random.integers(0, toy.vocabulary)].tolist())
    prompts = [random.integers(0, toy.vocabulary, size).tolist() for size in (1, 3, 2)]
    limits = random.integers(1, 5, 3).tolist()
    beams = toy.vocabulary ** max(limits)
    settings = {"beams": beams, "samples": beams, "length_rule": rule, "length_penalty": penalty}
    found = toy.search(prompts, limits, stops, early_stopping="never", **settings)
    for prompt, limit, ours in zip(prompts, limits, found, strict=True):
        texts = list(all_texts(limit, stops, toy.vocabulary))
        if rule != "hf" and stops:
            texts = [text for text in texts if text[-1] == stops[0] or (text[-1] in stops and len(text) < limit)]
        sums = [sum(toy.logprobs(prompt, text[:place])[text[place]] for place in range(len(text))) for text in texts]
        divisors = [length_divisor(rule, len(text), penalty) for text in texts]
        assert_found(ours, sorted(zip(np.divide(sums, divisors), texts, strict=True), reverse=True))


@pytest.mark.parametrize("rule", ["hf", "fairseq", "wu"])
@pytest.mark.parametrize("early", ["true", "false", "never"])
def test_the_search_is_the_one_by_the_book(float64, rule, early):
    """With penalties of each sign. Where `early` is never, what is found is what going on to the end finds."""
    random = np.random.default_rng([len(rule), len(early)])
    toy = Toy(random, int(random.integers(4, 9)))
    stops = tuple(random.permutation(toy.vocabulary)[: random.integers(1, 4)].tolist())
    count, beams = int(random.integers(3, 9)), int(random.integers(1, 7))
    prompts = [random.integers(0, toy.vocabulary, random.integers(1, 6)).tolist() for _ in range(count - 1)]
    prompts, limits = [*prompts, prompts[0]], random.integers(1, 12, count).tolist()  # one is there twice
    for penalty in (-1.5, 0.0, 0.6, 2.0):
        settings = {"beams": beams, "samples": beams, "length_rule": rule, "length_penalty": penalty}
        found = toy.search(prompts, limits, stops, early_stopping=early, **settings)
        for prompt, limit, ours in zip(prompts, limits, found, strict=True):
            whole = "exhausted" if early == "never" else early
            assert_found(ours, toy.plain_search(prompt, limit, stops, beams, rule, penalty, whole))


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_that_shrinks_finds_the_same(float64, beams, monkeypatch):
    """What the model keeps once for each prompt moves with its prompt."""
    random = np.random.default_rng(beams)
    toy, count = Toy(random, 7), int(random.integers(33, 60))
    prompts = [random.integers(0, 7, random.integers(1, 6)).tolist() for _ in range(count)]
    search = (prompts, (random.permutation(count) + 1).tolist(), (0,))
    settings = {"beams": beams, "samples": beams, "length_rule": "wu", "early_stopping": "never"}
    found, sizes = [], []
    for fewest in (1, 4, count):
        monkeypatch.setattr("jaxgpt.generation.beam.FEWEST", fewest)
        toy.sizes.clear()
        found.append(toy.search(*search, **settings))
        sizes.append(list(toy.sizes))
    assert found[0] == found[1] == found[2]
    assert len(sizes[0]) > len(sizes[1]) > len(sizes[2]) == 0
    assert all(size.bit_count() == 1 for size in sizes[0])


def test_a_forced_end_comes_also_where_it_is_too_early(float64):
    toy = Toy(np.random.default_rng(0), 6)
    for text in toy.search([[1, 2]], [4], (3, 5), beams=4, samples=4, length_rule="wu", min_new_tokens=4)[0]:
        assert len(text.tokens) == 4 and text.tokens[-1] == 3 and not {3, 5} & set(text.tokens[:-1])


def test_float32_scores_are_those_of_float64(float64):
    random = np.random.default_rng(7)
    toy = Toy(random, 40)
    prompts, config = [[3, 1], [7]], GenerationConfig(beams=4, samples=4, length_rule="wu", early_stopping="never")
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.1)):
        rough = beam_search(toy.decoder, jnp.array(toy.table, dtype), prompts, [9, 9], config, (0,))
        exact = beam_search(toy.decoder, jnp.array(toy.table), prompts, [9, 9], config, (0,))
        for ours, theirs in zip(rough, exact, strict=True):
            np.testing.assert_allclose([t.score for t in ours], [t.score for t in theirs], atol=tolerance)
