"""The verb prepare: a large corpus to a folder of tokens, by all cores, whatever interrupts it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from jaxgpt.arguments import parse
from jaxgpt.cli.training import STOPPED
from jaxgpt.config import DataConfig, require

if TYPE_CHECKING:
    from jaxgpt.data.prepared import Progress

SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class PrepareOptions:
    """Tokenise text once, for training with --data.path FOLDER; started again, it does what is still missing."""

    path: tuple[str, ...] = ()
    """text files, folders, .jsonl files"""
    out: str = ""
    """the folder to make, or to go on with"""
    text_field: str = DataConfig.text_field
    """the field of a .jsonl line that holds the text"""
    tokenizer: str = DataConfig.tokenizer
    """byte, character, bpe (trained on the data), or the path of a tokenizer.json or of a folder that has one"""
    vocab_size: int = DataConfig.vocab_size
    """tokens of a BPE that is trained on the data"""
    unknown: Literal["error", "token"] = DataConfig.unknown
    """a character outside a character vocabulary: an error that names it, or an unknown token"""
    held_out: float = DataConfig.held_out
    """share of the text kept for evaluation: whole documents, or the end of a single text"""
    workers: int | None = None
    """processes of one thread each (default: one for each core)"""
    shard_bytes: int = 2**26
    """text that makes a shard, about; a document is never cut"""
    quiet: bool = False
    """print nothing but errors"""

    def __post_init__(self) -> None:
        require(bool(self.path), "the text is missing: jaxgpt prepare FILE|FOLDER .. --out FOLDER")
        require(bool(self.out), "--out is needed: the folder to make")
        require(self.workers is None or self.workers >= 1, f"workers is {self.workers}; it must be at least 1")
        require(self.shard_bytes >= 1, f"shard-bytes is {self.shard_bytes}; it must be at least 1")


def prepare(arguments: list[str]) -> int:
    """`jaxgpt prepare`."""
    options = parse(PrepareOptions, arguments, "jaxgpt prepare", positional="--path")
    config = DataConfig(
        path=options.path, text_field=options.text_field, tokenizer=options.tokenizer, vocab_size=options.vocab_size,
        unknown=options.unknown, held_out=options.held_out,
    )  # fmt: skip
    from jaxgpt.data.prepared import prepare_folder
    from jaxgpt.data.workers import in_processes

    run = in_processes(options.workers or os.cpu_count() or 1)
    with _shown(options.quiet) as (say, show), _interruptible():
        try:
            prepare_folder(config, Path(options.out), run, shard_bytes=options.shard_bytes, say=say, show=show)
        except KeyboardInterrupt:
            say(f"stopped; the same command goes on where {options.out} ends")
            return STOPPED
    return 0


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM end what Ctrl-C ends."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _shown(quiet: bool) -> Iterator[tuple[Callable[[str], None], Callable[[Progress], None]]]:
    """How lines and progress are shown: a bar on a terminal, a line every few seconds elsewhere."""
    if quiet:
        yield lambda line: None, lambda progress: None
        return
    if not sys.stdout.isatty():
        lines = _Lines()
        yield lines.say, lines.show
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    with Bar(TextColumn("{task.description:10}"), BarColumn(), DownloadColumn(), TextColumn("{task.fields[rate]}"),
             TextColumn("left"), TimeRemainingColumn()) as bar:  # fmt: skip
        tasks = {doing: bar.add_task(doing, total=None, visible=False, rate="") for doing in ("reading", "tokenising")}
        started: dict[str, float] = {}

        def show(progress: Progress) -> None:
            rate = _rate(progress, started)
            bar.update(tasks[progress.doing], completed=progress.done, total=progress.total, visible=True, rate=rate)

        yield lambda line: bar.console.print(line, markup=False, highlight=False), show


class _Lines:
    """Lines for a pipe or a file."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._next = time.monotonic() + SECONDS_BETWEEN_LINES

    def say(self, line: str) -> None:
        print(line, flush=True)

    def show(self, progress: Progress) -> None:
        rate, now = _rate(progress, self._started), time.monotonic()
        if now >= self._next or progress.done == progress.total:
            self._next = now + SECONDS_BETWEEN_LINES
            self.say(
                f"{progress.doing} {progress.done / 1e6:,.1f} of {progress.total / 1e6:,.1f} MB{rate and ', '}{rate}"
            )


def _rate(progress: Progress, started: dict[str, float]) -> str:
    """Megabytes a second of this pass, once there are some."""
    now = time.monotonic()
    seconds = now - started.setdefault(progress.doing, now)
    done = progress.done - progress.before
    return f"{done / 1e6 / seconds:,.1f} MB/s" if done and seconds else ""
