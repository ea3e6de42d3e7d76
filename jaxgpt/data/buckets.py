"""Batches of few shapes: examples of about the same length together, in a seeded order, each once an epoch."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64


@dataclass(frozen=True)
class Bucket:
    """Examples that share a shape: (rows, length)."""

    length: int
    rows: int
    members: Int64[np.ndarray, " n"]

    @property
    def batches(self) -> int:
        """Batches an epoch; the last may have rows without weight."""
        return -(-len(self.members) // self.rows)


class Buckets:
    """Every example once an epoch, in batches of one bucket each, shuffled by (seed, epoch)."""

    def __init__(
        self, lengths: Int64[np.ndarray, " n"], bounds: Sequence[int], tokens: int, multiple: int, seed: int
    ) -> None:
        """Sort the examples into buckets.

        Args:
            lengths: of each example.
            bounds: the lengths of the buckets (see `choose_bounds`).
            tokens: places in a batch, padding included.
            multiple: what the rows of every batch are a multiple of; with `tokens` 0, how many they are.
            seed: decides the order.
        """
        self._seed = seed
        bounds = sorted({*bounds, int(lengths.max())} if lengths.max() > max(bounds) else set(bounds))
        of_example = np.searchsorted(bounds, lengths)
        self.buckets = [
            Bucket(bound, rows_of(bound, tokens, multiple), np.flatnonzero(of_example == number))
            for number, bound in enumerate(bounds)
            if (of_example == number).any()
        ]
        self.batches_per_epoch = sum(bucket.batches for bucket in self.buckets)

    @property
    def places(self) -> int:
        """Places of all batches of an epoch, padding included."""
        return sum(bucket.batches * bucket.rows * bucket.length for bucket in self.buckets)

    def at(self, step: int) -> tuple[Bucket, Int64[np.ndarray, " m"]]:
        """The bucket and the examples of one step."""
        epoch, index = divmod(step, self.batches_per_epoch)
        return self._order(epoch)[index]

    def in_order(self) -> Iterator[tuple[Bucket, Int64[np.ndarray, " m"]]]:
        """Yield every example once, unshuffled."""
        for bucket in self.buckets:
            for number in range(bucket.batches):
                yield bucket, bucket.members[number * bucket.rows : (number + 1) * bucket.rows]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (an object a run; a batch may lie across two epochs)
    def _order(self, epoch: int) -> list[tuple[Bucket, np.ndarray]]:
        generator = np.random.default_rng([self._seed, epoch])
        batches = []
        for bucket in self.buckets:
            members = generator.permutation(bucket.members)
            batches += [(bucket, members[n * bucket.rows : (n + 1) * bucket.rows]) for n in range(bucket.batches)]
        return [batches[place] for place in generator.permutation(len(batches))]


def rows_of(length: int, tokens: int, multiple: int) -> int:
    """How many sentences of `length` make a batch of `tokens`."""
    return max(1, tokens // length // multiple) * multiple


def choose_bounds(lengths: Int64[np.ndarray, " n"], tokens: int, multiple: int, most: int) -> list[int]:
    """Return at most `most` bucket lengths with the least padding, rows that no pair fills included.

    By dynamic programming over the lengths there are: the best buckets up to a length are the best up to a shorter one
    and one more.
    """
    counts = np.bincount(lengths)
    sizes = np.flatnonzero(counts)
    before = np.concatenate([[0], np.cumsum(counts[sizes])])
    # cost[i, j]: places of one bucket for sizes[i..j].
    rows = np.array([rows_of(int(size), tokens, multiple) for size in sizes])
    members = before[None, 1:] - before[:-1, None]
    cost = np.where(members > 0, -(-members // rows) * rows * sizes, np.iinfo(np.int64).max // 4)
    best, cut = cost[0].astype(np.int64), [np.zeros(len(sizes), np.int64)]
    for _ in range(most - 1):
        # One more bucket, which begins at i: all before i by the buckets so far.
        options = np.concatenate([[0], best[:-1]])[:, None] + cost
        cut.append(options.argmin(axis=0))
        best = options.min(axis=0)
    bounds, last = [], len(sizes) - 1
    for starts in reversed(cut):
        if last >= 0:
            bounds.append(int(sizes[last]))
            last = int(starts[last]) - 1
    return sorted(bounds)
