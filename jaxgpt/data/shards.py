"""Tokens on disk: a text is tokenised once into memory-mapped shards, found again by its content."""

from __future__ import annotations

import bisect
import functools
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

from jaxgpt.config import DataConfig, from_dict, to_dict
from jaxgpt.data.corpus import PREPARED, Corpus, is_prepared, open_corpus
from jaxgpt.data.encoding import encoded, given_tokenizer, make_tokenizer, token_type
from jaxgpt.data.split import Split, split_corpus
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.environment import cache_folder

FORMAT = 3
SHARD_TOKENS = 2**26
SETTLED = ("text_field", "tokenizer", "vocab_size", "unknown", "held_out")  # by what a prepared folder was made with


@dataclass(frozen=True)
class TokenStream:
    """The tokens of one split, in order, over any number of shards; `bytes` counts the UTF-8 text they stand for."""

    shards: tuple[UInt[np.ndarray, " _"], ...]  # each of its own length
    documents: int
    bytes: int

    def __len__(self) -> int:
        return self._ends[-1]

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(map(len, self.shards)))

    def read(self, start: int, stop: int) -> UInt[np.ndarray, " n"]:
        """Return tokens `start` to `stop`, read from disk as needed."""
        pieces, number = [], bisect.bisect_right(self._ends, start)
        while start < min(stop, len(self)):
            shard, end = self.shards[number], self._ends[number]
            pieces.append(shard[len(shard) - (end - start) :][: stop - start])
            start, number = end, number + 1
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
    """Tokenise the text of a config, or find it tokenised already: in the cache, or by `jaxgpt prepare`.

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
    if len(config.path) == 1 and is_prepared(Path(config.path[0])):
        return _open_prepared(Path(config.path[0]), config, tokenizer)
    tokenizer = tokenizer or given_tokenizer(config)
    corpus = open_corpus(config)
    split = split_corpus(corpus, config.held_out)
    key = content_key(config, split, tokenizer)
    folder = (Path(config.cache) if config.cache else cache_folder() / "tokens") / key
    if not folder.is_dir():
        tokenizer = tokenizer or make_tokenizer(config, corpus, split, say)
        _write(folder, corpus, split, tokenizer, say)
    return read_tokens(folder, key)


def content_key(config: DataConfig, split: Split, tokenizer: Tokenizer | None) -> str:
    """A digest of everything that decides the tokens; `tokenizer` is the one given, if one is."""
    kind = tokenizer.fingerprint if tokenizer else f"{config.tokenizer} {config.vocab_size} {config.unknown}"
    return hashlib.sha256(f"{FORMAT} {split.fingerprint} {kind} {config.held_out}".encode()).hexdigest()[:32]


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
        index["crc32"] = manifest_checksum(index)
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
    dtype = token_type(tokenizer)
    description: dict[str, Any] = {"documents": 0, "bytes": 0, "shards": []}

    def pieces() -> Iterator[np.ndarray]:
        separator = np.array([tokenizer.separator], dtype)
        for text, ids in encoded(documents, tokenizer):
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
    _, tokenizer, train, held_out = _read(folder, "index.json")
    return TokenizedText(tokenizer, fingerprint, train, held_out)


def _read(folder: Path, manifest: str) -> tuple[dict[str, Any], Tokenizer, TokenStream, TokenStream]:
    try:
        index = json.loads((folder / manifest).read_text("utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"{manifest} is of format {index['format']}, not {FORMAT}")
        if index.pop("crc32") != manifest_checksum(index):
            raise ValueError(f"{manifest} does not have the checksum it was written with")
        train, held_out = (_open_split(folder, manifest, index, name) for name in ("train", "held_out"))
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        if tokenizer.fingerprint != index["tokenizer"]:
            raise ValueError("tokenizer.json is not the one the text was tokenised with")
    except (KeyError, TypeError, AttributeError, OSError, ValueError, RecursionError) as error:
        unreadable = not isinstance(error, OSError) and type(error) is not ValueError
        reason = f"{manifest} is not what was written" if unreadable else error
        raise ValueError(f"damaged tokens in {folder}: {reason}; delete that folder to make them anew") from error
    return index, tokenizer, train, held_out


def adopted(config: DataConfig) -> DataConfig:
    """A config whose path is a prepared folder, with what that was made with; any other as it is.

    Raises:
        ValueError: the folder is damaged or not done.
    """
    if len(config.path) != 1 or not is_prepared(Path(config.path[0])):
        return config
    path = Path(config.path[0]) / PREPARED
    if not path.is_file():
        raise ValueError(f"{path.parent} is not prepared to the end; start jaxgpt prepare for it again")
    try:
        settled = json.loads(path.read_text("utf-8"))["settled"]
        return from_dict(DataConfig, to_dict(config) | {name: settled[name] for name in SETTLED})
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"damaged tokens in {path.parent}: {PREPARED} is not what was written") from error


def _open_prepared(folder: Path, config: DataConfig, tokenizer: Tokenizer | None) -> TokenizedText:
    """The tokens of a prepared folder, which a config and a given tokenizer must not contradict."""
    own = adopted(config)
    index, found, train, held_out = _read(folder, PREPARED)
    for name in SETTLED:
        asked, there = getattr(config, name), getattr(own, name)
        if asked != there and tokenizer is None:
            flag = name.replace("_", "-")
            raise ValueError(f"data.{flag} is {asked}, but {folder} was prepared with {there}; leave it out")
    if tokenizer is not None and tokenizer.fingerprint != found.fingerprint:
        raise ValueError(
            f"{folder} was prepared with another tokenizer than that of the model of init-from; prepare it with "
            "--tokenizer and that model's folder"
        )
    if not isinstance(index.get("fingerprint"), str):
        raise ValueError(f"damaged tokens in {folder}: {PREPARED} has no fingerprint")
    return TokenizedText(found, index["fingerprint"], train, held_out)


def manifest_checksum(index: dict[str, Any]) -> int:
    """CRC-32 of a manifest without its own."""
    return zlib.crc32(json.dumps(index).encode())


def _open_split(folder: Path, manifest: str, index: dict[str, Any], split: str) -> TokenStream:
    description, shards = index[split], list[np.ndarray]()
    for entry in description["shards"]:
        name = entry["file"]
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise ValueError(f"{manifest} names a file {name!r} outside the folder")
        tokens = open_array(folder / name)
        if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32) or len(tokens) != entry["tokens"]:
            raise ValueError(f"{name} does not have the shape it was written with")
        if zlib.crc32(tokens.data) != entry["crc32"]:
            raise ValueError(f"{name} does not have the checksum it was written with")
        if len(tokens) and int(tokens.max()) >= index["vocab_size"]:
            raise ValueError(f"{name} has token {int(tokens.max())}, beyond the vocabulary of {index['vocab_size']}")
        shards.append(tokens)
    if not shards:
        raise ValueError(f"{manifest} names no shard")
    if index.get("separated") == "after":  # each document; between them is what training reads
        shards[-1] = shards[-1][:-1]
    return TokenStream(tuple(shards), description["documents"], description["bytes"])


def open_array(path: Path) -> np.memmap:
    """Map an array of a file into memory, to be read where it is needed: it need not fit.

    Raises:
        OSError, ValueError: there is no such file, or it is no array.
    """
    # `open_memmap` takes arrays only, where `np.load` would also open an archive.
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (ValueError, SyntaxError, tokenize.TokenError, OverflowError) as error:  # by what is wrong in its header
        raise ValueError(f"{path.name} is not an array of tokens") from error
