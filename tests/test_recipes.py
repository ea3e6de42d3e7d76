"""Recipes: each says how to run it, the sizes are the published ones, nanoGPT's flags are nanoGPT's."""

import inspect
import shlex

import jax
import pytest

from jaxgpt.arguments import parse
from jaxgpt.config import flatten
from jaxgpt.models.gpt import init_parameters
from jaxgpt.recipes import RECIPES, describe, recipe
from jaxgpt.training.metrics import count_parameters

# github.com/karpathy/nanoGPT, README ("only have a macbook"), on top of config/train_shakespeare_char.py.
NANOGPT_CPU = {
    "data.tokenizer": "character",
    "data.held-out": 0.1,
    "data.batch-size": 12,
    "model.context": 64,
    "model.layers": 4,
    "model.heads": 4,
    "model.width": 128,
    "model.dropout": 0.0,
    "model.bias": False,
    "optimizer.name": "adamw",
    "optimizer.schedule": "cosine",
    "optimizer.learning-rate": 1e-3,
    "optimizer.final-learning-rate": 1e-4,
    "optimizer.warmup-steps": 100,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.99,
    "optimizer.weight-decay": 0.1,
    "optimizer.clip-norm": 1.0,
    "parallel.gradient-accumulation": 1,
    "steps": 2000,
    "eval-interval": 250,
    "seed": 1337,
}
NANOGPT_GPU = NANOGPT_CPU | {
    "data.batch-size": 64,
    "model.context": 256,
    "model.layers": 6,
    "model.heads": 6,
    "model.width": 384,
    "model.dropout": 0.2,
    "steps": 5000,
}
# config/train_gpt2.py: 12 sequences x 40 accumulation steps.
NANOGPT_GPT2 = {
    "model.context": 1024,
    "model.vocab-size": 50304,
    "model.bias": False,
    "model.dropout": 0.0,
    "data.batch-size": 480,
    "optimizer.learning-rate": 6e-4,
    "optimizer.final-learning-rate": 6e-5,
    "optimizer.warmup-steps": 2000,
    "optimizer.beta2": 0.95,
    "optimizer.weight-decay": 0.1,
    "optimizer.clip-norm": 1.0,
    "steps": 600_000,
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_docstring_holds_the_command(name):
    commands = [line for line in inspect.getdoc(RECIPES[name]).splitlines() if line.startswith("python train.py")]
    (command,) = commands
    words = shlex.split(command)[2:]
    if name != "default":
        assert words.pop(0) == name
    assert parse(type(recipe(name)), words, prog="train.py", default=recipe(name)).steps == recipe(name).steps
    assert command in describe()


@pytest.mark.parametrize(
    ("name", "flags"),
    [("shakespeare-char-cpu", NANOGPT_CPU), ("shakespeare-char", NANOGPT_GPU), ("gpt2", NANOGPT_GPT2)],
)
def test_nanogpts_recipes_flag_for_flag(name, flags):
    ours = flatten(recipe(name))
    assert {key: ours[key] for key in flags} == flags


@pytest.mark.parametrize(
    ("name", "millions"), [("gpt2", 124), ("gpt2-medium", 355), ("gpt2-large", 774), ("gpt2-xl", 1558)]
)
def test_sizes_are_the_published_ones(name, millions):
    model = recipe(name).model
    shapes = jax.eval_shape(lambda: init_parameters(model, jax.random.key(0)))
    assert abs(count_parameters(shapes) / (millions * 1e6) - 1) < 0.01


def test_larger_gpt2s_differ_in_nothing_but_size():
    small = flatten(recipe("gpt2"))
    for name in ("gpt2-medium", "gpt2-large", "gpt2-xl"):
        differences = {key for key, value in flatten(recipe(name)).items() if value != small[key]}
        assert differences == {"model.layers", "model.heads", "model.width"}


def test_an_unknown_recipe_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="no recipe shakespear-char; did you mean shakespeare-char"):
        recipe("shakespear-char")
