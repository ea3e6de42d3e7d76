"""Several documents in a row, none of which sees another: batches of conversations with as little padding as can be."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

import numpy as np

from jaxgpt.data.batches import WHOLE, Batch, Share
from jaxgpt.data.buckets import Bucket, Buckets, choose_bounds
from jaxgpt.data.conversations import EncodedConversation

UNPACKED_BUCKETS = 6


def pack(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Put documents into rows of `room` places: the longest first, each where it leaves the least room (best fit).

    Returns:
        For each row, the numbers of its documents; every document is in one row.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (places left, row), in order
    for document in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        at = bisect.bisect_left(spaces, (sizes[document], 0))
        left, row = spaces.pop(at) if at < len(spaces) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(document)
        bisect.insort(spaces, (left - sizes[document], row))
    return rows


class PackedBatches:
    """Every document once an epoch; those that share a row do so in every epoch."""

    def __init__(
        self, documents: Sequence[EncodedConversation], room: int, rows: int, seed: int, *, together: bool = True
    ) -> None:
        """Pack documents of at most `room` places into batches of `rows`; not `together`: a document a row."""
        self._documents = documents
        sizes = [document.inputs for document in documents]
        self.packed = pack(sizes, room) if together else [[number] for number in range(len(sizes))]
        lengths = np.array([room if together else sizes[row[0]] for row in self.packed])
        bounds = [room] if together else choose_bounds(lengths, 0, rows, UNPACKED_BUCKETS)
        self.order = Buckets(lengths, bounds, 0, rows, seed)

    @property
    def padding_share(self) -> float:
        """Share of the places that is padding."""
        return 1.0 - sum(document.inputs for document in self._documents) / self.order.places

    def batch(self, step: int, share: Share = WHOLE) -> Batch:
        """The global batch of one step, or a share of its rows.

        Returns:
            `tokens`, `targets`, one token further on, and `segments`, which number the documents of a row from 1 and
            padding 0 (B, T) int32; `weights` (B, T) float32, 1 where a target is to be learned; `row` (B,) int32.
        """
        return self._make(*self.order.at(step), share)

    def in_order(self, share: Share = WHOLE) -> Iterator[Batch]:
        """Yield every document once, unshuffled; of each batch a share."""
        for bucket, members in self.order.in_order():
            yield self._make(bucket, members, share)

    def _make(self, bucket: Bucket, members: np.ndarray, share: Share) -> Batch:
        numbers = np.arange(bucket.rows, dtype=np.int32)[share.rows(bucket.rows)]
        shape = (len(numbers), bucket.length)
        tokens, targets, segments = (np.zeros(shape, np.int32) for _ in range(3))
        weights = np.zeros(shape, np.float32)
        for row, member in enumerate(members[share.rows(bucket.rows)]):
            start = 0
            for number, document in enumerate(self.packed[member], 1):
                one = self._documents[document]
                place = slice(start, start + one.inputs)
                tokens[row, place], targets[row, place] = one.tokens[:-1], one.tokens[1:]
                weights[row, place], segments[row, place] = one.learned[1:], number
                start += one.inputs
        return {
            "tokens": tokens, "targets": targets, "segments": segments, "weights": weights,
            "row": numbers,
        }  # fmt: skip
