"""Tokens on disk: a text is tokenised once into memory-mapped shards, found again by its content."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
import tokenize
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt

from jaxgpt.config import DataConfig
from jaxgpt.data.corpus import Corpus, Split, open_corpus, split_corpus
from jaxgpt.data.tokenizer import Tokenizer, byte_tokenizer, character_tokenizer, load_tokenizer, train_bpe
from jaxgpt.environment import cache_folder

FORMAT = 3
SHARD_TOKENS = 2**26
DOCUMENTS_AT_ONCE = 256  # encoded together, on all cores


@dataclass(frozen=True)
class TokenStream:
    """The tokens of one split, in order, over any number of shards; `bytes` counts the UTF-8 text they stand for."""

    shards: tuple[UInt[np.ndarray, " _"], ...]  # each of its own length
    documents: int
    bytes: int

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def read(self, start: int, stop: int) -> UInt[np.ndarray, " n"]:
        """Return tokens `start` to `stop`, read from disk as needed."""
        pieces, offset = [], 0
        for shard in self.shards:
            low, high = max(start - offset, 0), min(stop - offset, len(shard))
            if low < high:
                pieces.append(shard[low:high])
            offset += len(shard)
        return np.concatenate(pieces) if pieces else self.shards[0][:0]


@dataclass(frozen=True)
class TokenizedText:
    """A corpus as tokens: what to train on, what is held out, and the tokenizer. `fingerprint` is of the content."""

    tokenizer: Tokenizer
    fingerprint: str
    train: TokenStream
    held_out: TokenStream


def prepare(
    config: DataConfig, say: Callable[[str], None] = lambda line: None, tokenizer: Tokenizer | None = None
) -> TokenizedText:
    """Tokenise the text of a config, or find it tokenised already.

    The cache folder's name is a digest of the text, the tokenizer asked for and the split: changed text is tokenised
    anew, unchanged text never is, wherever it lies.

    Args:
        say: told, in a line, about work that takes time.
        tokenizer: instead of the one that the config names.

    Raises:
        FileNotFoundError, PermissionError, ValueError: data that is missing, unreadable, empty, no UTF-8, or whose
            characters the tokenizer does not have.
        ValueError: a shard in the cache is damaged; it is named.
        OSError: the cache cannot be written; nothing half written is left.
    """
    if tokenizer is None and config.tokenizer not in ("byte", "character", "bpe"):
        if not Path(config.tokenizer).exists():
            raise FileNotFoundError(f"data.tokenizer: {config.tokenizer} is none of byte, character, bpe, and no path")
        tokenizer = load_tokenizer(config.tokenizer)
    corpus = open_corpus(config)
    split = split_corpus(corpus, config.held_out)
    kind = tokenizer.fingerprint if tokenizer else f"{config.tokenizer} {config.vocab_size} {config.unknown}"
    key = hashlib.sha256(f"{FORMAT} {split.fingerprint} {kind} {config.held_out}".encode()).hexdigest()[:32]
    folder = (Path(config.cache) if config.cache else cache_folder() / "tokens") / key
    if not folder.is_dir():
        tokenizer = tokenizer or _make_tokenizer(config, corpus, split, say)
        _write(folder, corpus, split, tokenizer, say)
    return read_tokens(folder, key)


def _make_tokenizer(config: DataConfig, corpus: Corpus, split: Split, say: Callable[[str], None]) -> Tokenizer:
    if config.tokenizer == "byte":
        return byte_tokenizer()
    if config.tokenizer == "character":
        return character_tokenizer(corpus, config.unknown)  # of the whole text, held-out part included
    say(f"training a byte-level BPE of {config.vocab_size:,} tokens")
    return train_bpe(split.part(corpus, held_out=False), config.vocab_size)


def _write(folder: Path, corpus: Corpus, split: Split, tokenizer: Tokenizer, say: Callable[[str], None]) -> None:
    """Write the folder of a tokenised text beside its place and move it there once it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        index: dict[str, Any] = {"format": FORMAT, "vocab_size": tokenizer.vocab_size}
        index["tokenizer"] = tokenizer.fingerprint
        for name, held_out in (("train", False), ("held_out", True)):
            index[name] = _write_split(temporary, name, split.part(corpus, held_out), tokenizer)
        say(f"tokenised {(index['train']['bytes'] + index['held_out']['bytes']) / 1e6:.1f} MB of text")
        index["crc32"] = _checksum(index)
        tokenizer.save(temporary / "tokenizer.json")
        (temporary / "index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        # Another process may have made the same folder meanwhile; the contents are the same, so either will do.
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_split(folder: Path, name: str, documents: Iterator[str], tokenizer: Tokenizer) -> dict[str, Any]:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    description: dict[str, Any] = {"documents": 0, "bytes": 0, "shards": []}

    def pieces() -> Iterator[np.ndarray]:
        separator = np.array([tokenizer.separator], dtype)
        while batch := list(itertools.islice(documents, DOCUMENTS_AT_ONCE)):
            for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                if description["documents"]:
                    yield separator  # between documents, and only there
                description["documents"] += 1
                description["bytes"] += len(text.encode())
                yield ids.astype(dtype)

    for number, tokens in enumerate(_in_shards(pieces(), dtype)):
        file = f"{name}-{number:05d}.npy"
        np.save(folder / file, tokens, allow_pickle=False)
        description["shards"].append({"file": file, "tokens": len(tokens), "crc32": zlib.crc32(tokens.data)})
    return description


def _in_shards(pieces: Iterator[np.ndarray], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Join pieces to arrays of SHARD_TOKENS tokens, the last one shorter (and never none at all)."""
    held, size, first = [np.empty(0, dtype)], 0, True
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        while size >= SHARD_TOKENS:
            joined = np.concatenate(held)
            yield joined[:SHARD_TOKENS]
            held, size, first = [joined[SHARD_TOKENS:]], size - SHARD_TOKENS, False
    if size or first:
        yield np.concatenate(held)


def read_tokens(folder: Path, fingerprint: str) -> TokenizedText:
    """Open the folder of a tokenised text and check every byte of it.

    Raises:
        ValueError: a file is missing or damaged; it is named.
    """
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text("utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"index.json is of format {index['format']}, not {FORMAT}")
        if index.pop("crc32") != _checksum(index):
            raise ValueError("index.json does not have the checksum it was written with")
        streams = [_open_split(folder, index[name], index["vocab_size"]) for name in ("train", "held_out")]
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        if tokenizer.fingerprint != index["tokenizer"]:
            raise ValueError("tokenizer.json is not the one the text was tokenised with")
    except (KeyError, TypeError, OSError, ValueError, RecursionError) as error:
        unreadable = not isinstance(error, OSError) and type(error) is not ValueError
        reason = f"{path.name} is not what was written" if unreadable else error
        raise ValueError(f"damaged tokens in {folder}: {reason}; delete that folder to make them anew") from error
    return TokenizedText(tokenizer, fingerprint, *streams)


def _checksum(index: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(index).encode())


def _open_split(folder: Path, description: dict[str, Any], vocab_size: int) -> TokenStream:
    shards = []
    for entry in description["shards"]:
        name = entry["file"]
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise ValueError(f"index.json names a file {name!r} outside the folder")
        # Mapped, and read where it is needed: the tokens need not fit into memory. `open_memmap` takes arrays only,
        # where `np.load` would also open an archive.
        try:
            tokens = np.lib.format.open_memmap(folder / name, mode="r")
        except (ValueError, SyntaxError, tokenize.TokenError, OverflowError) as error:  # by what is wrong in its header
            raise ValueError(f"{name} is not an array of tokens") from error
        if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32) or len(tokens) != entry["tokens"]:
            raise ValueError(f"{name} does not have the shape it was written with")
        if zlib.crc32(tokens.data) != entry["crc32"]:
            raise ValueError(f"{name} does not have the checksum it was written with")
        if len(tokens) and int(tokens.max()) >= vocab_size:
            raise ValueError(f"{name} has token {int(tokens.max())}, beyond the vocabulary of {vocab_size}")
        shards.append(tokens)
    if not shards:
        raise ValueError("index.json names no shard")
    return TokenStream(tuple(shards), description["documents"], description["bytes"])
