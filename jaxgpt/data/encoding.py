"""Documents to tokens: which tokenizer a config asks for, and the one function that tokenises a part of a corpus."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt

from jaxgpt.config import DataConfig
from jaxgpt.data.split import Split
from jaxgpt.data.tokenizer import Tokenizer, byte_tokenizer, character_tokenizer, load_tokenizer, train_bpe

DOCUMENTS_AT_ONCE = 256  # encoded together, on all cores
CHARACTERS_AT_ONCE = 2**22  # of those documents


def shard(documents: Iterable[str], tokenizer: Tokenizer) -> UInt[np.ndarray, " n"]:
    """Return the tokens of documents, the end-of-text token after each: all there is to tokenising a part of a corpus.

    Whatever runs it, processes of one machine or the workers of a cluster, documents come as a stream; the tokens of
    all are held.

    Raises:
        ValueError: a character that the tokenizer does not have.
    """
    dtype = token_type(tokenizer)
    end, pieces = np.array([tokenizer.separator], dtype), [np.empty(0, dtype)]
    for _, ids in encoded(documents, tokenizer):
        pieces += [ids.astype(dtype), end]
    return np.concatenate(pieces)


def token_type(tokenizer: Tokenizer) -> np.dtype:
    """The narrowest type that holds every id."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def encoded(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each document with its ids; few are held at a time."""
    batch, size = list[str](), 0
    for text in itertools.chain(documents, [None]):
        if batch and (text is None or len(batch) == DOCUMENTS_AT_ONCE or size + len(text) > CHARACTERS_AT_ONCE):
            yield from zip(batch, tokenizer.encode_batch(batch), strict=True)
            batch, size = [], 0
        if text is not None:
            batch.append(text)
            size += len(text)


def given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer that a config names by its path; None if it is to be made.

    Raises:
        FileNotFoundError, ValueError: there is none, or it cannot be read.
    """
    if config.tokenizer in ("byte", "character", "bpe"):
        return None
    if not Path(config.tokenizer).exists():
        raise FileNotFoundError(f"data.tokenizer: {config.tokenizer} is none of byte, character, bpe, and no path")
    return load_tokenizer(config.tokenizer)


def make_tokenizer(config: DataConfig, corpus: Iterable[str], split: Split, say: Callable[[str], None]) -> Tokenizer:
    """The tokenizer that a config asks for, made of the text."""
    if config.tokenizer == "byte":
        return byte_tokenizer()
    if config.tokenizer == "character":
        return character_tokenizer(corpus, config.unknown)  # of the whole text, held-out part included
    say(f"training a byte-level BPE of {config.vocab_size:,} tokens")
    return train_bpe(split.part(corpus, held_out=False), config.vocab_size)
