"""The verbs about text: generate, evaluate, export, verify."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
from dataclasses import dataclass
from typing import Literal

from jaxgpt.arguments import parse
from jaxgpt.cli.options import DecodingOptions, ModelOptions, WritingOptions, load_model
from jaxgpt.cli.translation import evaluate_translation
from jaxgpt.config import require


@dataclass(frozen=True)
class GenerateOptions(WritingOptions):
    """Let a model write."""

    prompt: tuple[str, ...] = ()
    """what to continue, one or several (default: standard input)"""
    json: bool = False
    """print one JSON object a text: prompt, text, tokens (the new ids), logprobs, finish_reason"""


@dataclass(frozen=True)
class ExportOptions(ModelOptions):
    """Write a model as a folder that other programs load."""

    out: str = ""
    """the folder to make; it must not exist, or be empty"""
    format: Literal["hf", "adapter"] = "hf"
    """hf: what transformers loads with from_pretrained, adapters folded in; adapter: a run's alone, as PEFT reads it"""

    def __post_init__(self) -> None:
        require(bool(self.out), "--out is needed: the folder to make")


@dataclass(frozen=True)
class EvaluateOptions(DecodingOptions):
    """Measure how well a model predicts a text; with --source and --reference (see --source --help) a translator."""

    data: tuple[str, ...] = ()
    """text files, folders, .jsonl files, or - for standard input"""
    text_field: str = "text"
    """the field of a .jsonl line that holds the text"""
    stride: int | None = None
    """tokens from one window to the next in what is longer than the context (default: half the context)"""
    batch_size: int = 8
    """windows computed at once"""
    per_token: str | None = None
    """write the loss of every token to this file, one JSON object a line: document, position, token, loss"""
    json: bool = False
    """print one JSON object instead of a table"""

    def __post_init__(self) -> None:
        require(bool(self.data), "--data is needed: the text to predict; or, of a translator, --source and --reference")
        require(self.stride is None or self.stride >= 1, f"stride is {self.stride}; it must be at least 1")
        require(self.batch_size >= 1, f"batch-size is {self.batch_size}; it must be at least 1")


@dataclass(frozen=True)
class VerifyOptions(ModelOptions):
    """Check that a checkpoint computes what it should; exit code 1 if it does not."""

    reference: Literal["none", "hf"] = "none"
    """hf: compare with transformers in PyTorch too (both must be installed)"""
    json: bool = False
    """print one JSON object a check: check, measured, bound, passed"""


def generate(arguments: list[str]) -> int:
    options = parse(GenerateOptions, arguments, "jaxgpt generate")
    settings = options.settings
    model = load_model(options, options.draft)
    prompts = options.prompt or (_standard_input(),)
    if not options.json and len(prompts) == settings.samples == settings.beams == 1:
        pieces = model.stream(prompts[0], settings)  # refuses what is wrong before anything is printed
        print(prompts[0], end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return 0
    for number, generated in enumerate(model.generate_batch(prompts, settings)):
        if options.json:
            print(json.dumps(dataclasses.asdict(generated)))
        else:
            print("---\n" * (number > 0) + generated.prompt + generated.text)
    return 0


def _standard_input() -> str:
    """All of it.

    Raises:
        ValueError: it is not UTF-8.
    """
    if sys.stdin.isatty():
        print("the prompt, please; Ctrl-D ends it", file=sys.stderr)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"standard input is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
        ) from None


def export(arguments: list[str]) -> int:
    options = parse(ExportOptions, arguments, "jaxgpt export")
    from jaxgpt import api
    from jaxgpt.tasks.classifiers import is_classifier

    if options.format == "adapter":
        api.export_adapter(options.model, options.out, checkpoint=options.checkpoint)
        print(f"{options.out} holds the adapter; peft loads it with PeftModel.from_pretrained")
        return 0
    if is_classifier(options.model):
        from jaxgpt.apps.sentiment import Classifier

        loaded = Classifier(options.model, checkpoint=options.checkpoint, dtype=options.dtype, base=options.base)
        api.export(loaded, options.out)
        loader = "AutoModelForSequenceClassification.from_pretrained"
        print(f"{options.out} holds the classifier; transformers loads it with {loader}")
        return 0
    api.export(load_model(options), options.out)
    print(f"{options.out} holds the model; transformers loads it with AutoModelForCausalLM.from_pretrained")
    return 0


def evaluate(arguments: list[str]) -> int:
    if any(argument.startswith(("--source", "--reference")) for argument in arguments):
        return evaluate_translation(arguments)
    options = parse(EvaluateOptions, arguments, "jaxgpt evaluate")
    from jaxgpt import evaluate as measure

    model = load_model(options)
    result = measure.evaluate(
        model, options.data, text_field=options.text_field, stride=options.stride, batch_size=options.batch_size,
        per_token=options.per_token,
    )  # fmt: skip
    print(json.dumps(dataclasses.asdict(result)) if options.json else measure.describe(result))
    return 0


def verify(arguments: list[str]) -> int:
    options = parse(VerifyOptions, arguments, "jaxgpt verify")
    from jaxgpt import verify as certificate

    passed = True
    for check in certificate.checks(load_model(options), reference=options.reference):
        record = dataclasses.asdict(check) | {"passed": check.passed}
        record["measured"] = check.measured if math.isfinite(check.measured) else None  # JSON has no NaN
        print(json.dumps(record) if options.json else certificate.line(check), flush=True)
        passed &= check.passed
    return 0 if passed else 1
