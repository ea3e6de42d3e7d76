"""What a translation run is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxgpt.config.conversion import require
from jaxgpt.config.models import TransformerConfig
from jaxgpt.config.runs import RunConfig


@dataclass(frozen=True)
class PairsConfig:
    """Where parallel text comes from, how it becomes tokens, and how many make a batch."""

    path: tuple[str, ...] = ()
    """two aligned text files, source then target, or one .tsv or .jsonl (default: phrases made by rule)"""
    validation: tuple[str, ...] = ()
    """the same for the pairs held out (default: a share of those in path)"""
    source_field: str = "source"
    """the field of a .jsonl line that holds the source"""
    target_field: str = "target"
    """the field of a .jsonl line that holds the target"""
    held_out: float = 0.05
    """share of the pairs held out where no validation is given"""
    tokenizer: str = "bpe"
    """bpe (byte-level, one for both sides, trained on them), or the path of a tokenizer.json or its folder"""
    vocab_size: int = 10_000
    """tokens of a BPE that is trained on the data"""
    max_source: int | None = None
    """pairs with more source tokens are left out, and counted (default: what the model's context has room for)"""
    max_target: int | None = None
    """the same for the target"""
    batch_tokens: int = 4096
    """target places of one global batch, padding included, whatever the devices: row-multiple sentences at least"""
    buckets: int = 8
    """shapes of batches: sentences of about the same length go together, and each shape is compiled once"""
    row_multiple: int = 8
    """the sentences of every batch are a multiple of this; devices x micro-batches must divide it"""

    def __post_init__(self) -> None:
        require(len(self.path) <= 2, f"data.path has {len(self.path)} files; it takes one or two")
        require(len(self.validation) <= 2, f"data.validation has {len(self.validation)} files; it takes one or two")
        require(bool(self.path) or not self.validation, "data.validation is given without data.path")
        require(0.0 < self.held_out < 1.0, f"data.held-out is {self.held_out}; it must be between 0 and 1")
        require(
            self.vocab_size >= 257,
            f"data.vocab-size is {self.vocab_size}; a byte-level BPE has at least 257 (256 bytes and end-of-text)",
        )
        for name in ("max_source", "max_target", "batch_tokens", "buckets", "row_multiple"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.{name.replace('_', '-')} is {value}; it must be at least 1")


@dataclass(frozen=True)
class TranslationConfig(RunConfig):
    """A translation run: an encoder-decoder learns to turn sources into targets."""

    model: TransformerConfig = field(default_factory=TransformerConfig)
    data: PairsConfig = field(default_factory=PairsConfig)
    label_smoothing: float = 0.1
    """share of the target's probability that is spread over the vocabulary (Szegedy et al. 2016)"""
    validation_sentences: int = 500
    """held-out sentences translated at each evaluation, greedily, for BLEU and exact match; 0 for none"""
    samples: int = 4
    """held-out sentences translated at the end, to be looked at; 0 for none"""

    def __post_init__(self) -> None:
        super().__post_init__()
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, f"label-smoothing is {smoothing}; it must be in [0, 1)")
        for name in ("validation_sentences", "samples"):
            value = getattr(self, name)
            require(value >= 0, f"{name.replace('_', '-')} is {value}; it must not be negative")
        room = self.model.context - 1  # a place is the start or the end token's
        for name in ("max_source", "max_target"):
            value = getattr(self.data, name)
            shown = f"data.{name.replace('_', '-')} is {value}"
            require(value is None or value <= room, f"{shown}, more than model.context {self.model.context} less one")

    @property
    def batch_unit(self) -> tuple[str, int]:
        """The sentences of every batch are a multiple of this."""
        return "data.row-multiple", self.data.row_multiple
