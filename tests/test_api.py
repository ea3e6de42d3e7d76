"""The public face: what others wrote is loaded, generation keeps its promises, what is exported comes back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import api
from jaxgpt.config import GenerationConfig, GPTConfig
from jaxgpt.data.tokenizer import byte_tokenizer
from jaxgpt.models.gpt import init_parameters

GREEDY = GenerationConfig(temperature=0.0)


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    """Somewhere harmless for compiled programs, and the setting as it was afterwards."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def model_with(context=16, **changes):
    """A model with random weights and the byte tokenizer."""
    config = GPTConfig(vocab_size=257, context=context, layers=1, heads=1, width=8, unroll=1, init_std=0.5, **changes)
    return api.LanguageModel(config, init_parameters(config, jax.random.key(0)), byte_tokenizer(), (256,))


@pytest.fixture(scope="module")
def model():
    return model_with()


def test_a_seed_is_a_text(model):
    settings = GenerationConfig(max_new_tokens=8, temperature=1.0, seed=3)
    first = model.generate("ab", settings)
    assert model.generate("ab", settings) == first
    assert model.generate("ab", settings, seed=4) != first
    assert "".join(model.stream("ab", settings)) == first.text == model.tokenizer.decode(first.tokens)
    assert len(first.logprobs) == 8 and max(first.logprobs) <= 0
    assert first.prompt == "ab" and len(first.tokens) == 8 and first.finish_reason == "length"


def test_text_beyond_the_context_is_refused_by_how_much(model):
    assert len(model.generate("a" * 10, GREEDY, max_new_tokens=6).tokens) == 6  # exactly full
    with pytest.raises(ValueError, match="10 prompt tokens and 9 new ones are 3 more than the context of 16"):
        model.generate("a" * 10, GREEDY, max_new_tokens=9)


def test_truncating_drops_the_oldest(model):
    whole = model.generate("xyz" + "a" * 40, GREEDY, max_new_tokens=30, truncate="left")
    assert len(whole.tokens) == 30
    assert whole.tokens == model.generate("a" * 16, GREEDY, max_new_tokens=30, truncate="left").tokens


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.generate("", max_new_tokens=1)


def test_a_model_stops_at_the_end_of_the_text():
    """A model made to say one thing: an ordinary token for ever, or end-of-text at once."""
    quiet = model_with()
    direction = np.zeros(8, np.float32)
    direction[0] = 1
    for favourite, reason, tokens in [(256, "stop", ()), (65, "length", (65, 65, 65))]:
        parameters = jax.tree.map(jnp.zeros_like, quiet.parameters)
        parameters["final_norm"]["bias"] = jnp.array(direction)
        table = parameters["token_embedding"]["embedding"]
        parameters["token_embedding"]["embedding"] = table.at[favourite].set(10 * direction)
        generated = dataclasses.replace(quiet, parameters=parameters).generate("b", GREEDY, max_new_tokens=3)
        assert (generated.finish_reason, generated.tokens) == (reason, tokens)
        assert generated.text == "A" * len(tokens)
