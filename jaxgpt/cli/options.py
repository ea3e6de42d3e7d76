"""Options that several verbs share: which model, which checkpoint of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from jaxgpt.config import GenerationConfig

if TYPE_CHECKING:
    from jaxgpt.api import LanguageModel


@dataclass(frozen=True)
class RunOptions:
    """Which run."""

    model: str
    """a run folder"""
    checkpoint: Literal["best", "last", "average"] | None = None
    """a run: its best checkpoint, its newest, or the mean of its newest (default: average if it averages, else best)"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """what is computed in (default: a run's own; float32 for other models)"""
    base: str | None = None
    """a run that trained a part of a pretrained model alone: where that model lies now (default: where it did)"""


@dataclass(frozen=True)
class ModelOptions(RunOptions):
    """Which model."""

    model: str
    """a run folder, a Hugging Face folder, or a name on the Hugging Face hub (gpt2, distilgpt2, OWNER/NAME)"""
    revision: str | None = None
    """a name on the hub: the commit, tag or branch (default: main)"""


@dataclass(frozen=True)
class DecodingOptions(ModelOptions):
    """Which model, and how its weights are kept."""

    weights: Literal["int8", "bfloat16"] | None = None
    """keep the matrices in fewer bits and compute as before: faster where few tokens are made at once"""


@dataclass(frozen=True)
class WritingOptions(GenerationConfig, DecodingOptions):
    """Which model writes, and how it chooses its words."""

    draft: str | None = None
    """a small model with the same tokenizer that guesses ahead: the same text in fewer steps of the model"""

    @property
    def settings(self) -> GenerationConfig:
        """How it chooses them."""
        return GenerationConfig(**{item.name: getattr(self, item.name) for item in fields(GenerationConfig)})


def load_model(options: ModelOptions, draft: str | None = None) -> LanguageModel:
    from jaxgpt import api
    from jaxgpt.environment import keep_freed_memory

    keep_freed_memory()
    return api.load(
        options.model, checkpoint=options.checkpoint, revision=options.revision, dtype=options.dtype,
        base=options.base, weights=options.weights if isinstance(options, DecodingOptions) else None, draft=draft,
    )  # fmt: skip
