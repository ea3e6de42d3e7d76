"""What is held out of a corpus: decided from a digest and a size of each document, so that no text need be kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped

from jaxgpt.data.corpus import Corpus

# Of one document: its SHA-256, its size, its length.
RECORD = np.dtype([("digest", "S32"), ("bytes", np.int64), ("characters", np.int64)])
RECORDS_AT_ONCE = 2**16
Records = Shaped[np.ndarray, " documents"]


@dataclass(frozen=True)
class Split:
    """Which part of a corpus is held out.

    One document: its first `1 - share` characters are trained on and the rest is held out. Several: whole documents
    are held out, those with the smallest digests, so that the choice depends on no order, and equal documents are
    always on the same side; but not one that is more than half of the text.
    """

    fingerprint: str
    """a digest of the documents in their order"""
    documents: int
    single_train_characters: int = 0
    last_held_out: bytes = b""
    """the largest digest that is held out"""
    too_large: frozenset[bytes] = frozenset()
    """smaller digests that are not"""

    def part(self, texts: Iterable[str], held_out: bool) -> Iterator[str]:
        """Yield the documents (or the part of the one) to train on, or those held out."""
        for text in texts:
            if self.documents == 1:
                yield text[self.single_train_characters :] if held_out else text[: self.single_train_characters]
            elif self._holds_out(_digest(text)) == held_out:
                yield text

    def held_out(self, records: Records) -> Bool[np.ndarray, " documents"]:
        """Which documents of a corpus of several are held out."""
        digests = records["digest"]
        return (digests <= self.last_held_out) & ~np.isin(digests, np.array([*self.too_large], digests.dtype))

    def _holds_out(self, digest: bytes) -> bool:
        return digest <= self.last_held_out and digest not in self.too_large


def record_documents(texts: Iterable[str]) -> Records:
    """One record a document, in their order."""
    parts, rows = [np.empty(0, RECORD)], list[tuple[Any, ...]]()
    for text in texts:
        rows.append((_digest(text), len(text.encode()), len(text)))
        if len(rows) == RECORDS_AT_ONCE:
            parts.append(np.array(rows, RECORD))
            rows.clear()
    return np.concatenate([*parts, np.array(rows, RECORD)])


def split_corpus(corpus: Corpus, share: float) -> Split:
    """Decide what is held out: about `share` of the text.

    Raises:
        ValueError: no text at all, too little of it to split, or nothing but copies of one document.
    """
    records = record_documents(corpus)
    if not len(records):
        names = ", ".join(str(path or "standard input") for path in corpus.files[:3]) or "no file"
        raise ValueError(f"the data holds no text; this was read: {names}{' ...' if len(corpus.files) > 3 else ''}")
    return decide_split(records, share)


def decide_split(records: Records, share: float) -> Split:
    """Decide what is held out of a corpus, of one document at least. Raises as `split_corpus` does."""
    fingerprint = hashlib.sha256(np.ascontiguousarray(records["digest"]).data).hexdigest()
    if len(records) == 1:
        # nanoGPT's int(n * 0.9); for other shares without the rounding that makes 10 * (1 - 0.9) fall short of 1.
        characters = int(records["characters"][0])
        train = int(characters * (1 - share) + 1e-6)
        if not 0 < train < characters:
            raise ValueError(
                f"the data is one text of {characters} characters, too short to hold {share:.0%} of it out"
            )
        return Split(fingerprint, 1, train)
    digests, copies = np.unique(records["digest"], return_inverse=True)
    if len(digests) == 1:
        raise ValueError(f"the data is {len(records)} copies of one document, so none can be held out")
    sizes = np.zeros(len(digests), np.int64)
    np.add.at(sizes, copies, records["bytes"])
    total = int(sizes.sum())
    small = sizes <= max(share, 0.5) * total  # a document that is most of the text is there to be trained on
    before = np.cumsum(np.where(small, sizes, 0)) - sizes
    last = np.flatnonzero(small & (before < share * total))[: len(digests) - 1][-1]
    too_large = digests[:last][~small[:last]]
    return Split(fingerprint, len(records), 0, _whole(digests[last]), frozenset(map(_whole, too_large)))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _whole(digest: Any) -> bytes:
    """A digest out of an array, which leaves zeros at its end out."""
    return bytes(digest).ljust(32, b"\0")
