"""Text in: documents from files, folders, JSON lines, standard input, or the Python standard library's source."""

from __future__ import annotations

import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxgpt.config import DataConfig

PREPARED = "prepared.json"  # the manifest of a folder that `jaxgpt prepare` made of text
UNFINISHED = ".prepare"  # what it works with until it is done
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write half of a pair, UTF-8 cannot
DEFAULT_BYTES = 8_000_000  # of the standard library's 12 MB: enough for minutes of training, quick to tokenise
# Tests, installed packages, programs; and `encodings`, which is tables of characters rather than Python.
NOT_SOURCE = frozenset(
    {"test", "tests", "idle_test", "idlelib", "site-packages", "lib2to3", "__pycache__", "turtledemo", "encodings"}
    | {"pydoc_data", "ensurepip"}
)
MACHINE_SPECIFIC = "_sysconfigdata"  # how this Python was compiled: paths of the machine, in one generated module


@dataclass(frozen=True)
class Corpus:
    """Documents, read anew each time they are iterated over, so that a large corpus need not fit into memory.

    Attributes:
        files: what is read, in order: text files (a document each) and .jsonl files (a document a line).
        text_field: the field of a .jsonl line that holds the text.
        standard_input: the text of standard input, for the entry "-".
        skip_undecodable: leave files out that are not UTF-8, instead of refusing.
        limit: stop before the document that would make more than so many bytes.
    """

    files: tuple[Path | None, ...]
    text_field: str = "text"
    standard_input: str = ""
    skip_undecodable: bool = False
    limit: int | None = None

    def __iter__(self) -> Iterator[str]:
        """Yield the documents that are not empty, as they stand in the files (newlines unchanged).

        Raises:
            ValueError: not UTF-8 (file and byte offset), or a malformed .jsonl line (file and line number).
            OSError: a file cannot be read.
        """
        size = 0
        for path in self.files:
            for text in self._documents(path):
                size += len(text.encode())
                if self.limit is not None and size > self.limit:
                    return
                if text:
                    yield text

    def _documents(self, path: Path | None) -> Iterator[str]:
        if path is None:
            yield self.standard_input
            return
        try:
            yield from read_documents(path, self.text_field)
        except ValueError:
            if not self.skip_undecodable:
                raise


def read_documents(path: Path, text_field: str, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """Yield the documents of one file: of a .jsonl those of its lines (see `json_records`), else the whole.

    Raises: as `Corpus.__iter__`.
    """
    if path.suffix == ".jsonl":
        yield from (json_field(record, text_field, where) for record, where in json_records(path, start, stop))
    else:
        yield decode_text(path.read_bytes(), str(path))


def open_corpus(config: DataConfig) -> Corpus:
    """Find the files of `config.path`; with none, the embedded default (see `standard_library`).

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without a file in it.
        ValueError: standard input that is not UTF-8, or a path that can be read only once, such as a pipe.
    """
    if not config.path:
        return standard_library()
    files: list[Path | None] = []
    text = ""
    for entry in config.path:
        if entry == "-":
            text = decode_text(sys.stdin.buffer.read(), "standard input") if not files.count(None) else text
            files.append(None)
            continue
        path = Path(entry)
        if not path.exists():
            raise FileNotFoundError(f"data.path: there is no file or folder {path}")
        if is_prepared(path):
            raise ValueError(f"data.path: {path} is a folder of tokens made by jaxgpt prepare, and no text")
        if not path.is_dir() and not path.is_file():
            raise ValueError(f"data.path: {path} is no regular file; pipe it to standard input and give -")
        found = sorted(_visible_files(path)) if path.is_dir() else [path]
        if not found:
            raise FileNotFoundError(f"data.path: the folder {path} has no file in it")
        files += found
    return Corpus(tuple(files), config.text_field, text)


def standard_library() -> Corpus:
    """The source of the Python standard library on this machine: real text that needs no download.

    Sorted by path; tests, installed packages, generated tables and what names the machine left out; the first 8 MB.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not NOT_SOURCE.intersection(path.relative_to(root).parts) and not path.name.startswith(MACHINE_SPECIFIC)
    )
    return Corpus(tuple(files), skip_undecodable=True, limit=DEFAULT_BYTES)


def is_prepared(path: Path) -> bool:
    """Whether a path is a folder of tokens that `jaxgpt prepare` made, or was making when it was stopped."""
    return (path / PREPARED).is_file() or (path / UNFINISHED).is_dir()


def _visible_files(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:  # rglob would pass over a folder that may not be read
        raise error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        yield from (path for name in names if not name.startswith(".") and (path := Path(parent, name)).is_file())


def decode_text(data: bytes, name: str) -> str:
    """Return UTF-8 as text.

    Raises:
        ValueError: it is not; the byte and its offset are named.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}") from error


def decode_lines(lines: Iterable[bytes], name: str, *, strict: bool = True) -> Iterator[str]:
    """Yield lines as text, without a byte order mark, and without the (carriage return and) newline at their ends.

    Raises:
        ValueError: `strict`, and one is not UTF-8; it is named. Otherwise its bytes come as U+DC80 to U+DCFF.
    """
    for number, line in enumerate(lines, 1):
        text = decode_text(line, f"{name}, line {number},") if strict else line.decode("utf-8", "surrogateescape")
        text = text.removeprefix("\ufeff") if number == 1 else text
        if text:  # a mark alone is no line
            yield text.removesuffix("\n").removesuffix("\r")


def json_records(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the object of each line that is not blank, and where it stands.

    Args:
        start, stop: only of the lines that begin at these bytes or between, `stop` excluded.

    Raises:
        ValueError: a line that is not UTF-8, not JSON, or no object; its number is named, or its place in bytes if
            lines before it were not read.
    """
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # the end of a line that begins before, or the newline before one that begins right there
        place, number = file.tell(), 0
        while (stop is None or place < stop) and (line := file.readline()):
            number += 1
            where = f"{path}, line {number}" if not start else f"{path}, the line at byte {place:,}"
            place += len(line)
            text = decode_text(line, where)
            if not start and number == 1:
                text = text.removeprefix("\ufeff")  # the mark some editors put first, which is no JSON
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}, is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where}, is not a JSON object")
            yield record, where


def json_field(record: dict[str, Any], field: str, where: str) -> str:
    """Return the text in a field of a record.

    Raises:
        ValueError: there is no such field (those there are get named), or it is not text.
    """
    if field not in record:
        raise ValueError(f"{where}, has no field {field!r}; it has {', '.join(map(repr, record)) or 'none'}")
    value = record[field]
    if not isinstance(value, str):
        raise ValueError(f"{where}: the field {field!r} is not text")
    if not value.isascii() and SURROGATE.search(value):
        raise ValueError(f"{where}: the field {field!r} has half a character (\\ud800 to \\udfff)")
    return value
