"""Decoding: cache, batch, guesses and lengths change nothing; a seed is a text; the window slides when it is full."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxgpt.config import GenerationConfig, GPTConfig
from jaxgpt.generation.decode import Text, gpt_decoder, padded
from jaxgpt.generation.sampling import choose_token, rules
from jaxgpt.models.gpt import GPT, decoding_parameters, init_parameters, output_head
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
        stacked = init_parameters(config, jax.random.key(seed))
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
            seen = padded([text.tokens], 32) if rule.need_history else None
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
    "least length, greedy": dataclasses.replace(GREEDY, min_new_tokens=5),
    "lookup 1": dataclasses.replace(GREEDY, lookup=1),
    "lookup 3": dataclasses.replace(GREEDY, lookup=3),
    "lookup 5, sampled": dataclasses.replace(SAMPLED, lookup=5, top_k=3),
    "lookup 2, combined": dataclasses.replace(
        SAMPLED, lookup=2, top_k=3, repetition_penalty=1.2, no_repeat_ngram=2, min_new_tokens=3
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_text_is_the_same_alone_in_a_batch_and_recomputed(model, mode):
    """Ragged prompts, ragged limits, stop tokens: tokens and log-probabilities, whatever is beside them."""
    random = np.random.default_rng(list(MODES).index(mode))
    config, ends = MODES[mode], set()
    # Within the context, then beyond it; as many stop tokens in both, for what is compiled.
    for stops, slides in (((4, 7), False), ((4, 4), True)):
        prompts = random_prompts(random, 8, CONTEXT + 2 if slides else CONTEXT - 1)
        prompts[5], samples = prompts[4], [0, 1, 2, 0, 0, 1, 2, 0]
        limits = [20 if slides else random.integers(1, CONTEXT + 1 - len(prompt)).item() for prompt in prompts]
        together, _ = model.decode(prompts, limits, config, stops, samples)
        for row, text in enumerate(together):
            alone, _ = model.decode([prompts[row]], [limits[row]], config, stops, [samples[row]])
            assert_same(text, alone[0])
            assert_same(text, model.recomputed(prompts[row], limits[row], config, stops, samples[row]))
            assert not set(text.new) & set(stops)
            ends.add(text.finish)
    assert ends == {"stop", "length"}
