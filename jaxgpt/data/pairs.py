"""Parallel text: pairs of a source and its target, from aligned files, TSV, JSON lines, or made by rule."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from jaxgpt.config import PairsConfig
from jaxgpt.data.corpus import decode_lines, json_field, json_records
from jaxgpt.data.phrases import Pair, phrases
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

SHOWN = 40  # characters of a sentence that a message shows


@dataclass(frozen=True)
class PairCorpus:
    """Pairs to train on and pairs held out, and what identifies them."""

    train: list[Pair]
    held_out: list[Pair]
    fingerprint: str


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs as token ids, without start or end tokens."""

    source: list[np.ndarray]
    target: list[np.ndarray]
    text: list[Pair]

    def __len__(self) -> int:
        return len(self.source)


@dataclass
class Dropped:
    """How many pairs of those called `name` were left out and why, each reason with the first pair it was met in."""

    name: str
    reasons: dict[str, tuple[int, Pair]] = field(default_factory=dict)

    def add(self, reason: str, pair: Pair) -> None:
        """Count one pair."""
        count, first = self.reasons.get(reason, (0, pair))
        self.reasons[reason] = (count + 1, first)

    def report(self, kept: int) -> Iterator[str]:
        """One line for each reason."""
        total = kept + sum(count for count, _ in self.reasons.values())
        for reason, (count, (source, target)) in self.reasons.items():
            first = f"{source[:SHOWN]!r} -> {target[:SHOWN]!r}"
            yield f"{self.name}: {count:,} of {total:,} pairs left out, {reason} (the first: {first})"


def open_pairs(config: PairsConfig) -> PairCorpus:
    """Read the pairs of `config.path` and `config.validation`; with none, those made by rule (see `data.phrases`).

    Without `validation`, a share `held_out` of the pairs is held out: those of the smallest digests of their sources,
    so that equal sources are always on the same side.

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError: files of different lengths, a malformed line (named), or no pair at all.
    """
    if not config.path:
        train, held_out = phrases()
    else:
        train = read_pairs(config.path, config.source_field, config.target_field, "data.path")
        if config.validation:
            held_out = read_pairs(config.validation, config.source_field, config.target_field, "data.validation")
        else:
            train, held_out = _split(train, config.held_out)
    whole = hashlib.sha256(json.dumps([train, held_out]).encode())
    return PairCorpus(train, held_out, whole.hexdigest())


def read_pairs(paths: Sequence[str], source_field: str, target_field: str, option: str) -> list[Pair]:
    """Read pairs from two aligned text files (source, target), or from one .tsv or .jsonl file.

    Raises: as `open_pairs`.
    """
    files = [Path(path) for path in paths]
    for path in files:
        if not path.exists() or path.is_dir():
            raise FileNotFoundError(f"{option}: there is no file {path}")
    if len(files) == 2:
        pairs = _aligned(*files)
    elif len(files) != 1:
        raise ValueError(f"{option} takes two aligned text files, source and target, or one file, not {len(files)}")
    elif files[0].suffix == ".jsonl":
        pairs = [
            (json_field(record, source_field, where), json_field(record, target_field, where))
            for record, where in json_records(files[0])
        ]
    elif files[0].suffix == ".tsv":
        pairs = _columns(files[0])
    else:
        raise ValueError(f"{option}: {files[0]} alone is neither .tsv nor .jsonl; give the aligned file of targets too")
    if not pairs:
        raise ValueError(f"{option}: {' and '.join(map(str, files))} hold no pair")
    return pairs


def read_lines(path: Path) -> list[str]:
    """Read a text file as lines, which only a newline ends (a carriage return before it goes).

    Raises:
        ValueError: it is not UTF-8.
    """
    with path.open("rb") as file:
        return list(decode_lines(file, str(path)))


def _aligned(source: Path, target: Path) -> list[Pair]:
    left, right = read_lines(source), read_lines(target)
    if len(left) != len(right):
        line = where_they_part(left, right)
        hint = "" if line is None else f"; they seem to part at line {line:,}"
        raise ValueError(f"{source} has {len(left):,} lines and {target} {len(right):,}: they are not aligned{hint}")
    return list(zip(left, right, strict=True))


def where_they_part(left: Sequence[str], right: Sequence[str]) -> int | None:
    """Return the line (from 1) from which two files are shifted against each other; None if that cannot be told.

    By their lengths: translations are about as long as each other. The line is the one before which the pairs as they
    stand, and after which the pairs shifted by the difference, fit best.
    """
    shift, common = len(left) - len(right), min(len(left), len(right))
    if common == 0:
        return None
    straight = _misfit(left[:common], right[:common])
    shifted = _misfit(left[max(shift, 0) :], right[max(-shift, 0) :])
    costs = np.concatenate([[0.0], np.cumsum(straight)]) + np.concatenate([np.cumsum(shifted[::-1])[::-1], [0.0]])
    best = int(np.argmin(costs))
    return best + 1 if costs[best] < 0.9 * costs.max() else None  # otherwise it makes little difference where


def _misfit(left: Sequence[str], right: Sequence[str]) -> Float64[np.ndarray, " n"]:
    lengths = np.array([(len(a) + 1.0, len(b) + 1.0) for a, b in zip(left, right, strict=True)])
    return np.abs(np.log(lengths[:, 0] / lengths[:, 1]))


def _columns(path: Path) -> list[Pair]:
    pairs = []
    for number, line in enumerate(read_lines(path), 1):
        columns = line.split("\t")
        if len(columns) != 2:
            tabs = len(columns) - 1
            raise ValueError(f"{path}, line {number}, has {tabs} tabs; it must have one, between source and target")
        pairs.append((columns[0], columns[1]))
    return pairs


def _split(pairs: list[Pair], share: float) -> tuple[list[Pair], list[Pair]]:
    digests = [hashlib.sha256(source.encode()).digest() for source, _ in pairs]
    distinct = sorted(set(digests))
    held_out = set(distinct[: min(max(1, round(share * len(distinct))), len(distinct) - 1)])
    if not held_out:
        raise ValueError("the data has one source sentence, so none can be held out; give data.validation")
    kept = [pair for pair, digest in zip(pairs, digests, strict=True) if digest not in held_out]
    return kept, [pair for pair, digest in zip(pairs, digests, strict=True) if digest in held_out]


def joint_tokenizer(config: PairsConfig, pairs: Sequence[Pair]) -> Tokenizer:
    """One byte-level BPE for both languages, trained on both sides; or the one that `config.tokenizer` names."""
    if config.tokenizer != "bpe":
        return load_tokenizer(config.tokenizer)
    return train_bpe((text for pair in pairs for text in pair), config.vocab_size)


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[Pair], max_source: int, max_target: int, dropped: Dropped
) -> EncodedPairs:
    """Turn pairs into ids; leave out those with an empty side or more tokens than the limits, and count them.

    Raises:
        ValueError: none is left.
    """
    sides = [tokenizer.encode_batch([pair[side] for pair in pairs]) for side in (0, 1)]
    kept = []
    for number, (source, target) in enumerate(zip(*sides, strict=True)):
        empty = [side for side, text in zip(("source", "target"), pairs[number], strict=True) if not text.strip()]
        if empty:
            dropped.add(f"their {empty[0]} is empty", pairs[number])
        elif len(source) > max_source:
            dropped.add(f"their source has more than {max_source} tokens", pairs[number])
        elif len(target) > max_target:
            dropped.add(f"their target has more than {max_target} tokens", pairs[number])
        else:
            kept.append(number)
    if not kept:
        raise ValueError("no pair is left: " + "; ".join(dropped.report(0)))
    source, target = ([side[number].astype(np.int32) for number in kept] for side in sides)
    return EncodedPairs(source, target, [pairs[number] for number in kept])
