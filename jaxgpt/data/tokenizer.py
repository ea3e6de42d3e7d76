"""Text to token ids and back: bytes, characters, or a byte-level BPE, each one Rust `tokenizers` object.

All three are BPE models of that library, bytes and characters simply without merges; so each is saved as one
`tokenizer.json`, and other programs can read it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unknown|>"
# The Rust library needs about 150 bytes for each byte that it encodes at a time; so a long text goes to it in pieces.
PIECE = 2**18  # characters of a piece
CHARACTERS_AT_ONCE = 2**23  # characters of the pieces that are encoded together, on all cores
# What a piece may end with. GPT-2's words never reach from a character that is no space into the space behind it.
WORD_END = re.compile(r"\S(?=[ \n])")
ANYWHERE = re.compile(r".", re.DOTALL)


class Tokenizer:
    """Encodes and decodes text. User text never becomes a special token: "<|endoftext|>" is spelled out like any other.

    `decode(encode(text)) == text` for every valid string where the vocabulary covers bytes, and for every string that
    a character vocabulary accepts.
    """

    def __init__(self, rust: tokenizers.Tokenizer) -> None:
        """Wrap a Rust tokenizer."""
        rust.encode_special_tokens = True  # not saved in the JSON, so set for every object
        # A file from elsewhere may ask for these, and text would be cut or filled up without a word.
        rust.no_truncation()
        rust.no_padding()
        self._rust = rust
        self.end_of_text: int | None = rust.token_to_id(END_OF_TEXT)
        vocabulary = rust.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        # A BPE without an unknown token drops what it does not know and says nothing.
        description = json.loads(rust.to_str())
        by_bytes = "ByteLevel" in json.dumps(description["pre_tokenizer"])
        known = description["model"].get("unk_token") or (by_bytes and vocabulary.keys() >= BYTE_CHARACTERS.keys())
        self._alphabet = None if known else frozenset(vocabulary)
        self._spell = _spell_bytes if by_bytes else str
        self._cut = _where_to_cut(description)
        self.special_tokens: dict[str, int] = {
            t["content"]: t["id"] for t in description["added_tokens"] if t["special"]
        }

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size:,} tokens)"

    @property
    def separator(self) -> int:
        """The end-of-text token, which stands between documents.

        Raises:
            ValueError: the tokenizer has none.
        """
        if self.end_of_text is None:
            raise ValueError(f"the tokenizer has no {END_OF_TEXT} token, which separates documents")
        return self.end_of_text

    def same_tokens(self, other: Tokenizer) -> bool:
        """Whether every id stands for the same in both."""
        mine, theirs = (one._rust.get_vocab(with_added_tokens=True) for one in (self, other))
        return mine == theirs

    def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """Return the ids of `text`; only with `special_tokens` does "<|endoftext|>" in it become that one token.

        Raises:
            ValueError: a character outside a character vocabulary (named, with its position), or a lone surrogate.
        """
        if not special_tokens or not self.special_tokens:
            return self.encode_batch([text])[0].tolist()
        names = sorted(self.special_tokens, key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, names))})", text)
        ids = [own.tolist() for own in self.encode_batch(pieces[::2])]
        special = [[self.special_tokens[name]] for name in pieces[1::2]]
        return [token for pair in zip(ids, [*special, []], strict=True) for part in pair for token in part]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text (uint32 arrays), on all cores. Raises as `encode` does."""
        for text in texts:
            self.check(text)
        pieces = [list(_pieces(text, self._cut)) for text in texts]
        ids = self._encode_pieces(piece for own in pieces for piece in own)
        return [np.concatenate([next(ids) for _ in own]) for own in pieces]

    def _encode_pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        for together in _batches(pieces, CHARACTERS_AT_ONCE):
            # Without special tokens: a file from elsewhere may add some around every text it encodes.
            for encoding in self._rust.encode_batch_fast(together, add_special_tokens=False):
                yield np.array(encoding.ids, np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; special tokens are left out, and bytes that are no UTF-8 become U+FFFD."""
        return self._rust.decode(list(ids), skip_special_tokens=True)

    def name(self, token: int) -> str:
        """One token for a person to read: its text, on one line, or its number where it has none."""
        text = self._rust.decode([token], skip_special_tokens=False)
        return text.replace("\n", "\\n").replace("\t", "\\t") if text else f"<{token}>"

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of `ids` in pieces as they come, a piece only once its characters are whole."""
        pieces = self.pieces()
        for token in ids:
            if piece := pieces.push(token):
                yield piece
        if rest := pieces.rest():
            yield rest

    def pieces(self) -> Pieces:
        """A decoder for ids that come one at a time."""
        return Pieces(self._rust)

    def to_json(self, *, pretty: bool = False) -> str:
        """What tokenizer.json holds."""
        return self._rust.to_str(pretty=pretty)

    def save(self, path: Path) -> None:
        """Write tokenizer.json, whole or not at all."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(self.to_json(pretty=True), "utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @property
    def fingerprint(self) -> str:
        """A digest of everything that decides the ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def check(self, text: str) -> None:
        """Raise `ValueError` as `encode` would, if it would."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has a lone surrogate, U+{ord(text[error.start]):04X}, at position {error.start}, "
                "which is no character"
            ) from error
        if self._alphabet is None:
            return
        outside = {character for character in set(text) if not self._alphabet.issuperset(self._spell(character))}
        if outside:
            position = next(position for position, character in enumerate(text) if character in outside)
            raise ValueError(
                f"the character {text[position]!r} (U+{ord(text[position]):04X}) at position {position} is not in the "
                f"tokenizer's vocabulary of {self.vocab_size} tokens"
            )


class Pieces:
    """Turns ids that come one at a time into text, never half a character."""

    def __init__(self, rust: tokenizers.Tokenizer) -> None:
        self._rust, self._decoder = rust, decoders.DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Add one id; return the text that is whole now, often none."""
        self._pending.append(token)
        piece: str | None = self._decoder.step(self._rust, token)
        if piece is None:
            return ""
        self._pending = []
        return piece

    def rest(self) -> str:
        """The text of what never became whole, with U+FFFD for what is no UTF-8."""
        return self._rust.decode(self._pending, skip_special_tokens=True)


def byte_tokenizer() -> Tokenizer:
    """256 byte tokens, the id is the byte, and end-of-text."""
    rust = tokenizers.Tokenizer(models.BPE(BYTE_CHARACTERS, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([END_OF_TEXT])
    return Tokenizer(rust)


def character_tokenizer(texts: Iterable[str], unknown: Literal["error", "token"] = "error") -> Tokenizer:
    """The characters of `texts` in code-point order, then, if asked for, an unknown token, and end-of-text."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    names = sorted(characters) + ([UNKNOWN] if unknown == "token" else [])
    vocabulary = {name: number for number, name in enumerate(names)}
    options: dict[str, Any] = {"unk_token": UNKNOWN} if unknown == "token" else {}
    rust = tokenizers.Tokenizer(models.BPE(vocabulary, [], **options))
    rust.decoder = decoders.Fuse()
    rust.add_special_tokens([*([UNKNOWN] if unknown == "token" else []), END_OF_TEXT])
    return Tokenizer(rust)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019, section 2.2) of `vocab_size` tokens.

    The last id is end-of-text, as in GPT-2. A small corpus may not have so many pairs; then there are fewer tokens.
    """
    rust = tokenizers.Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=sorted(BYTE_CHARACTERS), show_progress=False
    )
    rust.train_from_iterator((piece for text in texts for piece in _pieces(text, WORD_END)), trainer)
    rust.add_special_tokens([END_OF_TEXT])
    return Tokenizer(rust)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer.json, or a folder with one, or with GPT-2's two files under either of their names.

    Raises:
        FileNotFoundError: there is no tokenizer at `path`.
        ValueError: what is there cannot be read; the file is named.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"there is no tokenizer at {path}")
        return _guarded(path, lambda: tokenizers.Tokenizer.from_str(path.read_text("utf-8")))
    if (path / "tokenizer.json").is_file():
        return load_tokenizer(path / "tokenizer.json")
    for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (path / vocabulary).is_file() and (path / merges).is_file():
            return _guarded(path, lambda: _from_vocabulary(path, vocabulary, merges))  # noqa: B023
    raise FileNotFoundError(
        f"{path} has no tokenizer.json, no vocab.json with merges.txt, no encoder.json with vocab.bpe"
    )


def _from_vocabulary(folder: Path, vocabulary: str, merges: str) -> tokenizers.Tokenizer:
    """GPT-2's byte-level BPE; or, where words end in "</w>", the first GPT's, lower-case (Radford et al. 2018)."""
    known, pairs = models.BPE.read_file(str(folder / vocabulary), str(folder / merges))
    if any(token.endswith("</w>") for token in known):
        rust = tokenizers.Tokenizer(models.BPE(known, pairs, unk_token="<unk>", end_of_word_suffix="</w>"))
        rust.normalizer = normalizers.BertNormalizer(lowercase=True)
        rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        rust.decoder = decoders.BPEDecoder(suffix="</w>")
    else:
        rust = tokenizers.Tokenizer(models.BPE(known, pairs))
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        rust.decoder = decoders.ByteLevel()
        rust.add_special_tokens([END_OF_TEXT])
    if (folder / "added_tokens.json").is_file():
        added: dict[str, int] = json.loads((folder / "added_tokens.json").read_text("utf-8"))
        rust.add_special_tokens(sorted(added, key=lambda token: added[token]))
        if wrong := [token for token, number in added.items() if rust.token_to_id(token) != number]:
            raise ValueError(
                f"added_tokens.json gives {wrong[0]} the id {added[wrong[0]]}, which is not the next free one"
            )
    return rust


def _guarded(path: Path, read: Callable[[], tokenizers.Tokenizer]) -> Tokenizer:
    """Turn whatever a damaged file makes the Rust library do into one error that names the file."""
    try:
        return Tokenizer(read())
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # Rust panics arrive as PanicException, which is no Exception
        raise ValueError(f"{path} is not a tokenizer that can be read: {error}") from error


def _where_to_cut(description: dict[str, Any]) -> re.Pattern[str] | None:
    """Return where a text can be cut so that the ids of the pieces are those of the text; None if that is not known."""
    model, before = description["model"], description["pre_tokenizer"] or {"type": None}
    by_bytes = before["type"] == "ByteLevel" and not before["add_prefix_space"]
    plain = model["type"] == "BPE" and not model["continuing_subword_prefix"] and not model["end_of_word_suffix"]
    added = any(not token["special"] for token in description["added_tokens"])  # these are looked for in the text
    if not plain or added or description["normalizer"]:
        return None
    if not model["merges"] and (by_bytes or before["type"] is None):
        return ANYWHERE
    return WORD_END if by_bytes and before["use_regex"] else None


def _pieces(text: str, cut: re.Pattern[str] | None) -> Iterator[str]:
    """Yield a text in pieces of PIECE characters, or a few more, up to a place where it may be cut."""
    start = 0
    while cut and len(text) - start > PIECE and (last := cut.search(text, start + PIECE - 1)):
        yield text[start : last.end()]
        start = last.end()
    yield text[start:]


def _batches(pieces: Iterable[str], characters: int) -> Iterator[list[str]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece)
        if size >= characters:
            yield batch
            batch, size = [], 0
    yield batch


def _spell_bytes(character: str) -> list[str]:
    """The printable characters that stand for the bytes of one character."""
    return [CHARACTERS_OF_BYTES[byte] for byte in character.encode()]


def _byte_characters() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table) -> the byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    stands_for = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return {stands_for[byte]: byte for byte in range(256)}


BYTE_CHARACTERS = _byte_characters()
CHARACTERS_OF_BYTES = {byte: character for character, byte in BYTE_CHARACTERS.items()}
