"""Batches: a pure function of (seed, step), so that a resumed run needs no iterator and any device count will do."""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Int64

from jaxgpt.data.shards import TokenStream

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Share:
    """Which rows of every global batch one host reads: of so many equal `parts`, `first` to before `stop`."""

    first: int = 0
    stop: int = 1
    parts: int = 1

    def rows(self, size: int) -> slice:
        """The rows, of a global batch of `size`, which `parts` divides."""
        return slice(self.first * size // self.parts, self.stop * size // self.parts)

    def of(self, batch: Batch) -> Batch:
        """The share of a global batch that has been made whole."""
        return {name: x[self.rows(len(x))] for name, x in batch.items()}


WHOLE = Share()


@dataclass(frozen=True)
class WindowBatches:
    """Windows of running text in a seeded order, each once an epoch.

    An epoch has n = (tokens - 1) // T windows of T inputs, side by side, shuffled by (seed, epoch); they begin at a
    phase that is drawn anew, within what n windows leave over. Row r of step s is window (s B + r) mod n of epoch
    (s B + r) // n.
    """

    stream: TokenStream
    sequence_length: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        check_length(self.stream, self.sequence_length, "training split")

    @property
    def windows(self) -> int:
        """n, windows an epoch."""
        return (len(self.stream) - 1) // self.sequence_length

    def batch(self, step: int, share: Share = WHOLE) -> Batch:
        """The global batch of one step, or a share of its rows.

        Returns:
            `tokens` and `targets` (B, T) int32, the targets one token further on; `weights` (B, T) float32, 1 where a
            target counts; `row` (B,) int32, the place in the global batch.
        """
        rows = np.arange(self.batch_size, dtype=np.int32)[share.rows(self.batch_size)]
        starts = [self._start(step * self.batch_size + int(row)) for row in rows]
        windows = np.stack([self.stream.read(s, s + self.sequence_length + 1) for s in starts]).astype(np.int32)
        weights = np.ones((len(rows), self.sequence_length), np.float32)
        return {"tokens": windows[:, :-1], "targets": windows[:, 1:], "weights": weights, "row": rows}

    def _start(self, position: int) -> int:
        epoch, index = divmod(position, self.windows)
        slack = len(self.stream) - 1 - self.windows * self.sequence_length
        order, phase = _shuffle(self.windows, slack, self.seed, epoch)
        return phase + int(order[index]) * self.sequence_length


@functools.lru_cache(maxsize=2)  # a batch may lie across two epochs
def _shuffle(windows: int, slack: int, seed: int, epoch: int) -> tuple[Int64[np.ndarray, " n"], int]:
    generator = np.random.default_rng([seed, epoch])
    return generator.permutation(windows), int(generator.integers(slack + 1))


def evaluation_batches(
    stream: TokenStream, sequence_length: int, batch_size: int, share: Share = WHOLE
) -> Iterator[Batch]:
    """Yield the whole of a split in order, or a share of each batch: every token but the first is a target once.

    The last batch is padded to the same shape; what is padding has weight 0.

    Raises:
        ValueError: the split is shorter than one window.
    """
    check_length(stream, sequence_length, "held-out split")
    inputs = len(stream) - 1
    rows = np.arange(batch_size, dtype=np.int32)[share.rows(batch_size)]
    shape = (len(rows), sequence_length)
    for batch in range(0, inputs, batch_size * sequence_length):
        start = min(batch + int(rows[0]) * sequence_length, inputs)
        chunk = stream.read(start, min(start + rows.size * sequence_length, inputs) + 1).astype(np.int32)
        tokens, targets, weights = (np.zeros(shape, dtype) for dtype in (np.int32, np.int32, np.float32))
        count = len(chunk) - 1
        tokens.flat[:count], targets.flat[:count], weights.flat[:count] = chunk[:-1], chunk[1:], 1.0
        yield {"tokens": tokens, "targets": targets, "weights": weights, "row": rows}


def check_length(stream: TokenStream, sequence_length: int, name: str) -> None:
    """Raise `ValueError` if a split has not even one window of inputs and targets."""
    if len(stream) <= sequence_length:
        raise ValueError(
            f"the {name} has {len(stream)} tokens, fewer than the {sequence_length + 1} of one sequence and its "
            "targets; give more text, or a shorter data.sequence-length"
        )


T = TypeVar("T")


def prefetch(make: Callable[[int], T], start: int, stop: int, depth: int = 2) -> Iterator[T]:
    """Yield make(start), ..., make(stop - 1), made up to `depth` ahead in a thread.

    An error in `make` is raised here, at its place in the order. The thread ends when the iterator is closed.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def put(item: tuple[T | None, BaseException | None]) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def work() -> None:
        try:
            for step in range(start, stop):
                if closed.is_set():
                    return
                put((make(step), None))
        except BaseException as error:
            put((None, error))

    threading.Thread(target=work, daemon=True, name="prefetch").start()
    try:
        for _ in range(start, stop):
            item, error = ready.get()
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        closed.set()
