"""A corpus in parts of about the same size, each of which can be read without the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxgpt.data.corpus import read_documents


@dataclass(frozen=True)
class Piece:
    """A file, or the lines of a .jsonl file that begin in a range of its bytes."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Part:
    """Pieces that are read one after another; documents anew each time they are iterated over."""

    pieces: tuple[Piece, ...]
    text_field: str

    @property
    def bytes(self) -> int:
        """Bytes of the files, or of the ranges of them."""
        return sum(piece.stop - piece.start for piece in self.pieces)

    def __iter__(self) -> Iterator[str]:
        """Yield the documents that are not empty. Raises as `data.corpus.Corpus.__iter__` does."""
        for piece in self.pieces:
            whole = piece.path.suffix != ".jsonl"
            stop = None if whole else piece.stop
            yield from filter(None, read_documents(piece.path, self.text_field, piece.start, stop))


def cut_corpus(files: Iterable[Path], text_field: str, size: int) -> list[Part]:
    """Cut a corpus into parts of about `size` bytes, which follow from the files alone, in their order.

    Only .jsonl files are cut, between lines; another is one document. Small files share a part.

    Raises:
        OSError: a file cannot be looked at.
    """
    parts: list[Part] = []
    held: list[Piece] = []
    held_size = 0
    for piece in _pieces(files, size):
        held.append(piece)
        held_size += piece.stop - piece.start
        if held_size >= size:
            parts.append(Part(tuple(held), text_field))
            held, held_size = [], 0
    return [*parts, Part(tuple(held), text_field)] if held else parts


def _pieces(files: Iterable[Path], size: int) -> Iterator[Piece]:
    for path in files:
        whole = path.stat().st_size
        step = size if path.suffix == ".jsonl" else max(whole, 1)
        for start in range(0, max(whole, 1), step):
            yield Piece(path, start, min(start + step, whole))
