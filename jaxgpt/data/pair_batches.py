"""Batches of pairs by token count: sentences of about the same length together, in few shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int64

from jaxgpt.data.batches import WHOLE, Batch, Share
from jaxgpt.data.buckets import Bucket, Buckets
from jaxgpt.data.pairs import EncodedPairs


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
        self._pairs, self._end = pairs, end
        self.order = Buckets(pair_lengths(pairs), bounds, tokens, multiple, seed)

    @property
    def padding_share(self) -> float:
        """Share of the target places that is padding."""
        return 1.0 - sum(len(target) + 1 for target in self._pairs.target) / self.order.places

    def batch(self, step: int, share: Share = WHOLE) -> Batch:
        """The global batch of one step, or a share of its rows.

        Returns:
            `source` (B, S) and `source_length` (B,); `target` (B, T), what the decoder reads, and `targets` (B, T),
            what it should say, one token further on; all int32. `weights` (B, T) float32, 1 where a target counts;
            `row` (B,) int32, the place in the global batch.
        """
        return self._make(*self.order.at(step), share)

    def in_order(self, share: Share = WHOLE) -> Iterator[Batch]:
        """Yield every pair once, unshuffled; of each batch a share."""
        for bucket, members in self.order.in_order():
            yield self._make(bucket, members, share)

    def _make(self, bucket: Bucket, members: np.ndarray, share: Share) -> Batch:
        numbers = np.arange(bucket.rows, dtype=np.int32)[share.rows(bucket.rows)]
        shape = (len(numbers), bucket.length)
        source, target, targets = (np.full(shape, self._end, np.int32) for _ in range(3))
        # A row without a pair has a source of one token, so that its attention has something to look at.
        weights, lengths = np.zeros(shape, np.float32), np.ones(len(numbers), np.int32)
        for row, member in enumerate(members[share.rows(bucket.rows)]):
            read, say = self._pairs.source[member], self._pairs.target[member]
            source[row, : len(read)] = read
            lengths[row] = len(read) + 1
            target[row, 1 : len(say) + 1] = say
            targets[row, : len(say)] = say
            weights[row, : len(say) + 1] = 1.0
        return {
            "source": source, "source_length": lengths, "target": target, "targets": targets, "weights": weights,
            "row": numbers,
        }  # fmt: skip


def pair_lengths(pairs: EncodedPairs) -> Int64[np.ndarray, " n"]:
    """The place each pair needs: the longer of its sides with its end token."""
    return np.array([max(len(s), len(t)) + 1 for s, t in zip(pairs.source, pairs.target, strict=True)])
