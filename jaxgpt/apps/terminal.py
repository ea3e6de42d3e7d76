"""The chatbot at a terminal: commands, an answer as it is made, Ctrl-C that stops the answer and not the program."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from types import TracebackType

from jaxgpt.apps.chatbot import Chatbot
from jaxgpt.apps.lines import undecoded
from jaxgpt.config import suggestion
from jaxgpt.data.conversations import Message

HELP = "/reset forgets what was said, /system TEXT tells the model something, /save FILE writes all down, /quit ends"
COMMANDS = ("/reset", "/system", "/save", "/quit", "/help")


class Transcript:
    """What is said, written to a file as it comes: a JSON message a line."""

    def __init__(self, path: str | None) -> None:
        """Open the file, to which lines are added; None: nothing is written.

        Raises:
            OSError: it cannot be written.
        """
        self._file = None if path is None else open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> Transcript:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, messages: Sequence[Message]) -> None:
        """Add messages."""
        if self._file is not None:
            self._file.write(as_lines(messages))
            self._file.flush()


def as_lines(messages: Sequence[Message]) -> str:
    """Messages as JSON, one a line."""
    return "".join(json.dumps(dataclasses.asdict(message), ensure_ascii=False) + "\n" for message in messages)


def talk(bot: Chatbot, transcript: str | None) -> None:
    """Ask for messages and answer them until /quit or the end of the input."""
    typed = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8 spoils its line, and not the program
    if typed:
        print(f"{HELP}; Ctrl-C stops an answer, Ctrl-D ends", file=sys.stderr)
    told = False
    with Transcript(transcript) as kept:
        while True:
            try:
                line = input("> " if typed else "").strip()
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                if not typed:
                    raise
                print("\n(/quit or Ctrl-D ends)", file=sys.stderr)  # it was meant for an answer that had just ended
                continue
            if line == "/quit":
                return
            if line.startswith("/"):
                _command(bot, line)
                continue
            if not line:
                continue
            before = len(bot.messages)
            try:
                _answer(bot, line)
            except ValueError as error:
                print(f"jaxgpt: {undecoded(line) or error}", file=sys.stderr)
                continue
            kept.write(bot.messages[before:])
            if bot.forgotten and not told:
                told = True
                print("(the oldest turns no longer fit the model's context, and leave first)", file=sys.stderr)


def _answer(bot: Chatbot, line: str) -> None:
    with contextlib.ExitStack() as stack:
        try:
            pieces = stack.enter_context(contextlib.closing(bot.stream(line)))
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:  # what has come is the answer
            print(" ...", end="")
    print(flush=True)


def _command(bot: Chatbot, line: str) -> None:
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/reset":
        bot.reset()
        print("(forgotten)", file=sys.stderr)
    elif name == "/system":
        try:
            bot.tell(rest)
        except ValueError as error:
            print(f"jaxgpt: {undecoded(rest) or error}", file=sys.stderr)
            return
        print("(from now on it is told that)" if rest else "(it is told nothing)", file=sys.stderr)
    elif name == "/save":
        _save(bot, rest)
    elif name == "/help":
        print(HELP, file=sys.stderr)
    else:
        print(f"jaxgpt: there is no command {name}{suggestion(name, COMMANDS)}", file=sys.stderr)


def _save(bot: Chatbot, name: str) -> None:
    if not name:
        print("jaxgpt: /save needs the name of a file", file=sys.stderr)
        return
    told = [] if bot.system is None else [Message("system", bot.system)]
    try:
        with open(name, "x", encoding="utf-8") as file:
            file.write(as_lines([*told, *bot.messages]))
    except FileExistsError:
        print(f"jaxgpt: {name} exists already; give /save another name", file=sys.stderr)
        return
    except OSError as error:
        print(f"jaxgpt: {error}", file=sys.stderr)
        return
    print(f"({len(bot.messages)} messages in {name})", file=sys.stderr)
