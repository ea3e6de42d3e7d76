"""What every task prepares from its config before a run can begin."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jaxgpt.config import RunConfig
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.training.loop import Task
from jaxgpt.training.parallel import Layout


@dataclass(frozen=True)
class Prepared:
    """A task that is ready to run."""

    task: Task
    config: RunConfig
    """with everything filled in that follows from the data"""
    tokenizer: Tokenizer
    data_fingerprint: str
    """a digest of the data, of its split and of how it becomes tokens"""
    announcement: Callable[[Layout], Iterable[str]]
    """what is trained, on what, where: lines for a person"""


def with_vocabulary(model_size: int | None, tokenizer: Tokenizer) -> int:
    """V: the model's own if it is set, else the tokenizer's.

    Raises:
        ValueError: the tokenizer has more tokens than the model.
    """
    if model_size is not None and model_size < tokenizer.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, more than model.vocab-size {model_size}")
    return model_size or tokenizer.vocab_size
