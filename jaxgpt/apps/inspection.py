"""A training batch as text: what the model reads, which next tokens it is to learn, and what belongs together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxgpt.data.batches import Batch

Spell = Callable[[int], str]

NOT_LEARNED = "_"
BETWEEN = "│"


def describe_batch(batch: Batch, spell: Spell, labels: Sequence[str] = (), rows: int = 4) -> Iterator[str]:
    """Lines that show the first rows of a batch of any task.

    Under each token that is read stands the one that is to follow it, where that counts in the loss.

    Args:
        batch: as the task's batches are; see `data.batches`, `pair_batches`, `example_batches` and `packing`.
        spell: a token as it is to be shown.
        labels: the classes, if the task has any.
        rows: how many rows are shown.
    """
    shapes = ", ".join(f"{name} {'x'.join(map(str, x.shape))}" for name, x in batch.items())
    counted = int((batch["lm_weights" if "lm_weights" in batch else "weights"] > 0).sum())
    yield f"fields: {shapes}; {counted:,} next tokens count in the loss"
    for row in range(min(rows, len(batch["row"]))):
        one = {name: x[row] for name, x in batch.items()}
        yield ""
        if "source" in one:
            yield from _pair(row, one, spell)
        elif "last" in one:
            yield from _example(row, one, spell, labels)
        else:
            yield from _documents(row, one, spell)
    if len(batch["row"]) > rows:
        yield f"\nand {len(batch['row']) - rows} rows more"


def _pair(row: int, one: Batch, spell: Spell) -> Iterator[str]:
    yield f"row {row}, source"
    yield _line(one["source"][: one["source_length"]], spell)
    real = one["weights"] > 0
    yield f"row {row}, target ({int((~real).sum())} places of padding)"
    yield from _read_and_learn(one["target"][real], one["targets"][real], one["weights"][real], spell)


def _example(row: int, one: Batch, spell: Spell, labels: Sequence[str]) -> Iterator[str]:
    label = labels[int(one["label"])] if labels and one["label"].dtype.kind == "i" else one["label"]
    yield f"row {row}, label {label}, weight {one['weights']:g}" if one["weights"] else f"row {row}, filled up"
    for number in np.flatnonzero(one["real"]) if one["weights"] else ():
        stop = one["last"][number] + 1
        tokens, targets, weights = (one[name][number, :stop] for name in ("tokens", "targets", "lm_weights"))
        yield f"sequence {number}, read at its last token ({one['tokens'].shape[-1] - stop} places of padding)"
        yield from _read_and_learn(tokens, targets, weights, spell)


def _documents(row: int, one: Batch, spell: Spell) -> Iterator[str]:
    segments = one.get("segments", np.ones(len(one["tokens"]), np.int32))
    padding = int((segments == 0).sum())
    for number in sorted(set(segments[segments > 0].tolist())):
        inside = segments == number
        yield f"row {row}" + (f", document {number}" if "segments" in one else "")
        tokens, targets, weights = (one[name][inside] for name in ("tokens", "targets", "weights"))
        yield from _read_and_learn(tokens, targets, weights, spell)
    if padding:
        yield f"row {row}, {padding} places of padding"


def _read_and_learn(tokens: np.ndarray, targets: np.ndarray, weights: np.ndarray, spell: Spell) -> Iterator[str]:
    read = [spell(int(token)) for token in tokens]
    learned = [spell(int(token)) if weight > 0 else NOT_LEARNED for token, weight in zip(targets, weights, strict=True)]
    widths = [max(len(a), len(b)) for a, b in zip(read, learned, strict=True)]
    for words in (read, learned):
        yield "  " + BETWEEN.join(word.ljust(width) for word, width in zip(words, widths, strict=True))


def _line(tokens: np.ndarray, spell: Spell) -> str:
    return "  " + BETWEEN.join(spell(int(token)) for token in tokens)
