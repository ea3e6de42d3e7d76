"""From the tokens of a text that is being made to what a reader gets: whole characters, up to a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.generation.decode import Text


class Writer:
    """Takes tokens as they come and gives text that will not change any more.

    What may be the beginning of a stop string is held back until it is clear that it is not.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._pieces, self._stop, self._held = tokenizer.pieces(), tuple(stop), ""
        self.taken = 0
        """how many tokens were taken, the one that completed a stop string included"""
        self.stopped = False
        """whether a stop string has come; it and what follows are not given"""

    def push(self, tokens: Iterable[int]) -> str:
        """Take tokens, up to the one that completes a stop string; return the text that is sure now."""
        text = ""
        for token in tokens:
            if self.stopped:
                break
            self.taken += 1
            text += self._release(self._pieces.push(token))
        return text

    def rest(self) -> str:
        """All that was held back; nothing comes after it."""
        if self.stopped:
            return ""
        text = self._release(self._pieces.rest())
        held, self._held = ("" if self.stopped else self._held), ""
        return text + held

    def _release(self, piece: str) -> str:
        held = self._held + piece
        # The one that is whole first counts, so that it does not matter how many characters came at once.
        found = [(place + len(stop), place) for stop in self._stop if (place := held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)[1]]
        keep = max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def write(steps: Iterator[None], texts: Sequence[Text], writers: Sequence[Writer]) -> Iterator[list[str]]:
    """Follow `Decoder.decode`: after each step, what each text gained; a text ends where a stop string comes."""
    ended = [False] * len(texts)
    for _ in steps:
        gained = []
        for number, (text, writer) in enumerate(zip(texts, writers, strict=True)):
            piece = writer.push(text.tokens[text.prompt + writer.taken :])
            if writer.stopped and not ended[number]:
                text.finish = "stop"
                del text.tokens[text.prompt + writer.taken :], text.logprobs[writer.taken :]
            if text.finish is not None and not ended[number]:
                ended[number] = True
                piece += writer.rest()
            gained.append(piece)
        yield gained


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`, at most all but its last."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
