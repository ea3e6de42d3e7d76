"""Decoding: cache, batch, guesses and lengths change nothing; a seed is a text; the window slides when it is full."""

import dataclasses

import jax
import numpy as np
import pytest
from drawn import random_gpt

from jaxgpt.config import GenerationConfig, GPTConfig
from jaxgpt.generation.decode import Text, bucket, gpt_decoder, guess, padded
from jaxgpt.generation.sampling import choose_token, rules
from jaxgpt.models.blocks import decoding_parameters
from jaxgpt.models.gpt import GPT, output_head
from jaxgpt.models.losses import unembed

CONTEXT = 8
MODEL = GPTConfig(
    vocab_size=23, context=CONTEXT, layers=2, heads=2, width=8, unroll=1, init_std=0.5,
    parameter_dtype="float64", compute_dtype="float64",
)  # fmt: skip
GREEDY = GenerationConfig(temperature=0.0)
SAMPLED = GenerationConfig(temperature=1.5, seed=3)


class Model:
    """A GPT, its decoder, and the same from nothing: whole windows, stacked parameters, no cache."""

    def __init__(self, config=MODEL, seed=0):
        stacked = random_gpt(config, seed)
        self.parameters, self.decoder, self.context = decoding_parameters(stacked), gpt_decoder(config), config.context

        @jax.jit
        def all_logits(tokens):
            hidden, _ = GPT(config).apply({"params": stacked}, tokens)
            return unembed(hidden, output_head(stacked))

        self._all_logits = all_logits

    def logits(self, window):
        """Of the token after `window`, recomputed."""
        return np.array(self._all_logits(padded([window], self.context))[0, len(window) - 1])

    def decode(self, prompts, limits, config=GREEDY, stop_tokens=(), samples=None):
        """The texts of a batch, and after how many steps all had ended."""
        samples = samples or [0] * len(prompts)
        texts = [
            Text(list(prompt), len(prompt), limit, sample)
            for prompt, limit, sample in zip(prompts, limits, samples, strict=True)
        ]
        return texts, sum(1 for _ in self.decoder.decode(self.parameters, texts, config, stop_tokens))

    def recomputed(self, prompt, limit, config, stop_tokens=(), sample=0):
        """One text by the definition: logits of the window, the rules, one token; the full window loses a half."""
        text, begin = Text(list(prompt), len(prompt), limit, sample), max(0, len(prompt) - self.context)
        rule = rules(config, stop_tokens)
        while text.finish is None:
            if len(text.tokens) - begin > self.context:
                begin = len(text.tokens) - max(1, self.context // 2)
            position = np.array([len(text.tokens)], np.int32)
            seen = padded([text.tokens], bucket(len(text.tokens))) if rule.need_history else None
            token, logprob = choose_token(
                self.logits(text.tokens[begin:])[None], rule, np.int32(config.seed), np.array([sample], np.int32),
                position, position - len(prompt) < config.min_new_tokens, seen,
            )  # fmt: skip
            if int(token[0]) in stop_tokens:
                text.finish = "stop"
            else:
                text.tokens.append(int(token[0]))
                text.logprobs.append(float(logprob[0]))
                text.finish = "length" if len(text.new) == limit else None
        return text


@pytest.fixture(scope="module")
def model():
    jax.config.update("jax_enable_x64", True)
    yield Model()
    jax.config.update("jax_enable_x64", False)


def assert_same(ours, other):
    assert ours.tokens == other.tokens
    assert (ours.prompt, ours.finish) == (other.prompt, other.finish)
    np.testing.assert_allclose(ours.logprobs, other.logprobs, rtol=0, atol=1e-9)


def random_prompts(random, count, longest):
    return [random.integers(0, 23, random.integers(1, longest + 1)).tolist() for _ in range(count)]


def test_cached_tokens_are_the_uncached_ones(model):
    """Greedy in float64, a ragged batch, up to the end of the context and one token beyond."""
    prompts = [[5], [3, 1, 4], [2, 7, 1, 8, 2, 8, 1], [9, 2], list(range(CONTEXT - 1)), list(range(CONTEXT))]
    texts, _ = model.decode(prompts, [CONTEXT - len(prompt) + 1 for prompt in prompts])
    for prompt, text in zip(prompts, texts, strict=True):
        seen = list(prompt)
        while len(seen) <= CONTEXT:
            seen.append(int(model.logits(seen).argmax()))
        assert text.tokens == seen and text.finish == "length"


MODES = {
    "greedy": GREEDY,
    "temperature": SAMPLED,
    "top-k": dataclasses.replace(SAMPLED, top_k=4),
    "top-p": dataclasses.replace(SAMPLED, top_p=0.8),
    "min-p": dataclasses.replace(SAMPLED, min_p=0.1),
    "repetition penalty": dataclasses.replace(GREEDY, repetition_penalty=1.5),
    "no repeated n-gram": dataclasses.replace(GREEDY, no_repeat_ngram=2),
    "combined": dataclasses.replace(
        SAMPLED, top_k=9, top_p=0.9, min_p=0.02, repetition_penalty=1.2, no_repeat_ngram=3, min_new_tokens=2
    ),
    "least length": dataclasses.replace(SAMPLED, min_new_tokens=5),
    "lookup": dataclasses.replace(GREEDY, lookup=4),
    "lookup, sampled": dataclasses.replace(SAMPLED, lookup=4, top_k=4),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_text_is_the_same_alone_in_a_batch_and_recomputed(model, mode):
    """Ragged prompts and limits, within the context and far beyond: tokens and log-probabilities."""
    random = np.random.default_rng(list(MODES).index(mode))
    config, ends = MODES[mode], set()
    # As many stop tokens in both, for what is compiled.
    for stops, slides in (((4, 7), False), ((4, 4), True)):
        prompts = random_prompts(random, 8, CONTEXT + 2 if slides else CONTEXT - 1)
        samples = random.integers(0, 3, 8).tolist()
        limits = [20 if slides else random.integers(1, CONTEXT + 1 - len(prompt)).item() for prompt in prompts]
        together, _ = model.decode(prompts, limits, config, stops, samples)
        for row, text in enumerate(together):
            alone, _ = model.decode([prompts[row]], [limits[row]], config, stops, [samples[row]])
            assert_same(text, alone[0])
            assert_same(text, model.recomputed(prompts[row], limits[row], config, stops, samples[row]))
            assert not set(text.new) & set(stops)
            assert text.finish == "length" or len(text.new) >= config.min_new_tokens
            ends.add(text.finish)
    assert ends == {"stop", "length"}


@pytest.mark.parametrize("lookup", [1, 2, 3, 5])
def test_guesses_change_no_text(model, lookup):
    """Sampled, once with every rule; within the context, where its end is, and far beyond."""
    random = np.random.default_rng(lookup)
    config = dataclasses.replace(MODES["combined"] if lookup == 2 else SAMPLED, lookup=lookup)
    prompts = random_prompts(random, 8, CONTEXT + 2)
    limits = [min(20, 3 * len(prompt)) for prompt in prompts]
    texts, _ = model.decode(prompts, limits, config, (4, 7))
    for prompt, limit, text in zip(prompts, limits, texts, strict=True):
        assert_same(text, model.recomputed(prompt, limit, config, (4, 7)))


def test_guesses_save_steps_on_a_text_that_repeats():
    """Also where the context ends, behind which nothing may be accepted."""
    jax.config.update("jax_enable_x64", True)
    model = Model(dataclasses.replace(MODEL, context=32))
    prompt = [1, 2, 3] * 3
    for limit in (22, 23, 24, 25, 26):
        plain, steps = model.decode([prompt], [limit])
        guessed, fewer = model.decode([prompt], [limit], dataclasses.replace(GREEDY, lookup=4))
        assert_same(plain[0], guessed[0])
        assert fewer < steps == limit


def test_a_guess_is_what_followed_the_last_same_place():
    random = np.random.default_rng(0)
    found = dict.fromkeys(range(4), 0)
    for _ in range(300):
        tokens = random.integers(0, random.integers(2, 9), random.integers(1, 25)).tolist()
        count = random.integers(0, 6).item()
        expected, used = [], 0
        for n in (3, 2, 1):
            ends = [end for end in range(n, len(tokens)) if tokens[end - n : end] == tokens[-n:]]
            if len(tokens) > n and ends:
                expected, used = tokens[ends[-1] : ends[-1] + count], n
                break
        found[used] += 1
        assert guess(tokens, count) == expected + tokens[-1:] * (count - len(expected))
    assert all(found.values())


@pytest.mark.parametrize("prompt", [[5], list(range(CONTEXT)), list(range(20))])
def test_the_window_slides_to_its_newer_half(model, prompt):
    """Far beyond the context: always what the model says of the window, which loses its older half when full."""
    texts, steps = model.decode([prompt], [4 * CONTEXT])
    seen, window = list(prompt), list(prompt)[-CONTEXT:]
    for token in texts[0].new:
        assert token == model.logits(window).argmax()
        seen.append(token)
        window = seen[-CONTEXT // 2 :] if len(window) == CONTEXT else [*window, token]
    assert len(texts[0].new) == steps == 4 * CONTEXT


def test_after_the_slide_it_is_a_fresh_start(model):
    tokens = model.decode([[5]], [3 * CONTEXT])[0][0].tokens
    half = tokens[CONTEXT + 1 - CONTEXT // 2 : CONTEXT + 1]
    following = tokens[CONTEXT + 1 : CONTEXT + 1 + CONTEXT // 2]
    assert model.decode([half], [CONTEXT // 2])[0][0].new == following


def test_texts_slide_each_at_its_own_time_also_beside_one_that_has_ended(model):
    """In particular beside one that ended with one token more than the context has."""
    prompts = [[3] * length for length in range(1, CONTEXT + 3)]
    for beyond in (0, 1, 2):
        limits = [max(1, CONTEXT + beyond - len(prompt)) for prompt in prompts[1:]]
        texts, _ = model.decode(prompts, [3 * CONTEXT, *limits])
        for prompt, limit, text in zip(prompts, [3 * CONTEXT, *limits], texts, strict=True):
            assert_same(text, model.recomputed(prompt, limit, GREEDY))


def test_a_seed_is_a_text(model):
    def take(count, **changes):
        return model.decode([[1, 2]], [count], dataclasses.replace(SAMPLED, top_k=4, **changes))[0][0].new

    first = take(20)
    assert take(20) == first
    assert take(5) == first[:5]
    assert take(20, seed=8) != first
    assert set(first) <= set(range(23))


def test_samples_differ_and_each_is_itself_alone(model):
    config = dataclasses.replace(SAMPLED, samples=4)
    texts, _ = model.decode([[1, 2]] * 4 + [[3]] * 4, [6] * 8, config, (), [0, 1, 2, 3] * 2)
    assert len({tuple(text.new) for text in texts}) == 8
    for text in texts[1:6]:
        assert_same(text, model.recomputed(text.tokens[: text.prompt], 6, config, (), text.sample))


def test_one_of_the_most_likely_is_the_most_likely(model):
    texts, _ = model.decode([[1, 2]], [5], GenerationConfig(temperature=3.0, top_k=1))
    assert texts[0].new == model.decode([[1, 2]], [5])[0][0].new


def test_two_decodings_at_once_do_not_mix(model):
    texts = [Text(prompt, len(prompt), 12) for prompt in ([1, 2], [9])]
    one, other = (model.decoder.decode(model.parameters, [text], GREEDY, ()) for text in texts)
    assert sum(1 for _ in zip(one, other, strict=True)) == 12
    assert [text.new for text in texts] == [model.decode([prompt], [12])[0][0].new for prompt in ([1, 2], [9])]


def test_a_stop_token_ends_a_text_and_is_not_in_it(model):
    whole = model.decode([[1, 2]], [6], SAMPLED)[0][0]
    for place in range(6):
        text = model.decode([[1, 2]], [6], SAMPLED, (whole.new[place], 99))[0][0]
        end = whole.new.index(whole.new[place])
        assert (text.new, text.finish) == (whole.new[:end], "stop")
        assert text.logprobs == whole.logprobs[:end]


def test_a_text_is_as_long_as_its_limit(model):
    limits = [3, 1, 7, 2, 5, 30, 1, 4]
    texts, steps = model.decode([[token] for token in range(8)], limits, SAMPLED)
    assert [len(text.new) for text in texts] == limits
    assert [len(text.logprobs) for text in texts] == limits
    assert {text.finish for text in texts} == {"length"} and steps == 30


@pytest.mark.parametrize("lookup", [0, 4])
def test_a_text_that_the_caller_ends_disturbs_no_other(model, lookup):
    prompts, config = [[token, 1] for token in range(8)], dataclasses.replace(GREEDY, lookup=lookup)
    texts, ended = [Text(list(prompt), 2, 20) for prompt in prompts], {}
    for step, _ in enumerate(model.decoder.decode(model.parameters, texts, config, ())):
        for row in (0, 3, 4):
            if step == 2 * row:
                texts[row].finish = texts[row].finish or "stop"
                ended[row] = list(texts[row].tokens)
    for row, text in enumerate(texts):
        whole = model.recomputed(prompts[row], 20, GREEDY)
        if row in ended:
            assert text.tokens == ended[row] == whole.tokens[: len(text.tokens)]
        else:
            assert_same(text, whole)
    assert texts[0].finish == "stop"


def test_a_text_that_has_ended_before_gets_nothing(model):
    texts = [Text([1, 2], 2, 5, finish="stop"), Text([1, 2], 2, 5)]
    assert sum(1 for _ in model.decoder.decode(model.parameters, texts, GREEDY, ())) == 5
    assert [len(text.new) for text in texts] == [0, 5]


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.decode([[1], []], [1, 1])


def test_a_context_of_one_token_is_enough(model):
    one = Model(GPTConfig(
        vocab_size=5, context=1, layers=1, heads=1, width=4, unroll=1, init_std=0.5, parameter_dtype="float64",
        compute_dtype="float64",
    ))  # fmt: skip
    for lookup in (0, 2):
        texts, _ = one.decode([[1, 2, 3], [4]], [4, 4], dataclasses.replace(GREEDY, lookup=lookup))
        for text in texts:
            assert_same(text, one.recomputed(text.tokens[: text.prompt], 4, GREEDY))


def test_few_lengths_are_compiled():
    assert [bucket(length) for length in (1, 16, 17, 32, 33, 1000)] == [16, 16, 32, 32, 64, 1024]
    assert bucket(17, 20) == 20 and bucket(5, 20) == 16
    assert all(bucket(length, 100) >= length for length in range(1, 101))
    model = Model(dataclasses.replace(MODEL, layers=1, context=40))
    for length in range(1, 38):
        model.decode([[1] * length], [3])
    assert model.decoder._prefill._cache_size() <= 5  # 16, 32, 40, each with room for as many or the next
    assert model.decoder._step._cache_size() <= 3


def test_equal_prompts_are_read_once(model):
    alone, cache = model.decoder.prefill(model.parameters, [[1, 2, 3], [4]], 3)
    first, together = model.decoder.prefill(model.parameters, [[4], [1, 2, 3], [4]], 3)
    np.testing.assert_allclose(first, alone[np.array([1, 0, 1])], atol=1e-12)
    again = model.decoder.take(cache, np.array([1, 0, 1]))
    for ours, other in zip(jax.tree.leaves(together), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-12)
