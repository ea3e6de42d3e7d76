"""How well a model predicts a text: loss, perplexity, bits per byte, and the loss of every token."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgpt.api import LanguageModel
from jaxgpt.config import DataConfig, GPTConfig
from jaxgpt.data.corpus import open_corpus
from jaxgpt.generation.decode import bucket, padded
from jaxgpt.models.blocks import Parameters
from jaxgpt.models.gpt import GPT, next_token_logits
from jaxgpt.models.losses import negative_log_likelihood


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. The first token of a document has nothing before it and is not predicted."""

    documents: int
    tokens: int
    """tokens predicted"""
    bytes: int
    """UTF-8 bytes of the text they stand for"""
    loss: float
    """mean negative log-likelihood, nats a token"""
    perplexity: float
    bits_per_byte: float
    """comparable between tokenizers, as loss and perplexity are not"""
    context: int
    stride: int
    """in documents longer than the context each token is predicted from at least context - stride tokens"""


@dataclass(frozen=True)
class Window:
    """A piece of a document, of which the losses from `first` on count: those before are another window's."""

    document: int
    start: int
    tokens: Sequence[int]
    first: int


def windows(document: int, ids: Sequence[int], context: int, stride: int) -> Iterator[Window]:
    """Cut a document so that each token but the first is predicted once, from as much before it as the stride leaves.

    A window has up to `context` tokens and the one after them; the next begins `stride` later and counts what is new.
    """
    predicted = 0  # the last token that some window predicts
    for start in range(0, len(ids), stride):
        end = min(start + context, len(ids) - 1)
        if end > predicted:
            yield Window(document, start, ids[start : end + 1], predicted - start)
            predicted = end


@functools.partial(jax.jit, static_argnums=0)
def token_losses(config: GPTConfig, parameters: Parameters, tokens: Int[Array, "B U"]) -> Float[Array, "B T"]:
    """Negative log-likelihood in nats of each token after the first of its row (T = U - 1), given those before it."""
    hidden, _ = GPT(config).apply({"params": parameters}, tokens[:, :-1])

    def losses(row: tuple[Float[Array, "T D"], Int[Array, " T"]]) -> Float[Array, " T"]:
        return negative_log_likelihood(next_token_logits(config, parameters, row[0]), row[1])

    return jax.lax.map(losses, (hidden, tokens[:, 1:]))  # a row at a time: the logits of all would be gigabytes


def evaluate(
    model: LanguageModel,
    data: Sequence[str],
    *,
    text_field: str = "text",
    stride: int | None = None,
    batch_size: int = 8,
    per_token: str | None = None,
) -> Evaluation:
    """Predict every document of `data`, each from its own beginning.

    Args:
        data: text files, folders, .jsonl files, or "-" (see `data.corpus`).
        stride: tokens from one window to the next in documents longer than the context (default: half the context).
        batch_size: windows computed at once; it does not change the result.
        per_token: a file for the loss of every token, a JSON object a line.

    Raises:
        FileNotFoundError, ValueError: text that is absent, not UTF-8, or too short to predict anything.
        FloatingPointError: the loss is not finite.
    """
    context = model.config.context
    stride = context // 2 or 1 if stride is None else stride
    if stride > context:
        raise ValueError(f"stride is {stride}, more than the context of {context}: tokens would be left out")
    documents = size = 0

    def cut() -> Iterator[Window]:
        nonlocal documents, size
        for number, text in enumerate(open_corpus(DataConfig(path=tuple(data), text_field=text_field))):
            ids = model.tokenizer.encode(text)
            documents += 1
            # A token that is part of a character decodes to U+FFFD, and stands for fewer bytes than that has.
            first = model.tokenizer.decode(ids[:1]).replace("\ufffd", "?")
            size += len(text.encode()) - len(first.encode())
            yield from windows(number, ids, context, stride)

    total, count = 0.0, 0
    with open(per_token or os.devnull, "w", encoding="utf-8") as file:
        rows = 0
        for batch in _batches(cut(), batch_size):
            rows = rows or len(batch)  # of a short text fewer than asked for
            for window, losses in zip(batch, _losses(model, batch, rows), strict=True):
                total += float(losses.sum(dtype=np.float64))
                count += len(losses)
                if per_token is not None:
                    for place, loss in enumerate(losses.tolist(), window.first + 1):
                        record = {"document": window.document, "position": window.start + place}
                        file.write(json.dumps(record | {"token": window.tokens[place], "loss": loss}) + "\n")
    if count == 0:
        raise ValueError(f"{' '.join(data)} has no token to predict: a document needs at least two")
    mean = total / count
    if not math.isfinite(mean):
        raise FloatingPointError(f"the loss is {mean}; jaxgpt verify says more about the model's weights")
    return Evaluation(
        documents, count, size, mean, math.exp(min(mean, 700.0)), total / math.log(2) / max(size, 1), context, stride
    )


def _batches(cut: Iterator[Window], size: int) -> Iterator[list[Window]]:
    while batch := list(itertools.islice(cut, size)):
        yield batch


def _losses(model: LanguageModel, batch: Sequence[Window], rows: int) -> list[np.ndarray]:
    """The losses of each window that count. Always `rows` rows and few widths, so that few programs are compiled."""
    width = bucket(max(len(window.tokens) for window in batch) - 1, model.config.context)
    tokens = padded([window.tokens for window in batch] + [[]] * (rows - len(batch)), width + 1)
    losses = np.asarray(token_losses(model.config, model.parameters, jnp.array(tokens)))
    return [own[window.first : len(window.tokens) - 1] for own, window in zip(losses, batch, strict=False)]


def describe(result: Evaluation) -> str:
    """The result as a person reads it."""
    return (
        f"loss            {result.loss:.4f} nats a token\n"
        f"perplexity      {result.perplexity:.3f}\n"
        f"bits per byte   {result.bits_per_byte:.4f}\n"
        f"predicted       {result.tokens:,} tokens, {result.bytes:,} bytes, {result.documents:,} document(s)\n"
        f"context         {result.context}, stride {result.stride}"
    )
