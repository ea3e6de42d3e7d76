"""Conversations: JSON lines of messages, or of prompts and responses, and the template that makes them tokens.

The template. Before every message stands the end-of-text token, then the role and a newline, then what was said; after
the last message stands the end-of-text token again:

    <|endoftext|>user
    What is the capital of France?<|endoftext|>assistant
    Paris.<|endoftext|>

No text can contain that token, so nobody can put words into another's mouth; any tokenizer has it; and an answer ends
with the token that ends a text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Int32

from jaxgpt.config import ConversationsConfig
from jaxgpt.data.corpus import json_field, json_records
from jaxgpt.data.small_talk import small_talk
from jaxgpt.data.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Message:
    """What one side says."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages, the last of which is an answer, and where they stand."""

    messages: tuple[Message, ...]
    where: str = ""


@dataclass(frozen=True)
class ConversationSets:
    """Conversations to train on and those held out, and what identifies them."""

    train: list[Conversation]
    held_out: list[Conversation]
    fingerprint: str


def open_conversations(config: ConversationsConfig) -> ConversationSets:
    """Read the conversations of `config.path` and `config.validation`; with none, those made by rule.

    Without `validation`, a share `held_out` is held out: those of the smallest digests.

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError: a malformed line, named; or no conversation at all.
    """
    if not config.path:
        train, held_out = ([_turns(turns) for turns in part] for part in small_talk())
    else:
        train = [one for path in config.path for one in read_conversations(path, "data.path", config)]
        if config.validation:
            held_out = [c for path in config.validation for c in read_conversations(path, "data.validation", config)]
        else:
            train, held_out = _split(train, config.held_out)
    spelled = [[[(m.role, m.content) for m in one.messages] for one in part] for part in (train, held_out)]
    return ConversationSets(train, held_out, hashlib.sha256(json.dumps(spelled).encode()).hexdigest())


def _turns(turns: Sequence[tuple[str, str]]) -> Conversation:
    return Conversation(tuple(m for ask, say in turns for m in (Message("user", ask), Message("assistant", say))))


def _split(all_of_them: list[Conversation], share: float) -> tuple[list[Conversation], list[Conversation]]:
    digests = [hashlib.sha256(repr(one.messages).encode()).digest() for one in all_of_them]
    distinct = sorted(set(digests))
    held_out = set(distinct[: min(round(share * len(distinct)), len(distinct) - 1)])
    parts: tuple[list[Conversation], list[Conversation]] = ([], [])
    for one, digest in zip(all_of_them, digests, strict=True):
        parts[digest in held_out].append(one)
    return parts


def read_conversations(name: str, option: str, config: ConversationsConfig) -> list[Conversation]:
    """Read the conversations of one .jsonl file. Raises as `open_conversations` does."""
    path = Path(name)
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"{option}: there is no file {path}")
    if path.suffix != ".jsonl":
        raise ValueError(f"{option}: {path} is no .jsonl file, a conversation a line")
    found = [one for record, where in json_records(path) for one in _of_record(record, where, config)]
    if not found:
        raise ValueError(f"{option}: {path} holds no conversation")
    return found


def _of_record(record: dict[str, Any], where: str, config: ConversationsConfig) -> Iterator[Conversation]:
    if isinstance(record.get("instances"), list):  # several examples of one instruction, as Self-Instruct has them
        for instance in record["instances"]:
            if not isinstance(instance, dict):
                raise ValueError(f"{where}: one of its instances is not an object")
            own = {name: value for name, value in record.items() if name != "instances"}
            yield from _of_record(own | instance, where, config)
        return
    if "messages" in record:
        messages = parse_messages(record["messages"], where)
        if messages[-1].role != "assistant":
            raise ValueError(f"{where}: its last message is the {messages[-1].role}'s; it must be an answer")
        yield Conversation(messages, where)
        return
    prompt = json_field(record, config.prompt_field, where)
    if isinstance(record.get(config.input_field), str) and record[config.input_field].strip():
        prompt = f"{prompt}\n\n{json_field(record, config.input_field, where)}"
    response = json_field(record, config.response_field, where)
    begin = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    yield Conversation(parse_messages(begin + said, where), where)


def parse_messages(values: Any, where: str) -> tuple[Message, ...]:
    """Turn a JSON list of `{"role": ..., "content": ...}` into messages.

    Raises:
        ValueError: it is none, a role that there is not, or nothing said; `where` is named.
    """
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where}: its messages are not a list with at least one")
    messages = []
    for value in values:
        if not isinstance(value, dict) or value.get("role") not in ROLES:
            role = value.get("role") if isinstance(value, dict) else value
            raise ValueError(f"{where}: a message has the role {role!r}; there are {', '.join(ROLES)}")
        content = json_field(value, "content", where)
        if not content.strip():
            what = "an answer" if value["role"] == "assistant" else f"a message of the {value['role']}"
            raise ValueError(f"{where}: {what} is empty")
        messages.append(Message(value["role"], content))
    return tuple(messages)


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids of a conversation, and which of them are to be learned: what the assistant says, with its end."""

    tokens: Int32[np.ndarray, " n"]
    learned: Bool[np.ndarray, " n"]

    @property
    def inputs(self) -> int:
        """Places it takes in a row: all tokens but the last are read, all but the first are targets."""
        return len(self.tokens) - 1


def encode_messages(tokenizer: Tokenizer, messages: Sequence[Message]) -> EncodedConversation:
    """A whole conversation by the template.

    Raises:
        ValueError: a character that the tokenizer does not have.
    """
    end = tokenizer.separator
    pieces = tokenizer.encode_batch([text for m in messages for text in (f"{m.role}\n", m.content)])
    tokens, learned = [end], [False]
    for number, message in enumerate(messages):
        role, content = pieces[2 * number], pieces[2 * number + 1]
        tokens += [*role.tolist(), *content.tolist(), end]
        learned += [False] * len(role) + [message.role == "assistant"] * (len(content) + 1)
    return EncodedConversation(np.array(tokens, np.int32), np.array(learned, bool))


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Messages and the beginning of the answer to them, which the model is to go on with."""
    return [*encode_messages(tokenizer, messages).tokens.tolist(), *tokenizer.encode("assistant\n")]


def without_oldest(messages: Sequence[Message]) -> tuple[Message, ...] | None:
    """Messages without the oldest question and its answer; None if that would leave no question.

    What the system says stays.
    """
    kept = [m for m in messages if m.role == "system"]
    rest = [m for m in messages if m.role != "system"]
    later = next((n for n, m in enumerate(rest) if n and m.role == "user"), None)
    return None if later is None else (*kept, *rest[later:])


def encode_conversations(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], config: ConversationsConfig, room: int
) -> tuple[list[EncodedConversation], list[Conversation], dict[str, int]]:
    """Encode conversations that fit into `room` places; an answer is never cut.

    Returns:
        The encoded ones, the same as text, and how many were left out, or were shortened, and why.
    """
    encoded, kept, notes = [], [], dict[str, int]()
    for one in conversations:
        messages: tuple[Message, ...] | None = one.messages
        whole = encode_messages(tokenizer, one.messages)
        while whole.inputs > room and config.too_long == "drop-turns" and messages is not None:
            messages = without_oldest(messages)
            whole = whole if messages is None else encode_messages(tokenizer, messages)
        if whole.inputs > room:
            reason = f"were left out, for they are longer than {room} tokens"
            notes[reason] = notes.get(reason, 0) + 1
            continue
        if messages is not None and len(messages) < len(one.messages):
            reason = f"went without their oldest turns, to have room in {room} tokens"
            notes[reason] = notes.get(reason, 0) + 1
        encoded.append(whole)
        kept.append(Conversation(messages or one.messages, one.where))
    return encoded, kept, notes
