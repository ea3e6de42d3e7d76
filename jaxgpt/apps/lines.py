"""Lines to work on: of a file, of standard input as they come, or typed at a terminal."""

from __future__ import annotations

import os
import queue
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from jaxgpt.data.corpus import decode_text

AHEAD = 4096  # lines of standard input read before they are asked for


def open_lines(name: str) -> tuple[Iterator[str], Callable[[], bool]]:
    """Open a text file, or standard input as "-"; only a newline ends a line.

    Returns:
        The lines, and a function that says whether the next is there already, so that lines which are can be worked on
        before those which are still to come.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: later, at a line that is not UTF-8.
    """
    if name != "-":
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {name}")
        return _decoded(_read(path), name), lambda: True
    if sys.stdin.isatty():
        return _typed(), lambda: False
    if stat.S_ISREG(os.fstat(sys.stdin.fileno()).st_mode):
        return _decoded(sys.stdin.buffer, "standard input"), lambda: True
    arrived: queue.Queue[bytes | None] = queue.Queue(AHEAD)
    threading.Thread(target=_put, args=(sys.stdin.buffer, arrived), daemon=True, name="lines").start()
    return _decoded(iter(arrived.get, None), "standard input"), lambda: not arrived.empty()


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _put(file: BinaryIO, arrived: queue.Queue[bytes | None]) -> None:
    for line in file:
        arrived.put(line)
    arrived.put(None)


def _decoded(lines: Iterable[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        text = decode_text(line, f"{name}, line {number},")
        yield (text.removeprefix("\ufeff") if number == 1 else text).removesuffix("\n").removesuffix("\r")


def _typed() -> Iterator[str]:
    print("a sentence a line; Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
