"""Pretraining as one call: data, task, layout, run folder and loop put together."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxgpt.config import TrainConfig, flatten, from_dict, to_dict
from jaxgpt.data.shards import TokenizedText, prepare
from jaxgpt.environment import keep_freed_memory, use_compilation_cache
from jaxgpt.models.gpt import init_parameters
from jaxgpt.storage.runs import RunFolder, latest_run_path, new_run_path
from jaxgpt.tasks.lm import LanguageModelling
from jaxgpt.training import loop, metrics
from jaxgpt.training.parallel import Layout, choose_layout
from jaxgpt.training.report import Reporter

RUNS = Path("runs")
# What may differ when a run is resumed: budgets, logging, and where it runs. The data is compared by its content.
BUDGETS = ("steps", "max-seconds", "out", "resume")
LOGGING = ("quiet", "tensorboard", "eval-interval", "checkpoint-interval", "log-interval", "sample-tokens")
PLACES = ("data.path", "data.cache", "parallel.strategy", "parallel.devices", "parallel.gradient-accumulation")
FREE_ON_RESUME = frozenset((*BUDGETS, *LOGGING, "sample-prompt", *PLACES))


def run_path(config: TrainConfig, recipe: str) -> Path:
    """The folder a run goes to: `config.out`; else, under runs/, the recipe's latest to resume, or a new one."""
    if config.out is not None:
        return Path(config.out)
    latest = latest_run_path(RUNS, recipe) if config.resume == "latest" else None
    return latest or new_run_path(RUNS, recipe)


def train(
    config: TrainConfig, *, recipe: str = "custom", report: Reporter | None = None
) -> tuple[loop.Outcome, RunFolder]:
    """Pretrain a GPT: text in; a trained model, its checkpoints, a curve and a sample out, all in the run folder.

    Args:
        config: the whole run (see `recipes`).
        recipe: the name it is filed under.
        report: what a person sees (default: nothing).

    Returns:
        How it ended, and the run folder, which `load` reads.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, PermissionError: bad input, found before the first step.
        FloatingPointError, OSError: the run failed; its last checkpoint is good.
    """
    report = report or Reporter()
    use_compilation_cache()
    keep_freed_memory()
    run = RunFolder(run_path(config, recipe))
    resuming = config.resume == "latest" and run.exists()
    if not resuming:
        run.check_free()
    layout = choose_layout(config.parallel, config.data.batch_size)
    text = prepare(config.data, report.say)
    if resuming and run.describe()["data"] != text.fingerprint:
        raise ValueError(f"{run.path} was trained on other data, or with another tokenizer or split, than is given now")
    config = _resolve(config, text)
    task = LanguageModelling(config, text)
    if resuming:
        _check_same_run(run, config)
    else:
        run.create()
    run.describe_as(
        {"task": "language-modelling", "recipe": recipe, "data": text.fingerprint, "config": to_dict(config)}
    )
    text.tokenizer.save(run.tokenizer)
    for line in (*layout.notes, *_announcement(config, text, layout)):
        report.say(line)
    report.begin(config.steps)
    try:
        outcome = loop.train(task, config, run, layout, report)
    finally:
        report.finish()
    return outcome, run


def _resolve(config: TrainConfig, text: TokenizedText) -> TrainConfig:
    """Fill in what follows from the data: the vocabulary size, and paths that hold from any working directory."""
    size, model = text.tokenizer.vocab_size, config.model
    if model.vocab_size is not None and model.vocab_size < size:
        raise ValueError(f"the tokenizer has {size} tokens, more than model.vocab-size {model.vocab_size}")
    paths = tuple(path if path == "-" else os.path.abspath(path) for path in config.data.path)
    named = config.data.tokenizer in ("byte", "character", "bpe")
    tokenizer = config.data.tokenizer if named else os.path.abspath(config.data.tokenizer)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, vocab_size=model.vocab_size or size),
        data=dataclasses.replace(config.data, path=paths, tokenizer=tokenizer),
    )


def _check_same_run(run: RunFolder, config: TrainConfig) -> None:
    """Refuse to resume a run with settings that would make it another."""
    saved = flatten(from_dict(TrainConfig, run.describe()["config"]))
    for key, value in flatten(config).items():
        if key not in FREE_ON_RESUME and value != saved[key]:
            raise ValueError(
                f"{run.path} was trained with {key} {saved[key]}, not {value}; resume it without that flag"
            )


def _announcement(config: TrainConfig, text: TokenizedText, layout: Layout) -> Iterator[str]:
    """What will be trained, on what, where, and about how much memory it takes."""
    model, devices = config.model, len(layout.devices)
    assert model.vocab_size is not None
    shapes = jax.eval_shape(functools.partial(init_parameters, model), jax.random.key(0))
    count = metrics.count_parameters(shapes)
    memory = metrics.estimate_training_bytes(config, count, model.vocab_size, devices)
    yield (
        f"GPT with {count / 1e6:.2f}M parameters ({model.layers} layers x {model.width}, context {model.context}, "
        f"vocabulary {model.vocab_size:,}) on {devices} x {layout.devices[0].device_kind} ({layout.strategy}), "
        f"about {memory / 2**30:.2f} GiB a device"
    )
    epochs = config.steps * config.tokens_per_step / max(1, len(text.train))
    yield (
        f"{len(text.train):,} tokens to train on, {len(text.held_out):,} held out; {config.steps:,} steps of "
        f"{config.tokens_per_step:,} tokens ({epochs:.2g} epochs)"
        + (f", or {config.max_seconds:,.0f} seconds" if config.max_seconds else "")
    )


def summary(outcome: loop.Outcome, run: RunFolder) -> str:
    """The last lines a person sees."""
    if outcome.interrupted:
        return f"stopped at step {outcome.step:,} and saved; go on with --resume --out {run.path}"
    return f"\neverything lies in {run.path}; for more text:\njaxgpt generate --model {run.path} --prompt TEXT"
