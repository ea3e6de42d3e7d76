"""Classifiers that are read back, from a run or from an exported folder, and exported."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from jaxgpt.config import TASKS, Dtype, FinetuneConfig, require
from jaxgpt.data.special_tokens import SPECIAL_TOKENS, SPECIALS, pad_token, with_special_tokens, without_special_tokens
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.models.blocks import Parameters
from jaxgpt.models.heads import HEAD
from jaxgpt.storage.huggingface import SCORE, classifier_from_hf, classifier_to_hf
from jaxgpt.storage.leaves import by_path
from jaxgpt.storage.runs import RunFolder
from jaxgpt.storage.weights import export_tensors, open_weights, read_json
from jaxgpt.tasks.published import load_whole, tokenizer_config, write_published
from jaxgpt.tasks.trained import Trained, Which, load_trained


@runtime_checkable
class Tuned(Protocol):
    """A fine-tuned GPT with its head: a `Classifier`, or what `load_classifier` returns."""

    @property
    def config(self) -> FinetuneConfig:
        """Of the run, with the vocabulary and the labels resolved."""

    @property
    def parameters(self) -> Parameters:
        """With any adapter folded in."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Without the special tokens."""


def is_classifier(path: str | os.PathLike[str]) -> bool:
    """Whether a classifier lies at `path`: a fine-tuning run, or one that was exported."""
    run = RunFolder(Path(path))
    if not run.exists():
        return False
    described = read_json(run.config)
    if "model_type" in described:
        return classifier_from_hf(described, str(run.config)) is not None
    return TASKS.get(str(described.get("task"))) is FinetuneConfig


def load_classifier(
    path: str | os.PathLike[str], checkpoint: Which | None = None, dtype: Dtype | None = None, base: str | None = None
) -> Trained[FinetuneConfig]:
    """Read a fine-tuning run (see `load_trained`), or a folder that `write_classifier` wrote.

    Raises:
        FileNotFoundError: neither lies at `path`.
        ValueError: a run of another task, another model, or a damaged file.
    """
    run = RunFolder.at(path)
    described = read_json(run.config)
    if "model_type" not in described:
        return load_trained(run, FinetuneConfig, checkpoint, dtype, base)
    config = classifier_from_hf(described, str(run.config))
    if config is None:
        raise ValueError(
            f"{run.path} is no classifier of jaxgpt's; to make one of it: "
            f"python train.py finetune --init-from {run.path}"
        )
    found = load_whole(run.path, described, dtype or "float32")
    score = open_weights(run.path, score=True).get(SCORE)
    wanted = (config.outputs, found.config.width)
    if score is None or score.shape != wanted:
        has = "none" if score is None else f"one of the shape {score.shape}"
        raise ValueError(f"{run.path} must have a tensor {SCORE} of the shape {wanted}, and has {has}")
    kernel = jnp.array(score.read().T, found.config.parameter_dtype)
    parameters = {**found.parameters, HEAD: {"kernel": kernel}}
    tokenizer = without_special_tokens(found.tokenizer)
    return Trained(dataclasses.replace(config, model=found.config), parameters, tokenizer)


def write_classifier(model: Tuned, folder: Path) -> None:
    """Write a classifier as a folder that `AutoModelForSequenceClassification` and `AutoTokenizer` load.

    The tokenizer puts the special tokens where `input_forms` does, and cuts as that does where it is asked to cut.

    Raises:
        FileExistsError: the folder exists and is not empty.
        ValueError: a task, a setting, a head or a tokenizer that the format cannot express; named.
    """
    config, tokenizer = model.config, model.tokenizer
    size, limit = config.model.vocab_size, config.data.max_length or config.model.context
    assert size is not None
    described = classifier_to_hf(config, tokenizer.end_of_text)
    pad, pad_id = pad_token(tokenizer, size)
    described |= {"bos_token_id": size - SPECIALS, "pad_token_id": pad_id}
    leaves = by_path({name: leaf for name, leaf in model.parameters.items() if name != HEAD})
    head = model.parameters[HEAD]
    require("bias" not in head, "the head has a bias, which the format of transformers cannot express")
    tensors = export_tensors(config.model, leaves)
    tensors[SCORE] = np.ascontiguousarray(np.asarray(head["kernel"]).T)
    start, delimiter, extract = SPECIAL_TOKENS
    # A special token's name in a text is text, as it is here.
    named = {"bos_token": start, "sep_token": delimiter, "cls_token": extract, "split_special_tokens": True}
    sides = {"pad_token": pad, "padding_side": "right", "truncation_side": "right"}
    files = {"config.json": described, "tokenizer_config.json": tokenizer_config(tokenizer, limit, **named, **sides)}
    write_published(folder, tensors, with_special_tokens(tokenizer, size, limit), files)
