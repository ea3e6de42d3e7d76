"""What a run is made of: budgets, what it begins with; and the text of a pretraining run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxgpt.config.conversion import require
from jaxgpt.config.devices import Distributed, HostsConfig, ParallelConfig
from jaxgpt.config.models import BlockConfig, GPTConfig
from jaxgpt.config.optimizer import OptimizerConfig

LoraTarget = Literal["qkv", "out", "up", "down"]


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
class RunConfig:
    """What every training run has, whatever it learns."""

    model: BlockConfig = field(default_factory=BlockConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    distributed: Distributed = "auto"
    """whether this process is one of several that train together: on, off, or auto: if its launcher says so (Slurm,
    Open MPI, Kubernetes, Cloud TPU), or a coordinator is given"""
    hosts: HostsConfig = field(default_factory=HostsConfig)
    steps: int = 2000
    """optimiser steps"""
    seed: int = 1337
    """initial weights, data order and dropout all follow from it"""
    strict_reproducibility: bool = False
    """the same bits on 1, 2, 4 or 8 devices, and when their number changes in mid-run; slower (see the README)"""
    out: str | None = None
    """the run folder (default: a new folder under runs/, named after the recipe)"""
    resume: Literal["never", "latest", "latest-good"] = "never"
    """latest: go on from the newest checkpoint in the run folder, or start if there is none; latest-good: from the
    newest that is not damaged"""
    max_seconds: float | None = None
    """end by the clock: the schedule follows the share of this budget used, so the run still ends annealed"""
    eval_interval: int = 250
    """steps between evaluations of the whole held-out split"""
    checkpoint_interval: int | None = None
    """steps between checkpoints (default: at every evaluation)"""
    keep: int = 2
    """newest checkpoints at the run's intervals that are kept, besides the last and the best: where one is damaged,
    that before it is there"""
    average: int = 1
    """the newest checkpoints whose mean is the model in the end (see --checkpoint average); they are all kept"""
    patience: int | None = None
    """end early after so many evaluations without a lower held-out loss"""
    watchdog_seconds: float | None = None
    """end the run, with the stacks of all threads, if no step, evaluation batch or save ends in so many seconds,
    compilation included"""
    log_interval: int = 10
    """steps between lines of metrics.jsonl; the first 20 steps are all logged"""
    quiet: bool = False
    """print nothing but errors"""
    tensorboard: bool = False
    """write TensorBoard events into the run folder too (needs the extra 'tensorboard')"""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, f"seed is {self.seed}; it must be in [0, 2**31)")
        for name in ("steps", "eval_interval", "checkpoint_interval", "keep", "average", "patience", "log_interval"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name.replace('_', '-')} is {value}; it must be at least 1")
        require("://" not in (self.out or ""), f"out is {self.out}; it must be a folder, as that of a mounted bucket")
        for name in ("max_seconds", "watchdog_seconds"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name.replace('_', '-')} is {value}; it must be positive")
        if self.strict_reproducibility:
            self._check_strict()

    def _check_strict(self) -> None:
        """Raise `ValueError` for what would let the bits depend on the clock, or on how devices add up."""
        parallel = self.parallel
        for name, value, right in [
            ("max-seconds", self.max_seconds, (None,)),
            ("parallel.strategy", parallel.strategy, ("auto", "single")),
            ("parallel.mesh", parallel.mesh, (None,)),
        ]:
            ask = " or ".join(map(str, right))
            require(value in right, f"{name} is {value}; with strict-reproducibility it must be {ask}")

    @property
    def batch_unit(self) -> tuple[str, int]:
        """What devices x micro-batches must divide: the setting, and its value."""
        raise NotImplementedError

    @property
    def selection(self) -> tuple[str, bool]:
        """The held-out figure that decides the best checkpoint, and patience; and whether the highest is the best."""
        return "eval/loss", False

    def saves_at(self, step: int) -> bool:
        """Whether every run with these intervals has a checkpoint of this step, also one that nothing interrupted."""
        intervals = (self.eval_interval, self.checkpoint_interval or self.eval_interval)
        return step > 0 and any(step % interval == 0 for interval in intervals)


@dataclass(frozen=True)
class AdaptConfig:
    """Which parameters of a pretrained model change."""

    method: Literal["all", "head", "last", "lora"] = "all"
    """all; the new head alone; the last layers, final norm and head; or low-rank adapters (Hu et al. 2021) and head"""
    last_layers: int = 1
    """last: how many"""
    rank: int = 8
    """lora: r, columns of A and rows of B"""
    alpha: float = 16.0
    """lora: the product is scaled by alpha / r"""
    targets: tuple[LoraTarget, ...] = ("qkv",)
    """lora: the matrices adapted in every block: qkv, out (of the attention), up, down (of the feed-forward layer)"""

    def __post_init__(self) -> None:
        for name in ("last_layers", "rank"):
            value = getattr(self, name)
            require(value >= 1, f"adapt.{name.replace('_', '-')} is {value}; it must be at least 1")
        require(self.alpha > 0, f"adapt.alpha is {self.alpha}; it must be positive")
        require(bool(self.targets), "adapt.targets is empty; it must name at least one of qkv, out, up, down")
        require(
            len(set(self.targets)) == len(self.targets), f"adapt.targets names one twice: {', '.join(self.targets)}"
        )

    def check(self, model: GPTConfig) -> None:
        """Raise `ValueError` if a model has not as many layers as are to be trained."""
        fits = self.method != "last" or self.last_layers <= model.layers
        require(fits, f"adapt.last-layers is {self.last_layers}, and the model has {model.layers}")


@dataclass(frozen=True)
class GPTRunConfig(RunConfig):
    """A run that trains a GPT: from scratch, or from what another has learned."""

    model: GPTConfig = field(default_factory=GPTConfig)
    init_from: str | None = None
    """begin with this model, its sizes and its tokenizer: a run, a Hugging Face folder, or a name on its hub"""
    adapt: AdaptConfig = field(default_factory=AdaptConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        method = self.adapt.method
        scratch = f"adapt.method is {method}, which needs a pretrained model: give --init-from"
        require(method == "all" or self.init_from is not None, scratch)
        if self.init_from is None:
            self.check_fit()

    @property
    def longest(self) -> tuple[str, int | None]:
        """The setting that says how long a sequence is, and its value."""
        raise NotImplementedError

    def check_fit(self) -> None:
        """Raise `ValueError` unless the model has room for the sequences, and the layers that are to be trained."""
        self.adapt.check(self.model)
        name, length = self.longest
        fits = length is None or length <= self.model.context
        require(fits, f"{name} is {length}, longer than the model's context of {self.model.context} tokens")


@dataclass(frozen=True)
class TrainConfig(GPTRunConfig):
    """A pretraining run: a GPT learns to predict text."""

    data: DataConfig = field(default_factory=DataConfig)
    sample_tokens: int = 256
    """tokens of the sample at the end; 0 for none"""
    sample_prompt: str | None = None
    """what the sample continues (default: a new document, or the start of a single text's held-out part)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sample_tokens >= 0, f"sample-tokens is {self.sample_tokens}; it must not be negative")
        require(self.adapt.method != "head", "adapt.method is head, and a language model has no head of its own")

    @property
    def batch_unit(self) -> tuple[str, int]:
        """The global batch in sequences."""
        return "data.batch-size", self.data.batch_size

    @property
    def longest(self) -> tuple[str, int | None]:
        """See `GPTRunConfig.longest`."""
        return "data.sequence-length", self.data.sequence_length

    @property
    def sequence_length(self) -> int:
        """T, tokens of one training sequence."""
        return self.data.sequence_length or self.model.context

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one global batch."""
        return self.data.batch_size * self.sequence_length
