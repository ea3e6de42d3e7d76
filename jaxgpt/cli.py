"""The command line: `jaxgpt VERB ...`. Parses, calls the API, turns errors into one line and an exit code.

Exit codes: 0 done, 1 the run failed, 2 bad input, 75 stopped by a signal and saved (start it again with --resume),
130 interrupted at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_origin, get_type_hints

from jaxgpt import recipes
from jaxgpt.config import SamplingConfig, TrainConfig, from_dict, require, suggestion
from jaxgpt.training.report import make_reporter

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
BAD_INPUT = (ValueError, FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)

USAGE = """usage: jaxgpt VERB ...

  train [RECIPE] [--section.key value ...]   train a model (the same as python train.py)
  generate --model RUN --prompt TEXT         let a model write

jaxgpt VERB --help says more. --debug, with any verb, shows the traceback of an error.
"""

TRAIN_USAGE = """usage: python train.py [RECIPE] [--section.key value ...]   (or: jaxgpt train ...)

Without a recipe, `default`. Every setting below can be given as --name value or --name=value.

recipes:
{recipes}
"""


@dataclass(frozen=True)
class GenerateOptions:
    """Let a model write."""

    model: str
    """a run folder"""
    prompt: tuple[str, ...] = ()
    """what to continue, one or several (default: standard input)"""
    max_new_tokens: int | None = None
    """how many tokens to make at most (default: 256, or what the model's context has room for)"""
    temperature: float = SamplingConfig.temperature
    """divides the logits; 0 takes the most likely token"""
    top_k: int | None = None
    """sample among the k most likely tokens only"""
    seed: int = 0
    """the same seed gives the same text"""
    truncate: Literal["never", "left"] = "never"
    """left: where prompt and text outgrow the context, drop the oldest tokens instead of refusing"""
    checkpoint: Literal["best", "last"] = "best"
    """the checkpoint with the lowest held-out loss, or the newest"""
    json: bool = False
    """print one JSON object a prompt: prompt, text, tokens (the new ids), finish_reason"""

    def __post_init__(self) -> None:
        limit = self.max_new_tokens
        require(limit is None or limit >= 1, f"max-new-tokens is {limit}; it must be at least 1")


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
    verbs: dict[str, Callable[[list[str]], int]] = {"train": _train, "generate": _generate}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb not in verbs:
        raise ValueError(f"there is no verb {verb}{suggestion(verb, verbs)}")
    return verbs[verb](rest)


def _train(arguments: list[str]) -> int:
    named = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    recipe = named or "default"
    if any(argument in ("-h", "--help") for argument in arguments):
        print(TRAIN_USAGE.format(recipes=recipes.describe()))
    prog = "python train.py [RECIPE]"
    config = parse(TrainConfig, arguments, prog, recipes.recipe(recipe))

    # Everything below needs JAX; what is above answers without it.
    from jaxgpt import api
    from jaxgpt.storage.runs import RunFolder

    run = RunFolder(api.run_path(config, recipe))
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
        saved = dataclasses.replace(from_dict(TrainConfig, description["config"]), out=str(run.path))
        config = parse(TrainConfig, arguments, prog, saved)
    report = make_reporter(config.quiet)
    outcome, run = api.train(config, recipe=recipe, report=report)
    report.say(api.summary(outcome, run))
    return STOPPED if outcome.interrupted else 0


def _generate(arguments: list[str]) -> int:
    options = parse(GenerateOptions, arguments, "jaxgpt generate")
    sampling = SamplingConfig(options.temperature, options.top_k, options.seed)
    from jaxgpt import api

    model = api.load(options.model, checkpoint=options.checkpoint)
    prompts = options.prompt or (sys.stdin.read(),)
    for number, prompt in enumerate(prompts):
        if options.json:
            generated = model.generate(prompt, options.max_new_tokens, sampling, options.truncate)
            print(json.dumps(dataclasses.asdict(generated)), flush=True)
            continue
        if number:
            print("---")
        pieces = model.stream(prompt, options.max_new_tokens, sampling, options.truncate)
        for index, piece in enumerate(pieces):
            print(prompt + piece if index == 0 else piece, end="", flush=True)
        print()
    return 0


T = TypeVar("T")


def parse(kind: type[T], arguments: list[str], prog: str, default: T | None = None) -> T:
    """Turn flags into a dataclass. A bare `--quiet` means `--quiet True`, a bare `--resume` means `--resume latest`.

    Of a flag given twice the last counts; one that takes several values gets them all.

    Raises:
        ValueError: an unknown flag (the nearest is named) or a value that does not fit, in one sentence.
        SystemExit: `--help` was asked for and printed.
    """
    import tyro

    settings = _settings(kind)
    given: dict[str, list[str]] = {}
    for flag, values in _grouped(arguments):
        if flag not in (*settings, "--help"):
            raise ValueError(f"there is no setting {flag}{suggestion(flag, settings)}")
        if get_origin(settings.get(flag)) is tuple:
            require(bool(values), f"{flag} needs a value")
            given.setdefault(flag, []).extend(values)
        elif settings.get(flag) is bool:
            given[flag] = [value.capitalize() for value in values] or ["True"]
        else:
            given[flag] = values or (["latest"] if flag == "--resume" else [])
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            options: dict[str, Any] = {} if default is None else {"default": default}
            spelled = [word for flag, values in given.items() for word in (flag, *values)]
            return tyro.cli(kind, prog=prog, args=spelled, config=(tyro.conf.FlagConversionOff,), **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(_first_sentence(errors.getvalue())) from None


def _grouped(arguments: list[str]) -> list[tuple[str, list[str]]]:
    """Each flag with the values after it, in either spelling: `--name value ...` or `--name=value`."""
    groups: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument == "-h":
            groups.append(("--help", []))
        elif argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            groups.append((flag, [value] if equals else []))
        elif groups:
            groups[-1][1].append(argument)
        else:
            raise ValueError(f"{argument} stands where a setting (--name value) should")
    return groups


def _settings(kind: type, prefix: str = "--") -> dict[str, Any]:
    """The flags of a dataclass, those of the dataclasses in it included, and the type of each."""
    flags: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        flag = prefix + name.replace("_", "-")
        nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        flags |= _settings(hint, flag + ".") if nested else {flag: hint}
    return flags


def _first_sentence(box: str) -> str:
    """The message of a tyro error, out of the box that is drawn around it."""
    # Where the terminal has no such characters, tyro draws spaces and hyphens, and the title is a line of its own.
    drawn = "│" in box
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    rules = [number for number, line in enumerate(lines) if re.fullmatch("[─-]+", line)] + [len(lines)] * 2
    message = lines[: rules[0]] if drawn else lines[rules[0] + 1 : rules[1]]
    text = re.sub(r"^Error parsing \w+(\.\w+)*: ", "", " ".join(message))  # a dataclass has refused: its words suffice
    text = re.sub(r"invalid literal for int\(\) with base 10: ", "a whole number is needed, not ", text)
    text = re.sub(r"could not convert string to float: ", "a number is needed, not ", text)
    return text.removeprefix("Error parsing ") or "the arguments could not be read"
