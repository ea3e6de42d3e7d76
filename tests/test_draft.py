"""A draft model changes no text: greedy or drawn, in a batch, beyond the context; and a good one saves steps."""

import dataclasses

import jax
import numpy as np
import pytest
from drawn import random_gpt
from test_api import model_with
from test_decode import MODEL, MODES, Model, assert_same, random_prompts

from jaxgpt.config import GenerationConfig
from jaxgpt.generation.decode import Text, gpt_decoder
from jaxgpt.generation.draft import Draft
from jaxgpt.models.blocks import decoding_parameters
from jaxgpt.models.gpt import init_parameters


@pytest.fixture(scope="module")
def model():
    jax.config.update("jax_enable_x64", True)
    yield Model()
    jax.config.update("jax_enable_x64", False)


def decode(model, draft, prompts, limits, config, samples):
    texts = [Text(list(p), len(p), limit, n) for p, limit, n in zip(prompts, limits, samples, strict=True)]
    steps = sum(1 for _ in model.decoder.decode(model.parameters, texts, config, (4, 7), draft))
    return texts, steps


@pytest.mark.parametrize(("mode", "context"), [("greedy", 6), ("combined", 11)])
def test_it_changes_no_text(model, mode, context):
    """A stranger whose context is shorter or longer, ragged prompts, windows that slide."""
    random = np.random.default_rng(context)
    config = dataclasses.replace(MODES[mode], draft_tokens=3)
    other = dataclasses.replace(MODEL, context=context, layers=1)
    parameters = decoding_parameters(random_gpt(other, 5))
    prompts, samples, limits = random_prompts(random, 4, 9), [0, 1, 0, 2], random.integers(3, 15, 4).tolist()
    draft = Draft(gpt_decoder(other), parameters, config, (4, 7))
    ours, steps = decode(model, draft, prompts, limits, config, samples)
    alone, most = decode(model, None, prompts, limits, config, samples)
    for text, other_text in zip(ours, alone, strict=True):
        assert_same(text, other_text)
    assert steps <= most


@pytest.mark.parametrize("mode", ["greedy", "temperature"])
def test_the_model_itself_is_always_right(model, mode):
    config = dataclasses.replace(MODES[mode], draft_tokens=2, min_new_tokens=7)
    draft = Draft(model.decoder, model.parameters, config, (4, 7))
    (text,), steps = decode(model, draft, [[3]], [7], config, [1])
    assert text.made == 7 and steps == 3, "one token of the prompt's logits, then three a step"


def test_through_the_public_face():
    model = model_with()
    draft = dataclasses.replace(model, parameters=init_parameters(model.config, jax.random.key(1)))
    settings = GenerationConfig(max_new_tokens=9, temperature=1.0, stop=("q",), draft_tokens=2)
    both = dataclasses.replace(model, draft=draft)
    ours, alone = (one.generate_batch(["ab", "x"], settings, samples=2) for one in (both, model))
    assert [(text.tokens, text.text, text.finish_reason) for text in ours] == [
        (text.tokens, text.text, text.finish_reason) for text in alone
    ]
    assert "".join(both.stream("ab", settings)) == model.generate("ab", settings).text
    with pytest.raises(ValueError, match="one of them guesses ahead"):
        both.generate("ab", settings, lookup=2)
    with pytest.raises(ValueError, match="no meaning with beams"):
        both.generate("ab", beams=2)
    with pytest.raises(ValueError, match="has room for 14"):
        both.generate("ab", settings, draft_tokens=15)


def test_another_vocabulary_is_refused():
    other = model_with()
    config = dataclasses.replace(other.config, vocab_size=300)
    with pytest.raises(ValueError, match="another tokenizer"):
        dataclasses.replace(model_with(), draft=dataclasses.replace(other, config=config))
