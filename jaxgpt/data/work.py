"""What workers do with one part of a corpus that is prepared, and what they leave to say that it is done."""

from __future__ import annotations

import json
import os
import platform
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxgpt.data.corpus import UNFINISHED
from jaxgpt.data.encoding import shard
from jaxgpt.data.parts import Part
from jaxgpt.data.shards import manifest_checksum, open_array
from jaxgpt.data.split import RECORD, Records, Split, record_documents
from jaxgpt.data.tokenizer import load_tokenizer

CRC_BYTES = 4
SPLITS = {"train": False, "held_out": True}


@dataclass(frozen=True)
class Work:
    """One part to be worked on, in a folder that all workers see."""

    folder: Path
    number: int
    part: Part
    split: Split | None = None


def record(work: Work) -> int:
    """First pass over a part: a record of each of its documents. Returns the part's bytes."""
    records = record_documents(work.part)
    content = records.tobytes()
    put(_records_path(work), lambda file: file.write(zlib.crc32(content).to_bytes(CRC_BYTES, "little") + content))
    return work.part.bytes


def tokenise(work: Work) -> int:
    """Second pass over a part: its shards, then the receipt that says so. Returns the part's bytes.

    Raises:
        ValueError: its documents are not those of the first pass.
    """
    split, records = work.split, read_records(work)
    assert split is not None
    if records is None or not np.array_equal(record_documents(work.part), records):
        names = " or ".join(str(piece.path) for piece in work.part.pieces[:3])
        raise ValueError(f"{names} was changed while it was prepared; give another --out, or delete {work.folder}")
    tokenizer = load_tokenizer(work.folder / "tokenizer.json")
    receipt: dict[str, Any] = {}
    for name, held_out in SPLITS.items():
        tokens = shard(split.part(work.part, held_out), tokenizer)
        receipt[name] = _described(work.part, records, split, held_out)
        if receipt[name]["documents"]:
            file = f"{name}-{work.number:05d}.npy"
            _save(work.folder / file, tokens)
            receipt[name] |= {"file": file, "tokens": len(tokens), "crc32": zlib.crc32(tokens.data)}
    receipt["crc32"] = manifest_checksum(receipt)
    put(_receipt_path(work), lambda file: file.write(json.dumps(receipt).encode()))
    return work.part.bytes


def _described(part: Part, records: Records, split: Split, held_out: bool) -> dict[str, Any]:
    """How many documents, and bytes of text, a part has of one side of the split."""
    if split.documents == 1:
        own = list(split.part(part, held_out))
        return {"documents": len(own), "bytes": sum(len(text.encode()) for text in own)}
    own_records = records[split.held_out(records) == held_out]
    return {"documents": len(own_records), "bytes": int(own_records["bytes"].sum())}


def _records_path(work: Work) -> Path:
    return work.folder / UNFINISHED / f"records-{work.number:05d}"


def read_records(work: Work) -> Records | None:
    """What the first pass has written about a part; None if it has not, or not whole."""
    try:
        content = _records_path(work).read_bytes()
    except OSError:
        return None
    checksum, content = content[:CRC_BYTES], content[CRC_BYTES:]
    whole = checksum == zlib.crc32(content).to_bytes(CRC_BYTES, "little")
    return np.frombuffer(content, RECORD) if whole else None


def _receipt_path(work: Work) -> Path:
    return work.folder / UNFINISHED / f"shard-{work.number:05d}.json"


def read_receipt(work: Work) -> dict[str, Any] | None:
    """What the second pass says about a part; None if it was not there, or its shards are not what it says."""
    try:
        receipt: dict[str, Any] = json.loads(_receipt_path(work).read_bytes())
        if receipt.pop("crc32") != manifest_checksum(receipt):
            return None
        for name in SPLITS:
            if receipt[name]["documents"]:
                tokens = open_array(work.folder / receipt[name]["file"])
                if (len(tokens), zlib.crc32(tokens.data)) != (receipt[name]["tokens"], receipt[name]["crc32"]):
                    return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return receipt


def _save(path: Path, array: np.ndarray) -> None:
    put(path, lambda file: np.save(file, array, allow_pickle=False))


def put(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file that appears under its name only once it is whole, whoever else writes the same."""
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
