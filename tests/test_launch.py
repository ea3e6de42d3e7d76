"""A run as one call: the run is the same each time, goes on where it stopped, and is never mistaken."""

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest

from jaxgpt import api, launch
from jaxgpt.config import DataConfig, GPTConfig, OptimizerConfig, ParallelConfig, TrainConfig
from jaxgpt.data.shards import prepare
from jaxgpt.storage.checkpoint import Checkpoints
from jaxgpt.tasks.lm import LanguageModelling
from jaxgpt.training.step import evaluate_step

STEPS = 6


def make_config(folder, **changes):
    """The training part of the text says nothing of the held-out part, so the held-out loss only rises."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("a" * 900 + "Z" * 100)
    config = TrainConfig(
        model=GPTConfig(context=8, layers=1, heads=1, width=8, unroll=1),
        data=DataConfig(path=(str(text),), tokenizer="byte", batch_size=4, cache=str(folder / "cache")),
        optimizer=OptimizerConfig(learning_rate=0.05, schedule="constant", warmup_steps=0),
        parallel=ParallelConfig("single"),
        steps=STEPS,
        eval_interval=2,
        sample_tokens=4,
        out=str(folder / "run"),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    config = make_config(folder)
    outcome, run = launch.train(config, recipe="tiny")
    return folder, config, outcome, run


def test_training_leaves_its_description_and_outcome(trained):
    _, config, outcome, run = trained
    assert outcome.step == STEPS and not outcome.interrupted
    description = run.describe()
    assert description["recipe"] == "tiny" and description["config"]["model"]["vocab_size"] == 257
    assert description["config"]["steps"] == config.steps
    records = run.history()
    assert [r["step"] for r in records if "train/loss" in r] == list(range(1, STEPS + 1))
    assert outcome.evaluation == {k: v for k, v in records[-1].items() if k.startswith("eval/")}
    first = next(r["train/loss"] for r in records if "train/loss" in r)
    assert abs(first / math.log(257) - 1) < 0.05
    assert str(run.path) in launch.summary(outcome, run)


@pytest.mark.parametrize("which", ["best", "last"])
def test_the_loaded_model_has_the_loss_its_checkpoint_was_measured_at(trained, which):
    _, config, _, run = trained
    losses = {r["step"]: r["eval/loss"] for r in run.history() if "eval/loss" in r and r["step"]}
    best = min(losses, key=losses.__getitem__)
    assert len(losses) == 3 and best != STEPS, "the test's premise: this run gets worse"
    step = best if which == "best" else STEPS
    loaded = api.load(run.path, checkpoint=which)
    text = prepare(config.data)
    task = LanguageModelling(dataclasses.replace(config, model=loaded.config), text)
    evaluate = jax.jit(functools.partial(evaluate_step, sums=task.evaluation_sums))
    sums = np.sum([evaluate(loaded.parameters, batch) for batch in task.evaluation_batches()], axis=0)
    assert sums[0] / sums[1] == pytest.approx(losses[step], rel=1e-6)


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_ends_a_run_that_gets_no_better(trained, patience):
    """This run's held-out loss only rises: each evaluation is one without a lower loss."""
    folder, config, _, _ = trained
    out = folder / f"patience{patience}"
    patient = dataclasses.replace(config, steps=50, patience=patience, average=2, out=str(out), eval_interval=2)
    stopped = launch.train(patient)[0]
    losses = [r["eval/loss"] for r in launch.RunFolder(out).history() if "eval/loss" in r]
    lowest = losses.index(min(losses))
    assert stopped.step < 50 and len(losses) == lowest + 1 + patience
    before = (out / "metrics.jsonl").read_text()
    again, _ = launch.train(dataclasses.replace(patient, resume="latest"))
    assert again.step == stopped.step and (out / "metrics.jsonl").read_text() == before
    more, _ = launch.train(dataclasses.replace(patient, resume="latest", patience=patience + 1))
    assert more.step > stopped.step


def test_the_mean_of_the_last_checkpoints_is_measured_and_loaded(trained):
    folder, config, _, _ = trained
    out = str(folder / "average")
    _, run = launch.train(dataclasses.replace(config, average=2, out=out))
    (measured,) = [record for record in run.history() if "average/loss" in record]
    assert measured["average/checkpoints"] == 2 and measured["step"] == STEPS
    shapes = jax.eval_shape(lambda: api.load(out, checkpoint="last").parameters)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    checkpoints = Checkpoints(run.checkpoints, read_only=True)
    last = [checkpoints.restore(step, {"parameters": shapes}, device)[0]["parameters"] for step in (4, 6)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *last)
    for loaded in (api.load(out), api.load(out, checkpoint="average")):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), loaded.parameters, mean)


def test_training_is_the_same_each_time_and_goes_on_where_it_stopped(trained):
    folder, config, _, run = trained
    half = dataclasses.replace(config, out=str(folder / "half"), steps=4)
    launch.train(half)
    launch.train(dataclasses.replace(half, steps=STEPS, resume="latest", sample_tokens=0))
    ours, theirs = (api.load(path, checkpoint="last").parameters for path in (folder / "half", run.path))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_resuming_a_finished_run_changes_nothing(trained):
    folder, config, outcome, _ = trained
    done = dataclasses.replace(config, out=str(folder / "done"))
    launch.train(done)
    before = (folder / "done" / "metrics.jsonl").read_text()
    again, _ = launch.train(dataclasses.replace(done, resume="latest"))
    assert again.step == STEPS and again.evaluation == outcome.evaluation
    assert (folder / "done" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "was trained with seed 1337, not 1"),
        (
            {"model": GPTConfig(context=8, layers=2, heads=1, width=8, unroll=1)},
            "was trained with model.layers 1, not 2",
        ),
        ({"optimizer": OptimizerConfig(beta1=0.5)}, "was trained with optimizer."),
    ],
)
def test_a_run_is_not_resumed_as_another(trained, changes, message):
    _, config, _, run = trained
    before = run.config.read_bytes()
    with pytest.raises(ValueError, match=message):
        launch.train(dataclasses.replace(config, resume="latest", **changes))
    assert run.config.read_bytes() == before


def test_a_run_is_not_resumed_on_other_data(trained, tmp_path):
    _, config, _, run = trained
    (tmp_path / "other.txt").write_text("another text entirely. " * 50)
    data = dataclasses.replace(config.data, path=(str(tmp_path / "other.txt"),))
    with pytest.raises(ValueError, match="was trained on other data"):
        launch.train(dataclasses.replace(config, resume="latest", data=data))
    (tmp_path / "moved.txt").write_text((run.path.parent / "text.txt").read_text())
    data = dataclasses.replace(config.data, path=(str(tmp_path / "moved.txt"),))
    outcome, _ = launch.train(dataclasses.replace(config, resume="latest", data=data, sample_tokens=0))
    assert outcome.step == STEPS  # the same text in another place is the same data


def test_a_taken_folder_is_refused_and_left_alone(trained, tmp_path):
    _, config, _, run = trained
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    with pytest.raises(FileExistsError, match="holds another run"):
        launch.train(config)
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not a run"):
        launch.train(dataclasses.replace(config, out=str(tmp_path / "letters")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": GPTConfig(vocab_size=256, context=8, layers=1, heads=1, width=8)},
            "257 tokens, more than model.vocab-size 256",
        ),
        ({"parallel": ParallelConfig(gradient_accumulation=3)}, "gradient-accumulation 3 does not divide"),
        ({"model": GPTConfig(context=512, layers=1, heads=1, width=8)}, "held-out split has"),
    ],
)  # fmt: skip
def test_bad_input_is_found_before_a_folder_is_made(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        launch.train(make_config(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_a_relative_tokenizer_is_found_from_anywhere(trained, tmp_path, monkeypatch):
    _, config, _, run = trained
    monkeypatch.chdir(run.path)
    data = dataclasses.replace(config.data, tokenizer="tokenizer.json")
    config = dataclasses.replace(config, data=data, out=str(tmp_path / "run"), steps=1, sample_tokens=0)
    _, second = launch.train(config)
    monkeypatch.chdir(tmp_path)
    saved = json.loads(second.config.read_text())["config"]["data"]
    assert saved["tokenizer"] == str(run.tokenizer) and saved["path"] == list(config.data.path)
