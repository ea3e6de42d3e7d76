"""What a run that fine-tunes a GPT is made of: labelled examples, or conversations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxgpt.config.conversion import require
from jaxgpt.config.runs import GPTRunConfig

TuningTask = Literal["classification", "entailment", "similarity", "multiple-choice"]
Metric = Literal["loss", "accuracy", "f1", "matthews", "pearson", "spearman"]
REGRESSION_METRICS: tuple[Metric, ...] = ("loss", "pearson", "spearman")
CHOICE_METRICS: tuple[Metric, ...] = ("loss", "accuracy")
CLASS_METRICS: tuple[Metric, ...] = ("loss", "accuracy", "f1", "matthews")


@dataclass(frozen=True)
class ExamplesConfig:
    """Where labelled examples come from, and how they become batches."""

    path: tuple[str, ...] = ()
    """.tsv, .csv or .jsonl files of labelled examples (default: reviews made by rule)"""
    validation: tuple[str, ...] = ()
    """the same for the examples held out (default: a share of those in path)"""
    text: tuple[str, ...] = ()
    """the columns or fields that hold the text, in order (default: text or sentence; of pairs premise and hypothesis,
    sentence1 and sentence2, or the like; without a header all but the last)"""
    label: str = "label"
    """the column or field that holds the label (without a header the last)"""
    options: tuple[str, ...] = ("options",)
    """multiple-choice: the columns of the answers to choose from, or the one field with a list of them"""
    held_out: float = 0.1
    """share of the examples held out where no validation is given"""
    tokenizer: str = "bpe"
    """bpe (byte-level, trained on the texts), or the path of a tokenizer.json or its folder; init-from has its own"""
    vocab_size: int = 6000
    """tokens of a BPE that is trained on the data"""
    max_length: int | None = None
    """tokens of one sequence at most; what is longer is cut, and counted (default: the model's context)"""
    batch_size: int = 32
    """examples of a global batch, whatever the number of devices"""
    buckets: int = 4
    """shapes of batches: examples of about the same length go together, and each shape is compiled once"""

    def __post_init__(self) -> None:
        require(bool(self.path) or not self.validation, "data.validation is given without data.path")
        require(0.0 < self.held_out < 1.0, f"data.held-out is {self.held_out}; it must be between 0 and 1")
        require(self.vocab_size >= 257, f"data.vocab-size is {self.vocab_size}; a byte-level BPE has at least 257")
        for name in ("batch_size", "buckets"):
            value = getattr(self, name)
            require(value >= 1, f"data.{name.replace('_', '-')} is {value}; it must be at least 1")
        require(
            self.max_length is None or self.max_length >= 4,
            f"data.max-length is {self.max_length}; it must be at least 4",
        )


@dataclass(frozen=True)
class FinetuneConfig(GPTRunConfig):
    """Fine-tuning of a GPT with a task head, as in Radford et al. 2018: its settings are the default."""

    data: ExamplesConfig = field(default_factory=ExamplesConfig)
    task: TuningTask = "classification"
    """classification of a text; entailment: of a premise and a hypothesis; similarity of two texts, in both orders;
    multiple-choice: which of several answers follows a text"""
    regression: bool = False
    """the labels are numbers, and the head gives one (squared error), instead of a choice between classes"""
    epochs: float | None = 3.0
    """passes over the training examples (None, and where --steps is given: that counts)"""
    evaluations: float | None = 1.0
    """evaluations of the held-out examples in each epoch, 0.5 is every second one (None, and where --eval-interval is
    given: that counts)"""
    lm_weight: float = 0.5
    """weight of the auxiliary language-model loss beside that of the task; 0 is off"""
    head_dropout: float = 0.1
    """share of the features that are zeroed before the head"""
    labels: tuple[str, ...] = ()
    """the classes (default: those of the training examples); of regression, the lowest and the highest score"""
    class_weights: tuple[float, ...] = ()
    """weights of the classes in the loss, in the order of labels, which is sorted unless given (default: all 1)"""
    select: Metric = "loss"
    """which held-out figure decides the best checkpoint, and patience: the lowest loss, or the highest of another"""
    samples: int = 5
    """held-out examples shown at the end; 0 for none"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "evaluations"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} is {value}; it must be positive")
        require(self.lm_weight >= 0, f"lm-weight is {self.lm_weight}; it must not be negative")
        require(0 <= self.head_dropout < 1, f"head-dropout is {self.head_dropout}; it must be in [0, 1)")
        require(all(w > 0 for w in self.class_weights), f"class-weights has {min(self.class_weights, default=0)}; "
                "they must be positive")  # fmt: skip
        require(not (self.regression and self.class_weights), "class-weights has no meaning with regression")
        require(self.samples >= 0, f"samples is {self.samples}; it must not be negative")
        choice = self.task == "multiple-choice"
        require(not (self.regression and choice), "regression has no meaning with the task multiple-choice")
        for name in ("class_weights", "labels"):
            given = choice and getattr(self, name)
            require(not given, f"{name.replace('_', '-')} has no meaning with the task multiple-choice")
        require(len(set(self.labels)) == len(self.labels), f"labels names one twice: {', '.join(self.labels)}")
        measured = REGRESSION_METRICS if self.regression else CHOICE_METRICS if choice else CLASS_METRICS
        which = "with regression" if self.regression else f"with the task {self.task}"
        require(self.select in measured, f"select is {self.select}; {which} it is one of {', '.join(measured)}")

    @property
    def longest(self) -> tuple[str, int | None]:
        """See `GPTRunConfig.longest`."""
        return "data.max-length", self.data.max_length

    @property
    def batch_unit(self) -> tuple[str, int]:
        """The global batch in examples."""
        return "data.batch-size", self.data.batch_size

    @property
    def outputs(self) -> int:
        """C, columns of the head: one for each class; one for a score, and for each answer of a choice."""
        return 1 if self.regression or self.task == "multiple-choice" else len(self.labels)

    @property
    def selection(self) -> tuple[str, bool]:
        """See `RunConfig.selection`."""
        return f"eval/{self.select}", self.select != "loss"


@dataclass(frozen=True)
class ConversationsConfig:
    """Where conversations come from, and how they become batches."""

    path: tuple[str, ...] = ()
    """.jsonl files, a conversation a line (default: small talk made by rule)"""
    validation: tuple[str, ...] = ()
    """the same for the conversations held out (default: a share of those in path)"""
    prompt_field: str = "prompt"
    """the field of what a person says, where a line has no messages"""
    response_field: str = "response"
    """the field of the answer to that"""
    input_field: str = "input"
    """a field that is added to the prompt after an empty line, where a line has it"""
    held_out: float = 0.05
    """share of the conversations held out where no validation is given"""
    tokenizer: str = "bpe"
    """bpe (byte-level, trained on the text), or the path of a tokenizer.json or its folder; init-from has its own"""
    vocab_size: int = 4096
    """tokens of a BPE that is trained on the data"""
    sequence_length: int | None = None
    """tokens of one row of a batch (default: the model's context)"""
    batch_size: int = 8
    """rows of a global batch, whatever the number of devices"""
    pack: bool = True
    """put several conversations into a row; none sees another"""
    too_long: Literal["leave-out", "drop-turns"] = "leave-out"
    """a conversation longer than a row: not used, or without its oldest turns; both are counted"""

    def __post_init__(self) -> None:
        require(bool(self.path) or not self.validation, "data.validation is given without data.path")
        require(0.0 <= self.held_out < 1.0, f"data.held-out is {self.held_out}; it must be in [0, 1)")
        require(self.vocab_size >= 257, f"data.vocab-size is {self.vocab_size}; a byte-level BPE has at least 257")
        require(self.batch_size >= 1, f"data.batch-size is {self.batch_size}; it must be at least 1")
        length = self.sequence_length
        require(length is None or length >= 2, f"data.sequence-length is {length}; it must be at least 2")


@dataclass(frozen=True)
class ChatConfig(GPTRunConfig):
    """Instruction or chat tuning: a GPT learns to answer, by the likelihood of the answers alone."""

    data: ConversationsConfig = field(default_factory=ConversationsConfig)
    epochs: float | None = 3.0
    """passes over the training conversations (None, and where --steps is given: that counts)"""
    evaluations: float | None = 1.0
    """evaluations of the held-out conversations in each epoch, 0.5 is every second one (None, and where
    --eval-interval is given: that counts)"""
    validation_answers: int = 50
    """held-out conversations answered at each evaluation, greedily, for exact match; 0 for none"""
    samples: int = 4
    """held-out conversations answered at the end, to be looked at; 0 for none"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.adapt.method != "head", "adapt.method is head, and a chat model has no head of its own")
        for name in ("epochs", "evaluations"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} is {value}; it must be positive")
        for name in ("validation_answers", "samples"):
            value = getattr(self, name)
            require(value >= 0, f"{name.replace('_', '-')} is {value}; it must not be negative")

    @property
    def longest(self) -> tuple[str, int | None]:
        """See `GPTRunConfig.longest`."""
        return "data.sequence-length", self.data.sequence_length

    @property
    def batch_unit(self) -> tuple[str, int]:
        """The global batch in rows."""
        return "data.batch-size", self.data.batch_size

    @property
    def sequence_length(self) -> int:
        """T, tokens of one row."""
        return self.data.sequence_length or self.model.context
