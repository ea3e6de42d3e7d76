"""Language modelling: the loss by hand, bits per byte by the formula, the whole held-out split whatever the batch."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn

from jaxgpt.config import AdaptConfig, DataConfig, GPTConfig, TrainConfig
from jaxgpt.data.shards import prepare
from jaxgpt.models.gpt import GPT, output_head
from jaxgpt.models.losses import unembed
from jaxgpt.tasks import lm
from jaxgpt.tasks.lm import LanguageModelling
from jaxgpt.training.step import evaluate_step
from jaxgpt.training.task import Task

MODEL = GPTConfig(vocab_size=257, context=6, layers=1, heads=2, width=8, unroll=1, init_std=0.3)
TEXT = "".join(f"{n} and {n * n % 11} are {n % 7}. \u00fc" for n in range(60))


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    data = DataConfig(
        path=(str(tmp_path / "text.txt"),), tokenizer="byte", batch_size=4, cache=str(tmp_path / "cache"), held_out=0.2
    )
    return TrainConfig(model=MODEL, data=data, steps=5, sample_tokens=10)


def numbers(*values):
    return [np.array(value) for value in values]


def on_device(batch):
    return jax.tree.map(jnp.asarray, batch)


@pytest.fixture
def task(config):
    return LanguageModelling(config, prepare(config.data))


def parameters_of(task):
    return drawn(lambda key: task.init(key)[0])


def test_it_is_a_task(task):
    assert isinstance(task, Task)


def test_the_loss_is_the_cross_entropy(task):
    parameters = parameters_of(task)
    batch = dict(next(task.batches(0, 1)))
    batch["weights"] = np.random.default_rng(0).uniform(0, 2, batch["weights"].shape).astype(np.float32)
    total, weight = jax.jit(task.loss)(parameters, on_device(batch), None)
    hidden, _ = jax.jit(GPT(MODEL).apply)({"params": parameters}, jnp.asarray(batch["tokens"]))
    logits = np.array(unembed(hidden, output_head(parameters)), np.float64)
    expected = 0.0
    for row in range(4):
        for position in range(6):
            scores = logits[row, position]
            probability = np.exp(scores[batch["targets"][row, position]]) / np.exp(scores).sum()
            expected -= batch["weights"][row, position] * math.log(probability)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(weight, batch["weights"].sum(), rtol=1e-6)


def test_dropout_keys_change_the_loss_and_their_absence_does_not(task):
    model = dataclasses.replace(MODEL, dropout=0.3)
    parameters = parameters_of(task)
    batch = on_device(next(task.batches(0, 1)))
    loss = jax.jit(functools.partial(lm.loss, model, AdaptConfig(), parameters, batch))
    without, _ = loss(None)
    found = [float(loss(jax.random.split(jax.random.key(seed), 4))[0]) for seed in (0, 0, 1)]
    assert float(without) == float(jax.jit(functools.partial(task.loss, parameters, batch))(None)[0])
    assert found[0] == found[1] and len({*found, float(without)}) == 3


def test_the_held_out_loss_does_not_depend_on_the_batch_size(config):
    text, results = prepare(config.data), []
    for size in (3, 7):
        task = LanguageModelling(
            dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=size)), text
        )
        evaluate = jax.jit(functools.partial(evaluate_step, sums=task.evaluation_sums))
        parameters = parameters_of(task)
        sums = [evaluate(parameters, batch) for batch in task.evaluation_batches()]
        results.append(np.sum(np.array(sums, np.float64), axis=0))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)
    assert results[0][1] == len(text.held_out) - 1  # every token but the first


def test_bits_per_byte_are_what_the_text_would_take(task, config):
    """The bits of all held-out tokens over the bytes they stand for."""
    held_out = prepare(config.data).held_out
    metrics = task.evaluation_metrics(numbers(60.0, 40.0), {})
    assert metrics["eval/loss"] == 1.5 and metrics["eval/perplexity"] == pytest.approx(math.exp(1.5))
    assert held_out.bytes == len(TEXT[int(len(TEXT) * 0.8 + 1e-6) :].encode())
    assert metrics["eval/bits_per_byte"] == pytest.approx(1.5 / math.log(2) * len(held_out) / held_out.bytes)
    uniform = task.evaluation_metrics(numbers(math.log(256) * 9, 9.0), {})
    assert uniform["eval/bits_per_byte"] == pytest.approx(8.0)  # bytes: as many tokens as bytes


def test_bits_per_byte_count_bytes_and_not_characters(config):
    """Guessing each of 128 characters equally costs 7 bits a character; a character here is more than a byte."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="character"))
    text = prepare(config.data)
    assert len(text.held_out) < text.held_out.bytes
    bits = LanguageModelling(config, text).evaluation_metrics(numbers(math.log(128) * 9, 9.0), {})["eval/bits_per_byte"]
    assert bits * text.held_out.bytes == pytest.approx(7 * len(text.held_out))


def test_a_hopeless_model_has_a_perplexity_too(task):
    assert math.isfinite(task.evaluation_metrics(numbers(1e6, 1.0), {})["eval/perplexity"])


def test_batches_go_on_where_a_run_stopped(task):
    whole = list(task.batches(0, 6))
    resumed = list(task.batches(4, 6))
    for ours, theirs in zip(resumed, whole[4:], strict=True):
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_sample_is_text_that_the_seed_decides(task):
    parameters = parameters_of(task)
    first = "".join(task.sample(parameters))
    assert first and "".join(task.sample(parameters)) == first


@pytest.mark.parametrize(("held_out", "name"), [(0.001, "held-out split"), (0.999, "training split")])
def test_a_split_shorter_than_one_sequence_is_refused(config, held_out, name):
    data = dataclasses.replace(config.data, held_out=held_out)
    with pytest.raises(ValueError, match=f"the {name} has .* tokens, fewer than the 7"):
        LanguageModelling(dataclasses.replace(config, data=data), prepare(data))
