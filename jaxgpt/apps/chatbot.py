"""A chatbot: what is said so far goes in, an answer comes out piece by piece, and the oldest turns make room."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence

from jaxgpt.api import LanguageModel, load
from jaxgpt.config import Dtype, GenerationConfig
from jaxgpt.data.conversations import Message, encode_prompt, without_oldest
from jaxgpt.tasks.trained import Which

LEAST_ROOM = 16  # tokens of an answer for which older turns make room


class Chatbot:
    """A conversation with a model that was tuned for it (see `data.conversations` for the template).

    `messages` is the whole conversation; what the model sees of it is what fits its context: the oldest turns go first.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | LanguageModel,
        *,
        system: str | None = None,
        settings: GenerationConfig | None = None,
        checkpoint: Which | None = None,
        dtype: Dtype | None = None,
        base: str | None = None,
    ) -> None:
        """Load a model, or take one.

        Args:
            model: what `load` takes, such as a run of `python train.py chat`, or what it returned.
            system: what the model is told before the first message.
            settings: how answers are made (default: sampled at temperature 0.8).
            checkpoint, dtype, base: see `load`.

        Raises:
            FileNotFoundError, ValueError: as `load` and `tell` do.
        """
        if not isinstance(model, LanguageModel):
            model = load(model, checkpoint=checkpoint, dtype=dtype, base=base)
        self.model = model
        self.settings = settings or GenerationConfig()
        self.system: str | None = None
        self.tell(system)
        self.messages: list[Message] = []
        self.forgotten = 0
        """messages that the last answer was made without, for want of room"""

    def tell(self, system: str | None) -> None:
        """Set what the model is told before the first message; None, or nothing but spaces, is nothing.

        Raises:
            ValueError: that alone leaves no room in the model's context, or a character that the tokenizer does not
                have. What it was told before stays.
        """
        told = system if system is not None and system.strip() else None
        count = 0 if told is None else len(encode_prompt(self.model.tokenizer, [Message("system", told)]))
        if count >= self.model.config.context:
            raise ValueError(
                f"the system's message has {count} tokens, and the model's context is {self.model.config.context}"
            )
        self.system = told

    def reset(self) -> None:
        """Forget what was said; the system's message stays."""
        self.messages, self.forgotten = [], 0

    def answer(self, content: str) -> str:
        """Say something and return the whole answer."""
        return "".join(self.stream(content))

    def stream(self, content: str) -> Generator[str, None, None]:
        """Say something and yield the answer in pieces; what has come of it when the caller stops is the answer.

        Raises:
            ValueError: nothing was said, the message alone leaves no room in the model's context, or a setting is out
                of range. The conversation is then as it was before.
        """
        if not content.strip():
            raise ValueError("the message is empty")
        prompt = self._prompt([*self.messages, Message("user", content)])
        room = self.model.config.context - len(prompt)
        limit = min(self.settings.max_new_tokens or room, room)
        pieces = self.model.stream(prompt, self.settings, max_new_tokens=limit)
        return self._said(content, pieces)

    def _said(self, content: str, pieces: Iterator[str]) -> Generator[str, None, None]:
        said: list[str] = []
        try:
            for piece in pieces:
                said.append(piece)
                yield piece
        finally:
            self.messages += [Message("user", content), Message("assistant", "".join(said))]

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of as much of the conversation as leaves room for an answer."""
        told = () if self.system is None else (Message("system", self.system),)
        everything = (*told, *messages)
        seen: tuple[Message, ...] = everything
        ids = encode_prompt(self.model.tokenizer, seen)
        wanted = min(self.settings.max_new_tokens or LEAST_ROOM, self.model.config.context // 2)
        while len(ids) + wanted > self.model.config.context:
            fewer = without_oldest(seen)
            if fewer is None:
                break
            seen, ids = fewer, encode_prompt(self.model.tokenizer, fewer)
        if len(ids) >= self.model.config.context:
            raise ValueError(
                f"the message has {len(ids)} tokens with the system's, and the model's context is "
                f"{self.model.config.context}"
            )
        self.forgotten = len(everything) - len(seen)
        return ids
