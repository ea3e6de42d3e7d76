"""Valid files made invalid: by bits and bytes, by the values and names in their JSON, by what programs trip over."""

from __future__ import annotations

import json
import random
import struct
import zlib
from typing import Any

DEEP = 3000  # deeper than Python's and Rust's readers go
NUMBERS = [0, -1, 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63, 2**64, 10**30, -(10**9), 1e308, -1e308, 1e-320, 0.5]
WORDS = [
    "",
    "x",
    "a" * 5000,
    "\0",
    "\ud800",
    "../x",
    "/etc/passwd",
    "é漢🙂",
    "NaN",
    "\n",
    "<|endoftext|>",
    "(a+)+$",
    "[",
]
VALUES = [None, True, False, [], {}, [[]], [None], {"": None}, [1, 2], ["a", "b"], *NUMBERS, *WORDS]
BYTES = [b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b"\t", b"\r", b'"', b"{", b"-", b"null", b"NaN", b"1e999", b"Infinity"]
BYTES += [b"[" * DEEP, b'{"a":' * DEEP, b"9" * 5000, b"\xef\xbb\xbf", b"\\ud800", b"\x80\x04N.", b"PK\x03\x04"]


def mutate(content: bytes, rng: random.Random, name: str) -> bytes:
    """Change a file in one to three ways; `name` tells what may stand in it."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        content = _changed(content, rng, name)
    return content


def _changed(content: bytes, rng: random.Random, name: str) -> bytes:
    if rng.random() < 0.6:
        try:
            if name.endswith(".safetensors"):
                return _in_header(content, rng)
            if name.endswith(".jsonl"):
                return _in_a_line(content, rng)
            if name.endswith(".json") or content[:1] == b"{":
                return _dumped(_in_json(json.loads(content), rng), rng)
        except (ValueError, RecursionError, struct.error):
            pass  # it is no JSON any more
    return _in_bytes(content, rng)


def _in_bytes(content: bytes, rng: random.Random) -> bytes:
    size = len(content)
    start, stop = sorted((rng.randrange(size + 1), rng.randrange(size + 1)))
    if rng.random() < 0.7:  # near the place
        stop = min(size, start + rng.randrange(9))
    way = rng.randrange(8)
    if way == 0 and size:  # flip a bit
        place = rng.randrange(size)
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    if way == 1:  # truncate
        return content[:start]
    if way == 2:  # delete
        return content[:start] + content[stop:]
    if way == 3:  # repeat
        return content[:stop] + content[start:stop] * rng.randrange(1, 4) + content[stop:]
    if way == 4:  # splice
        place = rng.randrange(size + 1)
        return content[:place] + content[start:stop] + content[place:]
    if way == 5:  # random bytes
        return content[:start] + bytes(rng.randrange(256) for _ in range(rng.randrange(20))) + content[stop:]
    if way == 6 and rng.random() < 0.1:  # nothing but random bytes
        return bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
    return content[:start] + rng.choice(BYTES) + content[rng.choice([start, stop]) :]


def _in_json(value: Any, rng: random.Random) -> Any:
    """Change one value, or one name, somewhere in a JSON value."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return _other(value, rng)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        way = rng.randrange(8)
        if way == 0:
            return {k: v for k, v in value.items() if k != key}
        if way == 1:
            return {rng.choice(WORDS) if k == key else k: v for k, v in value.items()}
        if way == 2:
            return value | {rng.choice(WORDS): rng.choice(VALUES)}
        return value | {key: _in_json(value[key], rng)}
    place = rng.randrange(len(value))
    way = rng.randrange(8)
    if way == 0:
        return value[:place] + value[place + 1 :]
    if way == 1:
        return value[:place] + [value[place]] * 3 + value[place + 1 :]
    return [*value[:place], _in_json(value[place], rng), *value[place + 1 :]]


def _other(value: Any, rng: random.Random) -> Any:
    if isinstance(value, (int, float)) and rng.random() < 0.5:
        return rng.choice([value + 1, value - 1, -value, value * 1000, str(value), *NUMBERS])
    return rng.choice(VALUES)


def _dumped(value: Any, rng: random.Random) -> bytes:
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8)
    return text.encode("utf-8", "surrogatepass")


def _in_a_line(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    number = rng.randrange(len(lines))
    lines[number] = _dumped(_in_json(json.loads(lines[number]), rng), rng)
    return b"\n".join(lines)


def _in_header(content: bytes, rng: random.Random) -> bytes:
    """The header of a safetensors file changed, and its length made to fit."""
    size = struct.unpack("<Q", content[:8])[0]
    header = _dumped(_in_json(json.loads(content[8 : 8 + size]), rng), rng)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def with_checksum(content: bytes) -> bytes:
    """A manifest with the checksum it should have, as somebody writes who knows about it."""
    try:
        index = json.loads(content)
        index.pop("crc32", None)
        return json.dumps(index | {"crc32": zlib.crc32(json.dumps(index).encode())}).encode()
    except (ValueError, RecursionError, AttributeError, TypeError):
        return content
