"""What every task prepares from its config before a run can begin."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import jax

from jaxgpt.config import (
    OWN_OF_A_RUN,
    ChatConfig,
    ConversationsConfig,
    ExamplesConfig,
    FinetuneConfig,
    GPTConfig,
    GPTRunConfig,
    PairsConfig,
    RunConfig,
)
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.storage.runs import RunFolder
from jaxgpt.tasks.published import Pretrained
from jaxgpt.training.metrics import count_parameters
from jaxgpt.training.parallel import Layout
from jaxgpt.training.task import Task


@dataclass(frozen=True)
class Prepared:
    """A task that is ready to run."""

    task: Task
    config: RunConfig
    """with everything filled in that follows from the data"""
    tokenizer: Tokenizer
    data_fingerprint: str
    """a digest of the data, of its split and of how it becomes tokens"""
    announcement: Callable[[Layout], Iterable[str]]
    """what is trained, on what, where: lines for a person"""
    base: str | None = None
    """the fingerprint of the model that the run begins with"""
    conclude: Callable[[RunFolder, Callable[[str], None]], None] = lambda run, say: None
    """what is made and shown once a run has come to its end"""


Data = TypeVar("Data", ExamplesConfig, ConversationsConfig, PairsConfig)
Epochs = TypeVar("Epochs", FinetuneConfig, ChatConfig)


def with_vocabulary(model_size: int | None, tokenizer: Tokenizer) -> int:
    """V: the model's own if it is set, else the tokenizer's.

    Raises:
        ValueError: the tokenizer has more tokens than the model.
    """
    if model_size is not None and model_size < tokenizer.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, more than model.vocab-size {model_size}")
    return model_size or tokenizer.vocab_size


def base_tokenizer(name: str, base: Pretrained) -> Tokenizer:
    """The tokenizer of the model that a run begins with.

    Args:
        name: what `data.tokenizer` says; anything but its default is another tokenizer.

    Raises:
        ValueError: another is asked for.
    """
    if name != "bpe":
        raise ValueError(f"data.tokenizer is {name}, but the model of init-from goes on with its own tokenizer")
    return base.tokenizer


def adopted(model: GPTConfig, base: Pretrained | None) -> GPTConfig:
    """The base's architecture, with this run's dropout and ways to compute; without a base, the run's own."""
    if base is None:
        return model
    return dataclasses.replace(base.config, **{name: getattr(model, name) for name in OWN_OF_A_RUN})


def absolute(path: str | None) -> str | None:
    """A folder's path from the root, so that it is found from anywhere; a name on the hub as it is."""
    return os.path.abspath(path) if path is not None and os.path.isdir(path) else path


def located(data: Data) -> Data:
    """The same data, its files named from the root."""
    return dataclasses.replace(
        data,
        path=tuple(map(os.path.abspath, data.path)),
        validation=tuple(map(os.path.abspath, data.validation)),
        tokenizer=data.tokenizer if data.tokenizer == "bpe" else os.path.abspath(data.tokenizer),
    )


def describe_gpt(config: GPTRunConfig, task: Task, layout: Layout) -> str:
    """What is trained, from what, where: a line for a person."""
    model = config.model
    trained, frozen = map(count_parameters, jax.eval_shape(task.init, jax.random.key(0)))
    share = f"of which {trained / 1e6:.3g}M are trained " if frozen else ""
    return (
        f"GPT with {(trained + frozen) / 1e6:.2f}M parameters {share}({model.layers} layers x {model.width}, context "
        f"{model.context}, vocabulary {model.vocab_size:,}), {config.init_from or 'from scratch'}, on "
        f"{len(layout.devices)} x {layout.devices[0].device_kind} ({layout.strategy})"
    )


def with_epochs(config: Epochs, batches: int) -> Epochs:
    """The config with its epochs turned into steps, and evaluations an epoch into steps between them."""
    if config.epochs is not None:
        config = dataclasses.replace(config, steps=max(1, math.ceil(config.epochs * batches)))
    if config.evaluations is not None:
        config = dataclasses.replace(config, eval_interval=max(1, math.ceil(batches / config.evaluations)))
    return config
