"""Lines to work on: of a file, of a pipe as they come, or typed at a terminal."""

from __future__ import annotations

import os
import queue
import re
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from jaxgpt.data.corpus import decode_lines

UNDECODED = re.compile("[\udc80-\udcff]")  # how a byte that is not UTF-8 comes
AHEAD = 4096  # lines of a pipe read before they are asked for


def open_lines(name: str, *, strict: bool = True) -> tuple[Iterator[str], Callable[[], bool]]:
    """Open a text file, or standard input as "-"; only a newline ends a line.

    Args:
        strict: a line that is not UTF-8 is an error, which ends them; otherwise see `undecoded`.

    Returns:
        The lines, and a function that says whether the next is there already, so that lines which are can be worked on
        before those which are still to come.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: later, at a line that is not UTF-8.
    """
    if name == "-" and sys.stdin.isatty():
        return _typed(), lambda: False
    if name != "-" and (not Path(name).exists() or Path(name).is_dir()):
        raise FileNotFoundError(f"there is no file {name}")
    # A reader of our own: a process that ends while a thread waits for sys.stdin's is aborted.
    source = sys.stdin.fileno() if name == "-" else name
    file = open(source, "rb", closefd=name != "-")  # noqa: SIM115 (it is read later)
    shown = "standard input" if name == "-" else name
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return decode_lines(file, shown, strict=strict), lambda: True
    arrived: queue.Queue[bytes | OSError] = queue.Queue(AHEAD)
    threading.Thread(target=_put, args=(file, arrived), daemon=True, name="lines").start()
    return decode_lines(_taken(arrived), shown, strict=strict), lambda: not arrived.empty()


def undecoded(line: str) -> str | None:
    """What is wrong with a line that was not UTF-8 and came all the same; None if it was."""
    found = UNDECODED.search(line)
    return found and f"it is not UTF-8: byte 0x{ord(found[0]) & 0xFF:02x}"


def _put(file: BinaryIO, arrived: queue.Queue[bytes | OSError]) -> None:
    try:
        for line in file:
            arrived.put(line)
        arrived.put(b"")
    except OSError as error:
        arrived.put(error)


def _taken(arrived: queue.Queue[bytes | OSError]) -> Iterator[bytes]:
    while line := arrived.get():
        if isinstance(line, OSError):
            raise line
        yield line


def _typed() -> Iterator[str]:
    print("a sentence a line; Ctrl-D ends", file=sys.stderr)
    prompt = "> " if sys.stdout.isatty() else ""  # which would go where the translations go
    while True:
        try:
            yield input(prompt)
        except EOFError:
            print(file=sys.stderr)
            return
