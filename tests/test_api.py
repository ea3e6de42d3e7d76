"""The public face: what others wrote is loaded, generation keeps its promises, what is exported comes back."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import api
from jaxgpt.config import GenerationConfig, GPTConfig
from jaxgpt.data.tokenizer import byte_tokenizer
from jaxgpt.models.gpt import init_parameters

GREEDY = GenerationConfig(temperature=0.0)


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


def test_settings_come_as_fields_or_as_changes(model):
    settings = GenerationConfig(max_new_tokens=5, temperature=0.0, stop=("q",))
    assert model.generate("ab", settings) == model.generate("ab", max_new_tokens=5, temperature=0, stop="q")
    with pytest.raises(ValueError, match="unknown key temprature; did you mean temperature"):
        model.generate("ab", temprature=1.0)
    with pytest.raises(ValueError, match="samples is 2; generate_batch returns several"):
        model.generate("ab", samples=2)
    assert len(model.generate_batch(["ab", [1, 2]], samples=2, max_new_tokens=2)) == 4
    assert model.generate_batch([]) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"), ([], "the prompt is empty"), ([257], "token id 257, outside the vocabulary of"),
        ([-1], "token id -1"), (b"ab", "the prompt is bytes"), ("a\udc80", "lone surrogate"),
    ],
)  # fmt: skip
def test_a_prompt_that_is_none_is_refused(model, prompt, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, max_new_tokens=1)


def test_stop_strings_are_refused_with_beams(model):
    with pytest.raises(ValueError, match="stop strings have no meaning with beams"):
        model.generate("ab", beams=2, stop="x", max_new_tokens=1)


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.5}, {"beams": 2}])
def test_a_model_that_is_not_finite_does_not_write(model, changes):
    parameters = jax.tree.map(lambda leaf: leaf * jnp.nan, model.parameters)
    with pytest.raises(FloatingPointError, match="not finite; jaxgpt verify says more"):
        dataclasses.replace(model, parameters=parameters).generate("ab", max_new_tokens=2, **changes)


def test_what_is_exported_comes_back_with_what_stops_it(model, tmp_path):
    model = dataclasses.replace(model, stop_tokens=(256, 10))
    api.export(model, tmp_path / "out")
    again = api.load(tmp_path / "out")
    assert again.stop_tokens == (256, 10) and again.config == dataclasses.replace(model.config, unroll=None)
    jax.tree.map(np.testing.assert_array_equal, again.parameters, model.parameters)
    settings = GenerationConfig(max_new_tokens=6, seed=4)
    assert again.generate("ab", settings) == model.generate("ab", settings)
    with pytest.raises(FileExistsError, match="not empty"):
        api.export(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": None}, "a model of type None"),
        ("config.json", {"vocab_size": 200}, "the tokenizer in .* has ids up to 256, and the embedding only 200 rows"),
        ("generation_config.json", {"eos_token_id": 9999}, "eos_token_id in .* is 9999; it must be an id of the 257"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id in"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused(model, tmp_path, file, change, message):
    api.export(model, tmp_path / "out")
    path = tmp_path / "out" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        api.load(tmp_path / "out")


def test_what_is_no_model_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a run nor a model: it has no config"):
        api.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no model_type"):
        api.load(tmp_path)


def test_bfloat16_on_request(model, tmp_path):
    api.export(model, tmp_path / "out")
    half = api.load(tmp_path / "out", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.parameters)} == {jnp.dtype(jnp.bfloat16)}
    assert len(half.generate("ab", GREEDY, max_new_tokens=3).tokens) == 3


def test_what_is_printed_of_a_model_is_short(model):
    assert len(repr(model)) < 1000 and "257 tokens" in repr(model)


@pytest.mark.parametrize("changes", [{"weights": "int4"}, {"dtype": "float8"}, {"checkpoint": "lst"}])
def test_a_choice_that_there_is_not_is_an_error(model, tmp_path, changes):
    api.export(model, tmp_path / "out")
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"{name} is '{value}'; it must be one of "):
        inspect.unwrap(api.load)(tmp_path / "out", **changes)  # without the check of its annotations, which tests add


def test_weights_in_fewer_bits_are_used_and_not_exported(model, tmp_path):
    api.export(model, tmp_path / "out")
    small = api.load(tmp_path / "out", weights="int8", draft=tmp_path / "out")
    assert small.parameters["token_embedding"]["compact"].dtype == jnp.int8 and "blocks" not in small.parameters
    drawn = small.generate("ab", max_new_tokens=4, seed=2).tokens
    alone = dataclasses.replace(small, draft=None).generate("ab", max_new_tokens=4, seed=2)
    assert drawn == alone.tokens
    with pytest.raises(ValueError, match="laid out for decoding"):
        api.export(small, tmp_path / "again")
