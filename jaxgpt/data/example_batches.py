"""Batches of labelled examples: GPT's input forms for each task (Radford et al. 2018, section 3.3), in few shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from jaxgpt.config import FinetuneConfig, TuningTask
from jaxgpt.data.batches import WHOLE, Batch, Share
from jaxgpt.data.buckets import Bucket, Buckets
from jaxgpt.data.examples import Example, choices_of, score_of
from jaxgpt.data.special_tokens import SPECIALS
from jaxgpt.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sequences:
    """What the model reads of one example: one sequence, two of a similarity, one for each answer of a choice."""

    tokens: tuple[np.ndarray, ...]
    cut: int
    """tokens that were beyond the limit and are left out"""


@dataclass(frozen=True)
class EncodedExamples:
    """Examples as token ids, with what is to be said of each: a class, a place, or a score in [-1, 1]."""

    sequences: list[Sequences]
    labels: np.ndarray
    examples: list[Example]

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def lengths(self) -> Int64[np.ndarray, " n"]:
        """The place each example needs: the longest of its sequences."""
        return np.array([max(map(len, one.tokens)) for one in self.sequences])

    @property
    def most_sequences(self) -> int:
        """O: the most sequences an example has."""
        return max(len(one.tokens) for one in self.sequences)


def input_forms(
    tokenizer: Tokenizer, vocab_size: int, task: TuningTask, texts: Sequence[tuple[str, ...]], limit: int
) -> list[Sequences]:
    """Texts as the model reads them: start token, the texts with delimiters between, extract token.

    What is longer than `limit` is cut at the end of its longest text.

    Raises:
        ValueError: a character that the tokenizer does not have.
    """
    flat = tokenizer.encode_batch([text for one in texts for text in one])
    ids = iter([piece.astype(np.int32) for piece in flat])
    return [_form([next(ids) for _ in one], task, vocab_size, limit) for one in texts]


def _form(pieces: list[np.ndarray], task: TuningTask, vocab_size: int, limit: int) -> Sequences:
    start, delimiter, extract = (np.array([vocab_size - SPECIALS + n], np.int32) for n in range(SPECIALS))
    if task == "similarity":
        orders = [pieces, pieces[::-1]]
    elif task == "multiple-choice":
        orders = [[pieces[0], answer] for answer in pieces[1:]]
    else:
        orders = [pieces]
    tokens, cut = [], 0
    for order in orders:
        fitting, beyond = _fit(order, limit - len(order) - 1)
        cut = max(cut, beyond)
        between = [part for piece in fitting for part in (delimiter, piece)][1:]
        tokens.append(np.concatenate([start, *between, extract]))
    return Sequences(tuple(tokens), cut)


def _fit(pieces: list[np.ndarray], room: int) -> tuple[list[np.ndarray], int]:
    """Cut the end of the longest piece, until all have room together; of two as long now that which was shorter."""
    sizes, beyond = [len(piece) for piece in pieces], max(0, sum(map(len, pieces)) - room)
    for _ in range(beyond):  # as "longest_first" of the tokenizers library does
        sizes[max(range(len(sizes)), key=lambda n: (sizes[n], -len(pieces[n])))] -= 1
    return [piece[:size] for piece, size in zip(pieces, sizes, strict=True)], beyond


def encode_examples(
    tokenizer: Tokenizer, config: FinetuneConfig, examples: Sequence[Example], limit: int
) -> EncodedExamples:
    """Turn examples into ids and labels into numbers, for a config whose vocabulary and labels are resolved.

    Raises:
        ValueError: a label that does not fit (its line is named), or a character that the tokenizer does not have.
    """
    assert config.model.vocab_size is not None
    texts = [example.texts for example in examples]
    sequences = input_forms(tokenizer, config.model.vocab_size, config.task, texts, limit)
    if config.regression:
        low, high = map(float, config.labels)
        labels = np.array([(score_of(e) - low) / (high - low) * 2 - 1 for e in examples], np.float32)
    elif config.task == "multiple-choice":
        labels = np.array(choices_of(examples), np.int32)
    else:
        labels = np.array([config.labels.index(example.label) for example in examples], np.int32)
    return EncodedExamples(sequences, labels, list(examples))


class ExampleBatches:
    """Every example once an epoch, in batches of `rows` examples of about the same length."""

    def __init__(
        self,
        examples: EncodedExamples,
        bounds: Sequence[int],
        rows: int,
        seed: int,
        class_weights: Sequence[float] = (),
    ) -> None:
        """See `Buckets`; `class_weights` are those of the classes in the loss (none: all 1)."""
        self._examples, self._class_weights = examples, class_weights
        self._sequences = examples.most_sequences
        self.order = Buckets(examples.lengths, bounds, 0, rows, seed)

    def batch(self, step: int, share: Share = WHOLE) -> Batch:
        """The global batch of one step, or a share of its rows.

        Returns:
            `tokens` and `targets`, one token further on (B, O, T) int32; `lm_weights` (B, O, T) float32, how much each
            target counts for the language-model loss, so scaled that they add up to what `weights` do; `last` (B, O)
            int32, where the extract token stands; `real` (B, O) bool, whether there is such a sequence; `label` (B,)
            and `weights` (B,) float32; `example` (B,), its number; `row` (B,) int32, the place in the global batch.
        """
        batch = self._make(*self.order.at(step))
        total = batch["lm_weights"].sum()  # of the whole batch, which is therefore made first
        batch["lm_weights"] *= batch["weights"].sum() / max(total, 1.0)
        return share.of(batch)

    def in_order(self, share: Share = WHOLE) -> Iterator[Batch]:
        """Yield every example once, unshuffled; each language-model target, and each example, with the weight 1.

        Of each batch a share.
        """
        for bucket, members in self.order.in_order():
            batch = self._make(bucket, members)
            batch["weights"] = (batch["weights"] > 0).astype(np.float32)
            yield share.of(batch)

    def _make(self, bucket: Bucket, members: np.ndarray) -> Batch:
        shape = (bucket.rows, self._sequences, bucket.length)
        tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        lm_weights, real = np.zeros(shape, np.float32), np.zeros(shape[:2], bool)
        last, example = np.zeros(shape[:2], np.int32), np.zeros(bucket.rows, np.int32)
        label, weights = np.zeros(bucket.rows, self._examples.labels.dtype), np.zeros(bucket.rows, np.float32)
        for row, member in enumerate(members):
            for number, sequence in enumerate(self._examples.sequences[member].tokens):
                length = len(sequence)
                tokens[row, number, :length] = sequence
                targets[row, number, : length - 1] = sequence[1:]
                lm_weights[row, number, : length - 1] = 1.0
                last[row, number], real[row, number] = length - 1, True
            example[row], label[row] = member, self._examples.labels[member]
            weights[row] = self._class_weights[int(label[row])] if self._class_weights else 1.0
        real[len(members) :, 0] = True  # so that a row without an example has something to choose from
        return {
            "tokens": tokens, "targets": targets, "lm_weights": lm_weights, "last": last, "real": real,
            "label": label, "weights": weights, "example": example, "row": np.arange(bucket.rows, dtype=np.int32),
        }  # fmt: skip
