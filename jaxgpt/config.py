"""What a run is made of: frozen dataclasses, checked when they are built, JSON both ways.

Every field is also a command-line flag: `TrainConfig.data.batch_size` is `--data.batch-size`, and the
sentence under a field is its `--help`. A recipe (`recipes.py`) is a complete `TrainConfig`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Dtype = Literal["float32", "bfloat16", "float64"]
Strategy = Literal["auto", "single", "pmap", "mesh"]
AttentionName = Literal["auto", "reference", "blocked"]
ActivationName = Literal["gelu_new", "gelu", "relu", "silu", "tanh"]


def require(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class BlockConfig:
    """What the blocks of every model here are made of."""

    vocab_size: int | None = None
    """V, rows of the token embedding (default: as many as the tokenizer has)"""
    context: int = 1024
    """longest sequence the model can see, in tokens"""
    heads: int = 12
    """N, attention heads a block"""
    width: int = 768
    """D, width of the residual stream"""
    hidden: int | None = None
    """F, width inside the feed-forward layer (default: 4 x width)"""
    dropout: float = 0.0
    """share of activations zeroed in training: embeddings, attention weights, residual branches"""
    embedding_dropout: float | None = None
    """the same for the embeddings alone (default: dropout)"""
    attention_dropout: float | None = None
    """the same for the attention weights alone (default: dropout)"""
    bias: bool = True
    """biases in the dense layers and the layer norms"""
    positions: Literal["learned", "sinusoidal"] = "learned"
    """positional encoding: a trained table, or the sinusoids of Vaswani et al. 2017"""
    activation: ActivationName = "gelu_new"
    """of the feed-forward layer: GELU in its tanh form (gelu_new, as published) or exact (gelu), relu, silu, tanh"""
    norm: Literal["pre", "post"] = "pre"
    """layer norms before each sublayer and at the end (GPT-2), or after each residual sum (the first GPT)"""
    scale_attention: bool = True
    """divide attention scores by the root of the head width"""
    scale_attention_by_layer: bool = False
    """divide those of block i by i + 1 as well"""
    norm_epsilon: float = 1e-5
    """added to the variance in every layer norm"""
    init_std: float | None = 0.02
    """standard deviation of the initial weights (None: Glorot and Bengio 2010, from the sides of each matrix)"""
    parameter_dtype: Dtype = "float32"
    """what the parameters are stored in"""
    compute_dtype: Dtype = "float32"
    """what the layers compute in; losses are always at least float32"""
    attention: AttentionName = "auto"
    """form of causal attention: the full score matrix, blocks of queries, or the faster for the length"""
    remat: bool = False
    """recompute each block in the backward pass: less memory, about a third more time"""
    unroll: int | None = None
    """blocks unrolled in the scan over layers (default: all on CPU up to 12 layers, else 1)"""

    def __post_init__(self) -> None:
        for name in ("context", "heads", "width"):
            require(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("vocab_size", "hidden", "unroll"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.{name.replace('_', '-')} is {value}; it must be at least 1")
        require(
            self.width % self.heads == 0,
            f"model.heads is {self.heads}, which does not divide model.width {self.width}",
        )
        require(
            self.positions == "learned" or self.width % 2 == 0,
            f"model.width is {self.width}; sinusoidal positions need an even width",
        )
        for name in ("dropout", "embedding_dropout", "attention_dropout"):
            share = getattr(self, name)
            in_range = share is None or 0.0 <= share < 1.0
            require(in_range, f"model.{name.replace('_', '-')} is {share}; it must be in [0, 1)")
        require(self.norm_epsilon > 0, f"model.norm-epsilon is {self.norm_epsilon}; it must be positive")
        std = self.init_std
        require(std is None or std > 0, f"model.init-std is {std}; it must be positive, or None")

    @property
    def head_width(self) -> int:
        """H, width of one attention head."""
        return self.width // self.heads

    @property
    def hidden_width(self) -> int:
        """F, width inside the feed-forward layer."""
        return self.hidden if self.hidden is not None else 4 * self.width


@dataclass(frozen=True)
class GPTConfig(BlockConfig):
    """A GPT as published (Radford et al. 2019): pre-norm blocks, learned positions, tanh-GELU, tied head.

    With `norm="post"` it is the first GPT (Radford et al. 2018).
    """

    layers: int = 12
    """L, number of blocks; residual projections start at init_std / sqrt(2 L)"""
    tied_head: bool = True
    """the output head is the token embedding (Press and Wolf 2017)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.layers >= 1, f"model.layers is {self.layers}; it must be at least 1")


@dataclass(frozen=True)
class TransformerConfig(BlockConfig):
    """The encoder-decoder of "Attention Is All You Need" (Vaswani et al. 2017), base size.

    Post-norm, sinusoidal positions, ReLU; one embedding, scaled by sqrt(D), for source, target and output.
    """

    context: int = 256
    """longest source, and longest target, in tokens"""
    heads: int = 8
    """N, attention heads a block"""
    width: int = 512
    """D, width of the residual stream"""
    dropout: float = 0.1
    """share of activations zeroed in training: embeddings and residual branches"""
    attention_dropout: float | None = 0.0
    """the same for the attention weights, where the paper has none (None: as dropout)"""
    positions: Literal["learned", "sinusoidal"] = "sinusoidal"
    """positional encoding: the sinusoids of the paper, or a trained table"""
    activation: ActivationName = "relu"
    """of the feed-forward layer"""
    norm: Literal["pre", "post"] = "post"
    """layer norms after each residual sum, as in the paper, or before each sublayer and at the end"""
    init_std: float | None = None
    """standard deviation of the initial weights (default: Glorot and Bengio 2010, from the sides of each matrix)"""
    encoder_layers: int = 6
    """blocks of the encoder"""
    decoder_layers: int = 6
    """blocks of the decoder"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("encoder_layers", "decoder_layers"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name.replace('_', '-')} is {value}; it must be at least 1")


def transformer_size(name: str, **changes: Any) -> TransformerConfig:
    """An encoder-decoder of a published size, with `changes`.

    `base` and `big` are those of Vaswani et al. 2017 (table 3), `tiny` that of Wu et al. 2021.

    Raises:
        ValueError: there is no such size.
    """
    sizes: dict[str, dict[str, Any]] = {
        "tiny": {"encoder_layers": 4, "decoder_layers": 4, "width": 128, "hidden": 256, "heads": 4},
        "base": {},
        "big": {"width": 1024, "heads": 16, "dropout": 0.3},
    }
    require(name in sizes, f"there is no Transformer of size {name}{suggestion(name, sizes)}")
    return TransformerConfig(**sizes[name] | changes)


def gpt_size(name: str, **changes: Any) -> GPTConfig:
    """A GPT of a published size (Radford et al. 2019, table 2), or `tiny`, nanoGPT's for a laptop; with `changes`.

    Raises:
        ValueError: there is no such size.
    """
    sizes = {
        "tiny": {"layers": 4, "heads": 4, "width": 128, "context": 64},
        "124M": {"layers": 12, "heads": 12, "width": 768},
        "355M": {"layers": 24, "heads": 16, "width": 1024},
        "774M": {"layers": 36, "heads": 20, "width": 1280},
        "1558M": {"layers": 48, "heads": 25, "width": 1600},
    }
    require(name in sizes, f"there is no GPT of size {name}{suggestion(name, sizes)}")
    return GPTConfig(**sizes[name] | changes)


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from, how it becomes tokens, and how many make a batch."""

    path: tuple[str, ...] = ()
    """text files, folders, .jsonl files, or - for standard input (default: the Python standard library's source)"""
    text_field: str = "text"
    """the field of a .jsonl line that holds the text"""
    tokenizer: str = "bpe"
    """byte, character, bpe (trained on the data), or the path of a tokenizer.json or of a folder that has one"""
    vocab_size: int = 4096
    """tokens of a BPE that is trained on the data"""
    unknown: Literal["error", "token"] = "error"
    """a character outside a character vocabulary: an error that names it, or an unknown token"""
    held_out: float = 0.1
    """share of the text kept for evaluation: whole documents, or the end of a single text"""
    batch_size: int = 12
    """global batch of one step, in sequences, whatever the number of devices"""
    sequence_length: int | None = None
    """tokens of one training sequence (default: the model's context)"""
    cache: str | None = None
    """folder for tokenised text (default: jaxgpt/tokens in the user's cache folder)"""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"data.batch-size is {self.batch_size}; it must be at least 1")
        require(0.0 < self.held_out < 1.0, f"data.held-out is {self.held_out}; it must be between 0 and 1")
        require(
            self.vocab_size >= 257,
            f"data.vocab-size is {self.vocab_size}; a byte-level BPE has at least 257 (256 bytes and end-of-text)",
        )
        length = self.sequence_length
        require(length is None or length >= 1, f"data.sequence-length is {length}; it must be at least 1")


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
    """target places of one global batch, padding included, whatever the number of devices"""
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
class OptimizerConfig:
    """Clip by global norm, AdamW (or Muon for matrices), warm up, decay."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the blocks' matrices and adamw for the rest"""
    learning_rate: float = 1e-3
    """peak learning rate of AdamW"""
    final_learning_rate: float = 1e-4
    """learning rate at the last step (cosine, linear, wsd)"""
    muon_learning_rate: float = 0.02
    """peak learning rate of Muon's matrices; follows the same schedule"""
    schedule: Literal["cosine", "linear", "inverse-sqrt", "noam", "wsd", "constant"] = "cosine"
    """what follows the linear warm-up; noam is inverse-sqrt with learning-rate a factor of 1 / sqrt(width x warm-up)"""
    warmup_steps: int = 100
    """steps from zero to the peak"""
    decay_share: float = 0.2
    """wsd: the share of the run, at its end, in which the rate falls"""
    beta1: float = 0.9
    """decay of the first moment"""
    beta2: float = 0.99
    """decay of the second moment"""
    epsilon: float = 1e-8
    """added to the root of the second moment"""
    weight_decay: float = 0.1
    """decoupled decay, on matrices only"""
    clip_norm: float | None = 1.0
    """largest global norm of the gradient (None: no clipping)"""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "muon_learning_rate", "epsilon"):
            value = getattr(self, name)
            require(value > 0, f"optimizer.{name.replace('_', '-')} is {value}; it must be positive")
        for name in ("final_learning_rate", "warmup_steps", "weight_decay"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name.replace('_', '-')} is {value}; it must not be negative")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} is {value}; it must be in [0, 1)")
        require(0 < self.decay_share <= 1, f"optimizer.decay-share is {self.decay_share}; it must be in (0, 1]")
        norm = self.clip_norm
        require(norm is None or norm > 0, f"optimizer.clip-norm is {norm}; it must be positive, or None")


@dataclass(frozen=True)
class ParallelConfig:
    """How one step is spread over devices. It changes how long a step takes, not what it computes."""

    strategy: Strategy = "auto"
    """single: one device; pmap: data-parallel jax.pmap; mesh: jit over a mesh; auto: pmap if several devices"""
    devices: int | None = None
    """how many local devices (default: all that divide the batch)"""
    gradient_accumulation: int = 1
    """micro-batches a device computes one after another for one step"""

    def __post_init__(self) -> None:
        require(self.devices is None or self.devices >= 1, f"parallel.devices is {self.devices}; it must be at least 1")
        steps = self.gradient_accumulation
        require(steps >= 1, f"parallel.gradient-accumulation is {steps}; it must be at least 1")


@dataclass(frozen=True)
class RunConfig:
    """What every training run has, whatever it learns."""

    model: BlockConfig = field(default_factory=BlockConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    steps: int = 2000
    """optimiser steps"""
    seed: int = 1337
    """initial weights, data order and dropout all follow from it"""
    out: str | None = None
    """the run folder (default: a new folder under runs/, named after the recipe)"""
    resume: Literal["never", "latest"] = "never"
    """latest: go on from the newest checkpoint in the run folder, or start if there is none"""
    max_seconds: float | None = None
    """end by the clock: the schedule follows the share of this budget used, so the run still ends annealed"""
    eval_interval: int = 250
    """steps between evaluations of the whole held-out split"""
    checkpoint_interval: int | None = None
    """steps between checkpoints (default: at every evaluation)"""
    average: int = 1
    """the newest checkpoints whose mean is the model in the end (see --checkpoint average); they are all kept"""
    patience: int | None = None
    """end early after so many evaluations without a lower held-out loss"""
    log_interval: int = 10
    """steps between lines of metrics.jsonl; the first 20 steps are all logged"""
    quiet: bool = False
    """print nothing but errors"""
    tensorboard: bool = False
    """write TensorBoard events into the run folder too (needs the extra 'tensorboard')"""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, f"seed is {self.seed}; it must be in [0, 2**31)")
        for name in ("steps", "eval_interval", "checkpoint_interval", "average", "patience", "log_interval"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name.replace('_', '-')} is {value}; it must be at least 1")
        seconds = self.max_seconds
        require(seconds is None or seconds > 0, f"max-seconds is {seconds}; it must be positive")

    @property
    def batch_unit(self) -> tuple[str, int]:
        """What devices x micro-batches must divide: the setting, and its value."""
        raise NotImplementedError


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """A pretraining run: a GPT learns to predict text."""

    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sample_tokens: int = 256
    """tokens of the sample at the end; 0 for none"""
    sample_prompt: str | None = None
    """what the sample continues (default: a new document, or the start of a single text's held-out part)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sample_tokens >= 0, f"sample-tokens is {self.sample_tokens}; it must not be negative")
        require(
            self.sequence_length <= self.model.context,
            f"data.sequence-length is {self.data.sequence_length}, longer than model.context {self.model.context}",
        )

    @property
    def batch_unit(self) -> tuple[str, int]:
        """The global batch in sequences."""
        return "data.batch-size", self.data.batch_size

    @property
    def sequence_length(self) -> int:
        """T, tokens of one training sequence."""
        return self.data.sequence_length or self.model.context

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one global batch."""
        return self.data.batch_size * self.sequence_length


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


# The kind of config of each task, by the name that stands in a run's config.json.
TASKS: dict[str, type[RunConfig]] = {"language-modelling": TrainConfig, "translation": TranslationConfig}


@dataclass(frozen=True)
class GenerationConfig:
    """How text is made from a model's logits."""

    max_new_tokens: int | None = None
    """how many tokens to make at most (default: 256, or what the model's context has room for)"""
    min_new_tokens: int = 0
    """how many tokens to make before a stop token may come"""
    temperature: float = 0.8
    """divides the logits; 0 takes the most likely token"""
    top_k: int | None = None
    """sample among the k most likely tokens only"""
    top_p: float | None = None
    """sample among the most likely tokens that together have probability p (Holtzman et al. 2020)"""
    min_p: float | None = None
    """sample among the tokens at least min-p times as likely as the most likely one"""
    repetition_penalty: float = 1.0
    """divides positive logits of tokens seen before, multiplies negative ones (Keskar et al. 2019); 1 is off"""
    no_repeat_ngram: int | None = None
    """never make a sequence of n tokens that was there before"""
    samples: int = 1
    """how many texts for each prompt"""
    beams: int = 1
    """beam search with this many beams instead of sampling; the best texts are returned"""
    length_penalty: float = 1.0
    """beam search: a text's log-probability is divided by its new tokens to this power"""
    early_stopping: Literal["true", "false", "never"] = "false"
    """beam search: stop once there are enough texts (true), when better ones are unlikely, or impossible (never)"""
    stop: tuple[str, ...] = ()
    """end where one of these strings comes; it is not part of the text"""
    stop_tokens: tuple[int, ...] | None = None
    """end at one of these token ids (default: the model's end-of-text)"""
    lookup: int = 0
    """tokens guessed ahead from what was seen before, to make several at once; the text stays the same"""
    truncate: Literal["never", "left"] = "never"
    """left: where prompt and text outgrow the context, drop the oldest tokens instead of refusing"""
    seed: int = 0
    """the same seed gives the same text"""

    def __post_init__(self) -> None:
        at_least = {"max_new_tokens": 1, "top_k": 1, "no_repeat_ngram": 1, "samples": 1, "beams": 1}
        at_least |= {"min_new_tokens": 0, "temperature": 0, "lookup": 0}
        for name, least in at_least.items():
            value, option = getattr(self, name), name.replace("_", "-")
            # Written so that NaN is refused too.
            require(value is None or value >= least, f"{option} is {value}; it must be at least {least}")
        for name in ("top_p", "min_p"):
            value, option = getattr(self, name), name.replace("_", "-")
            require(value is None or 0 < value <= 1, f"{option} is {value}; it must be in (0, 1]")
        penalty = self.repetition_penalty
        require(penalty > 0, f"repetition-penalty is {penalty}; it must be positive")
        require(math.isfinite(self.length_penalty), f"length-penalty is {self.length_penalty}; it must be finite")
        require(0 <= self.seed < 2**31, f"seed is {self.seed}; it must be in [0, 2**31)")
        require("" not in self.stop, "stop is an empty string, which is everywhere")
        limit = self.max_new_tokens
        require(
            limit is None or self.min_new_tokens <= limit,
            f"min-new-tokens is {self.min_new_tokens}, more than max-new-tokens {limit}",
        )
        if self.beams > 1:
            sampling = ("temperature", "top_k", "top_p", "min_p", "lookup")
            changed = [name for name in sampling if getattr(self, name) != getattr(GenerationConfig, name)]
            require(not changed, f"{(changed or [''])[0].replace('_', '-')} has no meaning with beams {self.beams}")
            require(self.samples <= self.beams, f"samples is {self.samples}, more than beams {self.beams}")
            require(self.truncate == "never", "truncate left has no meaning with beams")


T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain JSON values, nested as the dataclasses are."""
    return dataclasses.asdict(config)


def from_dict(kind: type[T], values: Any, where: str = "") -> T:
    """Build `kind` from what `to_dict` returned.

    Raises:
        ValueError: no object, a key that `kind` does not have, or a value of the wrong type; the key is named.
    """
    hints = typing.get_type_hints(kind)
    if not isinstance(values, dict):
        raise ValueError(f"{where.rstrip('.') or 'the config'} holds {values!r}; it must be an object with keys")
    unknown = [key for key in values if key not in hints]
    if unknown:
        raise ValueError(f"unknown key {where}{unknown[0]}{suggestion(unknown[0], hints)}")
    return kind(**{key: _convert(hints[key], value, where + key) for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check one JSON value against one annotation; lists become tuples, objects become dataclasses."""
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where + ".")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if type(None) in arguments:
        return None if value is None else _convert(arguments[0], value, where)  # X | None
    if origin is tuple:
        fits = isinstance(value, (list, tuple)) and all(isinstance(item, arguments[0]) for item in value)
        if fits:
            return tuple(value)
    elif origin is Literal:
        fits = value in arguments
    else:
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        fits = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    require(fits, f"{where} is {value!r}, which is not of the type it should have")
    return value


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return `{"data.batch-size": 12, ...}`: every leaf of a config under its command-line name."""
    leaves: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        name, value = prefix + item.name.replace("_", "-"), getattr(config, item.name)
        leaves |= flatten(value, name + ".") if dataclasses.is_dataclass(value) else {name: value}
    return leaves


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the known name nearest to `wrong`, or the list of those there are."""
    names = list(known)
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"
