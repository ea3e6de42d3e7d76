"""The command line: `jaxgpt VERB ...`. Parses, calls the API, turns errors into one line and an exit code.

Exit codes: 0 done, 1 the run failed, 2 bad input, 75 stopped by a signal and saved (start it again with --resume),
130 interrupted at once.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxgpt import __version__, recipes
from jaxgpt.arguments import parse, value_of
from jaxgpt.config import GenerationConfig, LengthRule, require, suggestion
from jaxgpt.storage.runs import RunFolder
from jaxgpt.training.report import make_reporter

if TYPE_CHECKING:
    from jaxgpt.api import LanguageModel
    from jaxgpt.apps.translator import Translated, Translator

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
BAD_INPUT = (ValueError, FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)

USAGE = """usage: jaxgpt VERB ...

  train [RECIPE] [--section.key value ...]   train a model (the same as python train.py)
  generate --model MODEL --prompt TEXT       let a model write
  translate --model RUN [FILE|-]             translate, line in, line out
  evaluate --model MODEL --data FILE         measure how well it predicts a text
  evaluate --model RUN --source F --reference G   measure how well it translates (BLEU, chrF)
  export --model MODEL --out FOLDER          write it for transformers and other programs
  verify --model MODEL [--reference hf]      check that it computes what it should

MODEL is a run folder, a Hugging Face folder, or a name on the hub such as gpt2.

jaxgpt VERB --help says more. --debug, with any verb, shows the traceback of an error.
"""

TRAIN_USAGE = """usage: python train.py [RECIPE] [--section.key value ...]   (or: jaxgpt train ...)

Without a recipe, `default`. Every setting below can be given as --name value or --name=value.

recipes:
{recipes}
"""


@dataclass(frozen=True)
class RunOptions:
    """Which run."""

    model: str
    """a run folder"""
    checkpoint: Literal["best", "last", "average"] | None = None
    """a run: its best checkpoint, its newest, or the mean of its newest (default: average if it averages, else best)"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """what is computed in (default: a run's own; float32 for other models)"""


@dataclass(frozen=True)
class ModelOptions(RunOptions):
    """Which model."""

    model: str
    """a run folder, a Hugging Face folder, or a name on the Hugging Face hub (gpt2, distilgpt2, OWNER/NAME)"""
    revision: str | None = None
    """a name on the hub: the commit, tag or branch (default: main)"""


@dataclass(frozen=True)
class GenerateOptions(GenerationConfig, ModelOptions):
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
    format: Literal["hf"] = "hf"
    """hf: what transformers loads with from_pretrained"""

    def __post_init__(self) -> None:
        require(bool(self.out), "--out is needed: the folder to make")


@dataclass(frozen=True)
class SearchOptions:
    """How a translation is searched for."""

    beam: int = 4
    """beams of the search; 1 takes the most likely token each time"""
    length_rule: LengthRule = "wu"
    """what the log-probability of n tokens, end token included, is divided by: ((5 + n) / 6)^p (wu), n^p (others)"""
    length_penalty: float = 0.6
    """p in that; 0 divides by nothing, more makes translations longer"""
    max_length: int | None = None
    """tokens of a translation, its end token included, at most (default: twice the source's and 10)"""
    batch_size: int = 64
    """sentences translated together"""

    def __post_init__(self) -> None:
        for name in ("beam", "batch_size", "max_length"):
            value, option = getattr(self, name), name.replace("_", "-")
            require(value is None or value >= 1, f"{option} is {value}; it must be at least 1")

    def settings(self, best: int = 1) -> GenerationConfig:
        """The search for the `best` translations of a sentence."""
        return GenerationConfig(
            beams=self.beam, samples=best, length_rule=self.length_rule, length_penalty=self.length_penalty,
            max_new_tokens=self.max_length,
        )  # fmt: skip


@dataclass(frozen=True)
class TranslateOptions(SearchOptions, RunOptions):
    """Translate lines of text: as many lines come out as went in, in their order."""

    file: tuple[str, ...] = ()
    """the text file to translate, also without --file; - or none: standard input"""
    n_best: int = 1
    """translations of each line at most; more than 1 prints each as line number, score and text, tab-separated"""
    strict: bool = False
    """leave a line with more tokens than the model can read untranslated (an empty line, exit code 2), not cut off"""
    json: bool = False
    """print one JSON object a line: source, text, hypotheses (text and score, best first), cut (tokens not read)"""
    attention: str | None = None
    """draw what the translation of the first line looked at into this PNG file"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.file) <= 1, f"one file is translated at a time, not {len(self.file)}: {', '.join(self.file)}")
        require(self.n_best >= 1, f"n-best is {self.n_best}; it must be at least 1")
        require(self.n_best <= self.beam, f"n-best is {self.n_best}, more than beam {self.beam}")


@dataclass(frozen=True)
class EvaluateOptions(ModelOptions):
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
class EvaluateTranslationOptions(SearchOptions, RunOptions):
    """Measure how well a model translates: BLEU, chrF, and how they were computed (needs the extra 'eval')."""

    source: str = ""
    """the text file to translate"""
    reference: str = ""
    """its translations, line by line"""
    tokenize: Literal["13a", "none", "char", "intl"] = "13a"
    """how sacrebleu finds words: none for text that is tokenised already"""
    json: bool = False
    """print one JSON object instead of a table"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.source and self.reference), "--source and --reference are both needed")


@dataclass(frozen=True)
class VerifyOptions(ModelOptions):
    """Check that a checkpoint computes what it should; exit code 1 if it does not."""

    reference: Literal["none", "hf"] = "none"
    """hf: compare with transformers in PyTorch too (both must be installed)"""
    json: bool = False
    """print one JSON object a check: check, measured, bound, passed"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `jaxgpt` with these arguments (default: the process's) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not debug:
        _silence_libraries()
    try:
        return _run(arguments)
    except SystemExit as end:  # --help of a verb
        return int(end.code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone, as `| head` does: nothing to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"jaxgpt: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, BAD_INPUT) else 1


def _silence_libraries() -> None:
    """Orbax prints the traceback of every thread of a failed save; the error itself reaches us, and so the user."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    threading.excepthook = lambda arguments: None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, (*BAD_INPUT, OSError, FloatingPointError)) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _run(arguments: list[str]) -> int:
    verbs: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "generate": _generate,
        "translate": _translate,
        "evaluate": _evaluate,
        "export": _export,
        "verify": _verify,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb == "--version":
        print(f"jaxgpt {__version__}")
        return 0
    if verb not in verbs:
        raise ValueError(f"there is no verb {verb}{suggestion(verb, verbs)}")
    return verbs[verb](rest)


def _train(arguments: list[str]) -> int:
    named = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    recipe = named or "default"
    if any(argument in ("-h", "--help") for argument in arguments):
        print(TRAIN_USAGE.format(recipes=recipes.describe()))
    prog = "python train.py [RECIPE]"
    chosen, out = recipes.recipe(recipe), value_of("--out", arguments)
    if named is None and out is not None and RunFolder(Path(out)).exists():
        # What is resumed may be of another task, with other settings; that it is to be resumed is said each time.
        chosen = dataclasses.replace(RunFolder(Path(out)).saved_config(), resume="never")
    config = parse(type(chosen), arguments, prog, chosen)

    # Everything below needs JAX; what is above answers without it.
    from jaxgpt import launch

    run = RunFolder(launch.run_path(config, recipe))
    if config.resume == "latest" and not run.exists():
        started = named is not None or any(flag.startswith(("--data", "--model", "--optimizer")) for flag in arguments)
        require(started, f"there is no run in {run.path} to resume; name a recipe or its data to start one")
    elif config.resume == "latest":
        description = run.describe()
        require(
            named in (None, description["recipe"]),
            f"{run.path} was trained with the recipe {description['recipe']}, not {named}",
        )
        recipe = description["recipe"]
        saved = dataclasses.replace(run.saved_config(), out=str(run.path))
        config = parse(type(saved), arguments, prog, saved)
    report = make_reporter(config.quiet)
    outcome, run = launch.train(config, recipe=recipe, report=report)
    report.say(launch.summary(outcome, run))
    return STOPPED if outcome.interrupted else 0


def _load(options: ModelOptions) -> LanguageModel:
    from jaxgpt import api
    from jaxgpt.environment import keep_freed_memory

    keep_freed_memory()
    return api.load(options.model, checkpoint=options.checkpoint, revision=options.revision, dtype=options.dtype)


def _generate(arguments: list[str]) -> int:
    options = parse(GenerateOptions, arguments, "jaxgpt generate")
    settings = GenerationConfig(**{item.name: getattr(options, item.name) for item in fields(GenerationConfig)})
    model = _load(options)
    prompts = options.prompt or (sys.stdin.read(),)
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


def _export(arguments: list[str]) -> int:
    options = parse(ExportOptions, arguments, "jaxgpt export")
    from jaxgpt import api

    api.export(_load(options), options.out)
    print(f"{options.out} holds the model; transformers loads it with AutoModelForCausalLM.from_pretrained")
    return 0


def _load_translator(options: RunOptions) -> Translator:
    from jaxgpt.apps.translator import Translator
    from jaxgpt.environment import keep_freed_memory

    keep_freed_memory()
    return Translator(options.model, checkpoint=options.checkpoint, dtype=options.dtype)


def _translate(arguments: list[str]) -> int:
    options = parse(TranslateOptions, arguments, "jaxgpt translate", positional="--file")
    from jaxgpt.apps.heatmap import draw_attention
    from jaxgpt.apps.lines import open_lines

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # as the lines that come in are, whatever the terminal's
    if options.attention is not None:
        folder = Path(options.attention).parent
        require(folder.is_dir(), f"attention is {options.attention}; there is no folder {folder}")
    lines, ready = open_lines(options.file[0] if options.file else "-")
    translator = _load_translator(options)
    settings = options.settings(options.n_best)
    results = translator.stream(lines, settings, batch_size=options.batch_size, ready=ready)
    refused = False
    for number, translated in enumerate(results, 1):
        if translated.cut:
            room, rest = translator.max_source, "it" if options.strict else "the rest of it"
            beyond = f"line {number} has {room + translated.cut} tokens, and the model can read {room}"
            print(f"jaxgpt: {beyond}; {rest} is not translated", file=sys.stderr)
        if translated.cut and options.strict:
            translated, refused = dataclasses.replace(translated, text="", hypotheses=()), True
        print(_shown(translated, number, options), flush=True)
        if number == 1 and options.attention is not None and translated.text:
            draw_attention(*translator.attention(translated.source, translated.text), options.attention)
        elif number == 1 and options.attention is not None:
            print(f"jaxgpt: line 1 has no translation to draw into {options.attention}", file=sys.stderr)
    return 2 if refused else 0


def _shown(translated: Translated, number: int, options: TranslateOptions) -> str:
    if options.json:
        return json.dumps(dataclasses.asdict(translated), ensure_ascii=False)
    if options.n_best == 1:
        return translated.text
    return (
        "\n".join(f"{number}\t{found.score:.4f}\t{found.text}" for found in translated.hypotheses) or f"{number}\t0\t"
    )


def _evaluate(arguments: list[str]) -> int:
    if any(argument.startswith(("--source", "--reference")) for argument in arguments):
        return _evaluate_translation(arguments)
    options = parse(EvaluateOptions, arguments, "jaxgpt evaluate")
    from jaxgpt import evaluate

    model = _load(options)
    result = evaluate.evaluate(
        model, options.data, text_field=options.text_field, stride=options.stride, batch_size=options.batch_size,
        per_token=options.per_token,
    )  # fmt: skip
    print(json.dumps(dataclasses.asdict(result)) if options.json else evaluate.describe(result))
    return 0


def _evaluate_translation(arguments: list[str]) -> int:
    options = parse(EvaluateTranslationOptions, arguments, "jaxgpt evaluate")
    from jaxgpt.apps import translator

    result = translator.evaluate(
        _load_translator(options), options.source, options.reference, options.settings(), tokenize=options.tokenize,
        batch_size=options.batch_size,
    )  # fmt: skip
    if options.json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        print(f"BLEU   {result.bleu:.2f}\nchrF   {result.chrf:.2f}\nexact  {result.exact_match:.4f}")
        if result.cut:
            print(f"{result.cut:,} sources have more tokens than the model can read, and were cut off")
        print(f"{result.sentences:,} sentences in {result.seconds:.1f} s, sacrebleu {result.signature}")
    return 0


def _verify(arguments: list[str]) -> int:
    options = parse(VerifyOptions, arguments, "jaxgpt verify")
    from jaxgpt import verify

    passed = True
    for check in verify.checks(_load(options), reference=options.reference):
        record = dataclasses.asdict(check) | {"passed": check.passed}
        record["measured"] = check.measured if math.isfinite(check.measured) else None  # JSON has no NaN
        print(json.dumps(record) if options.json else verify.line(check), flush=True)
        passed &= check.passed
    return 0 if passed else 1
