"""`jaxgpt prepare`: a large corpus to a folder of token shards, part by part, by many workers, whatever interrupts it.

Two passes over the parts, which any number of workers share: the first records a digest of each document, from which
follows what is held out; the second tokenises. What a worker has finished lies in a file of its own, put in its place
whole, so a start looks what is there and does the rest. The folder's tokens, and so its fingerprint, are those that
`data.shards.prepare` would make of the same text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.config import DataConfig
from jaxgpt.data.corpus import PREPARED, UNFINISHED, Corpus, open_corpus
from jaxgpt.data.encoding import given_tokenizer, make_tokenizer
from jaxgpt.data.parts import Part, cut_corpus
from jaxgpt.data.shards import FORMAT, SETTLED, content_key, manifest_checksum
from jaxgpt.data.split import RECORD, Split, decide_split
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.data.work import SPLITS, Work, put, read_receipt, read_records, record, tokenise
from jaxgpt.data.workers import Mapper


@dataclass(frozen=True)
class Progress:
    """How far it is: bytes of text, of which `before` were done by an earlier start."""

    doing: str
    done: int
    total: int
    before: int


Show = Callable[[Progress], None]


def prepare_folder(
    config: DataConfig,
    folder: Path,
    run: Mapper,
    *,
    shard_bytes: int = 2**26,
    say: Callable[[str], None] = lambda line: None,
    show: Show = lambda progress: None,
) -> None:
    """Tokenise the text of a config into `folder`, or go on with that.

    Args:
        config: its path, text field, tokenizer, vocabulary size and share held out count; the rest does not.
        run: who does it: `data.workers.in_processes`, or one of `data.clusters`.
        shard_bytes: of text in a shard, about; a document is never cut.
        say: told, in a line, what has been done.
        show: told how far it is.

    Raises:
        FileNotFoundError, PermissionError, ValueError: data or a tokenizer that is missing, unreadable, or no good;
            text that was changed meanwhile.
        FileExistsError: `folder` holds something else, or another process is at work in it.
        OSError: it cannot be written; what is done stays.
    """
    if not config.path or "-" in config.path:
        raise ValueError("data.path must name files or folders: the text is read several times")
    corpus = open_corpus(config)
    parts = cut_corpus([path for path in corpus.files if path is not None], config.text_field, shard_bytes)
    given = given_tokenizer(config)
    plan = _plan(config, parts, given)
    _check_free(folder, plan)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if (folder / PREPARED).is_file():
            say(f"{folder} is prepared already")
            return
        _begin(folder, plan)
        works = [Work(folder, number, part) for number, part in enumerate(parts)]
        _run(record, [work for work in works if read_records(work) is None], works, run, show, "reading")
        split = _decide(works, config.held_out)
        tokenizer = _settle(folder, config, corpus, split, given, say)
        works = [dataclasses.replace(work, split=split) for work in works]
        _run(tokenise, [work for work in works if read_receipt(work) is None], works, run, show, "tokenising")
        index = _index(works, tokenizer, split, plan, content_key(config, split, given))
        put(folder / PREPARED, lambda file: file.write((json.dumps(index, indent=2) + "\n").encode()))
        shutil.rmtree(folder / UNFINISHED)
    tokens = {name: sum(entry["tokens"] for entry in index[name]["shards"]) for name in SPLITS}
    say(
        f"{split.documents:,} document(s), {index['train']['bytes'] + index['held_out']['bytes']:,} bytes: "
        f"{tokens['train']:,} tokens to train on, {tokens['held_out']:,} held out; "
        f"a vocabulary of {tokenizer.vocab_size:,}"
    )


def _plan(config: DataConfig, parts: list[Part], given: Tokenizer | None) -> dict[str, Any]:
    """What the folder is made of, to be compared at the next start.

    Raises:
        ValueError: the tokenizer given has no token to separate documents by.
    """
    settled = {name: getattr(config, name) for name in SETTLED}
    if given is not None:
        settled["tokenizer"] = os.path.abspath(config.tokenizer)
    pieces = [piece for part in parts for piece in part.pieces]
    ranges = [[(piece.start, piece.stop) for piece in part.pieces] for part in parts]
    files = {os.path.abspath(piece.path): piece.path.stat() for piece in pieces if piece.start == 0}
    return {
        "format": FORMAT,
        "settled": settled,
        "given": None if given is None else [given.fingerprint, given.separator],
        "files": [[path, status.st_size, status.st_mtime_ns] for path, status in files.items()],
        "parts": hashlib.sha256(json.dumps(ranges).encode()).hexdigest(),
    }


def _digest(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan).encode()).hexdigest()


def _check_free(folder: Path, plan: dict[str, Any]) -> None:
    """Raise `FileExistsError` if a folder is neither new nor of this plan."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; give another --out")
    finished, begun = folder / PREPARED, folder / UNFINISHED / "plan.json"
    if not finished.exists() and not begun.parent.exists():
        if any(folder.iterdir()):
            raise FileExistsError(f"{folder} holds other files; give another --out")
        return
    try:
        if finished.exists():
            same = json.loads(finished.read_bytes())["plan"] == _digest(plan)
        else:  # without a plan nothing has been begun
            same = not begun.exists() or json.loads(begun.read_bytes()) == plan
    except (ValueError, KeyError, TypeError, RecursionError):
        same = False
    if not same:
        raise FileExistsError(
            f"{folder} was made of other text, of text that has changed since, or with other settings; give another "
            "--out, or delete it"
        )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; the system ends that with the process, however it ends."""
    import fcntl  # not on every system

    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise FileExistsError(f"another jaxgpt prepare is at work in {folder}") from error
    try:
        yield
    finally:
        os.close(lock)


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    (folder / UNFINISHED).mkdir(exist_ok=True)
    for place in (folder, folder / UNFINISHED):
        for path in place.glob(".*.tmp"):  # of workers that were killed
            path.unlink()
    put(folder / UNFINISHED / "plan.json", lambda file: file.write(json.dumps(plan).encode()))


def _run(
    function: Callable[[Work], int], missing: list[Work], works: list[Work], run: Mapper, show: Show, doing: str
) -> None:
    total = sum(work.part.bytes for work in works)
    before = done = total - sum(work.part.bytes for work in missing)
    show(Progress(doing, done, total, before))
    for size in run(function, missing):
        done += size
        show(Progress(doing, done, total, before))


def _decide(works: list[Work], share: float) -> Split:
    found = [read_records(work) for work in works]
    records = np.concatenate([np.empty(0, RECORD), *(own for own in found if own is not None)])
    if not len(records):
        raise ValueError(f"the data holds no text; {len(works)} part(s) of it were read")
    return decide_split(records, share)


def _settle(
    folder: Path, config: DataConfig, corpus: Corpus, split: Split, given: Tokenizer | None, say: Callable[[str], None]
) -> Tokenizer:
    """The folder's tokenizer: the one given, or one made of the text, which a later start finds and checks."""
    path, checked = folder / "tokenizer.json", folder / UNFINISHED / "tokenizer.sha256"
    with contextlib.suppress(OSError):
        if given is None and checked.read_bytes() == hashlib.sha256(path.read_bytes()).digest():
            return load_tokenizer(path)
    tokenizer = given or make_tokenizer(config, corpus, split, say)
    tokenizer.save(path)
    put(checked, lambda file: file.write(hashlib.sha256(path.read_bytes()).digest()))
    return tokenizer


def _index(works: list[Work], tokenizer: Tokenizer, split: Split, plan: dict[str, Any], key: str) -> dict[str, Any]:
    """The manifest."""
    index: dict[str, Any] = {"format": FORMAT, "fingerprint": key, "plan": _digest(plan), "settled": plan["settled"]}
    index |= {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.fingerprint, "separated": "after"}
    receipts = [read_receipt(work) for work in works]
    if None in receipts:
        raise OSError(f"the shards of part {receipts.index(None)} are not where its worker should have written them")
    for name in SPLITS:
        own = [receipt[name] for receipt in receipts if receipt is not None]
        shards = [{key: one[key] for key in ("file", "tokens", "crc32")} for one in own if one["documents"]]
        counted = {key: sum(one[key] for one in own) for key in ("documents", "bytes")}
        index[name] = counted | {"shards": shards}
    return index | {"crc32": manifest_checksum(index)}
