"""Batches of pairs by token count: sentences of about the same length together, in few shapes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from jaxgpt.data.batches import Batch
from jaxgpt.data.pairs import EncodedPairs


@dataclass(frozen=True)
class Bucket:
    """Pairs that share a shape: (rows, length) for source and target alike."""

    length: int
    rows: int
    members: Int64[np.ndarray, " n"]

    @property
    def batches(self) -> int:
        """Batches an epoch; the last may have rows without weight."""
        return -(-len(self.members) // self.rows)


class PairBatches:
    """Every pair once an epoch, in batches of one bucket each, shuffled by (seed, epoch)."""

    def __init__(self, pairs: EncodedPairs, end: int, bounds: Sequence[int], tokens: int, multiple: int, seed: int):
        """Sort the pairs into buckets.

        Args:
            pairs: to train on, or held out.
            end: the token after every sentence; it also begins every target.
            bounds: the lengths of the buckets, ends included (see `choose_bounds`).
            tokens: target places in a batch, padding included.
            multiple: what the rows of every batch are a multiple of.
            seed: decides the order.
        """
        self._pairs, self._end, self._seed = pairs, end, seed
        lengths = pair_lengths(pairs)
        bounds = sorted({*bounds, int(lengths.max())} if lengths.max() > max(bounds) else set(bounds))
        of_pair = np.searchsorted(bounds, lengths)
        self.buckets = [
            Bucket(bound, rows_of(bound, tokens, multiple), np.flatnonzero(of_pair == number))
            for number, bound in enumerate(bounds)
            if (of_pair == number).any()
        ]
        self.batches_per_epoch = sum(bucket.batches for bucket in self.buckets)

    @property
    def padding_share(self) -> float:
        """Share of the target places that is padding."""
        places = sum(bucket.batches * bucket.rows * bucket.length for bucket in self.buckets)
        return 1.0 - sum(len(target) + 1 for target in self._pairs.target) / places

    def batch(self, step: int) -> Batch:
        """The global batch of one step.

        Returns:
            `source` (B, S) and `source_length` (B,); `target` (B, T), what the decoder reads, and `targets` (B, T),
            what it should say, one token further on; all int32. `weights` (B, T) float32, 1 where a target counts;
            `row` (B,) int32, the place in the global batch.
        """
        epoch, index = divmod(step, self.batches_per_epoch)
        return self._make(*self._order(epoch)[index])

    def in_order(self) -> Iterator[Batch]:
        """Yield every pair once, unshuffled."""
        for bucket in self.buckets:
            for number in range(bucket.batches):
                yield self._make(bucket, bucket.members[number * bucket.rows : (number + 1) * bucket.rows])

    @functools.lru_cache(maxsize=2)  # noqa: B019 (an object a run)
    def _order(self, epoch: int) -> list[tuple[Bucket, np.ndarray]]:
        generator = np.random.default_rng([self._seed, epoch])
        batches = []
        for bucket in self.buckets:
            members = generator.permutation(bucket.members)
            batches += [(bucket, members[n * bucket.rows : (n + 1) * bucket.rows]) for n in range(bucket.batches)]
        return [batches[place] for place in generator.permutation(len(batches))]

    def _make(self, bucket: Bucket, members: np.ndarray) -> Batch:
        shape = (bucket.rows, bucket.length)
        source, target, targets = (np.full(shape, self._end, np.int32) for _ in range(3))
        # A row without a pair has a source of one token, so that its attention has something to look at.
        weights, lengths = np.zeros(shape, np.float32), np.ones(bucket.rows, np.int32)
        for row, member in enumerate(members):
            read, say = self._pairs.source[member], self._pairs.target[member]
            source[row, : len(read)] = read
            lengths[row] = len(read) + 1
            target[row, 1 : len(say) + 1] = say
            targets[row, : len(say)] = say
            weights[row, : len(say) + 1] = 1.0
        row_numbers = np.arange(bucket.rows, dtype=np.int32)
        return {
            "source": source, "source_length": lengths, "target": target, "targets": targets, "weights": weights,
            "row": row_numbers,
        }  # fmt: skip


def pair_lengths(pairs: EncodedPairs) -> Int64[np.ndarray, " n"]:
    """The place each pair needs: the longer of its sides with its end token."""
    return np.array([max(len(s), len(t)) + 1 for s, t in zip(pairs.source, pairs.target, strict=True)])


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
