"""The verbs train, and inspect, which shows what it would be trained on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from jaxgpt import recipes
from jaxgpt.arguments import flags_in, parse, value_of
from jaxgpt.config import OWN_OF_A_RUN, FinetuneConfig, GPTRunConfig, RunConfig, TrainConfig, require
from jaxgpt.data.batches import WHOLE
from jaxgpt.storage.runs import RunFolder
from jaxgpt.training.report import make_reporter

PROG = "python train.py [RECIPE]"
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again

TRAIN_USAGE = """usage: python train.py [RECIPE] [--section.key value ...]   (or: jaxgpt train ...)

Without a recipe, `default`. Every setting below can be given as --name value or --name=value.

recipes:
{recipes}
"""


INSPECT_USAGE = """usage: jaxgpt inspect RECIPE|RUN [--batch N] [--rows N] [--section.key value ...]

Print a training batch as text: what the model reads, below each token the one it is to learn next (_ where that does
not count), which documents share a row, labels, and what was left out or cut. --batch counts steps from 0; --rows is
how many rows are shown (4 unless given); the other settings are those of python train.py RECIPE --help.
"""


@dataclass(frozen=True)
class InspectOptions:
    """Which batch."""

    batch: int = 0
    """the step it is for, from 0"""
    rows: int = 4
    """rows that are shown"""

    def __post_init__(self) -> None:
        require(self.batch >= 0, f"batch is {self.batch}; it must be at least 0")
        require(self.rows >= 1, f"rows is {self.rows}; it must be at least 1")


def train(arguments: list[str]) -> int:
    named = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    recipe = named or "default"
    if any(argument in ("-h", "--help") for argument in arguments):
        print(TRAIN_USAGE.format(recipes=recipes.describe()))
    out = value_of("--out", arguments)
    existing = out is not None and RunFolder(Path(out)).exists()
    if named == "finetune" and not existing and value_of("--init-from", arguments) is None:
        named = recipe = "finetune-from-scratch"
    chosen = recipes.recipe(recipe)
    if named is None and out is not None and existing:
        # What is resumed may be of another task, with other settings; that it is to be resumed is said each time.
        chosen = dataclasses.replace(RunFolder(Path(out)).saved_config(), resume="never")
    config = _parsed(arguments, PROG, chosen)

    # Everything below needs JAX; what is above answers without it.
    from jaxgpt import launch
    from jaxgpt.hosts import joined

    with joined(config.distributed, config.hosts) as hosts:
        config, recipe = hosts.together(
            lambda: _resolved(config, launch.run_path(config, recipe), recipe, arguments, named)
        )
        report = make_reporter(config.quiet or not hosts.first)
        outcome, run = launch.train(config, recipe=recipe, report=report, hosts=hosts)
        report.say(launch.summary(outcome, run))
    return STOPPED if outcome.interrupted else 0


def _resolved(
    config: RunConfig, path: Path, recipe: str, arguments: list[str], named: str | None
) -> tuple[RunConfig, str]:
    """Config and recipe of a run; of one that is resumed its own, with what the arguments change."""
    if config.resume == "never":
        return config, recipe
    run = RunFolder(path)
    if not run.exists():
        started = named is not None or any(flag.startswith(("--data", "--model", "--optimizer")) for flag in arguments)
        require(started, f"there is no run in {run.path} to resume; name a recipe or its data to start one")
        return config, recipe
    description = run.describe()
    require(
        named in (None, description["recipe"]),
        f"{run.path} was trained with the recipe {description['recipe']}, not {named}",
    )
    saved = dataclasses.replace(run.saved_config(), out=str(run.path))
    return _parsed(arguments, PROG, saved), description["recipe"]


def _parsed(arguments: list[str], prog: str, default: RunConfig) -> RunConfig:
    """A config with its flags. Of a prepared folder that they name, tokenizer and split are what they are there."""
    from jaxgpt.data.shards import adopted

    path = value_of("--data.path", arguments)
    if path is not None and isinstance(default, TrainConfig):
        settled = adopted(dataclasses.replace(default.data, path=(path,)))
        default = dataclasses.replace(default, data=dataclasses.replace(settled, path=default.data.path))
    config = parse(type(default), arguments, prog, counted(default, arguments))
    if isinstance(config, GPTRunConfig) and config.init_from is not None:
        _leave_to_the_base(arguments)
    return config


def _leave_to_the_base(arguments: list[str]) -> None:
    """Raise `ValueError` for a setting of the model that is the base's to decide, and would change nothing."""
    own = {f"--model.{name.replace('_', '-')}" for name in OWN_OF_A_RUN}
    for flag in flags_in(arguments):
        left = flag in own or not flag.startswith("--model.")
        require(left, f"{flag} is given, and the base, the model of --init-from, decides that; leave it out")


def counted(config: RunConfig, arguments: list[str]) -> RunConfig:
    """The defaults where steps are given to a task that counts epochs: then those count, and not the epochs."""
    for flag, instead in (("--steps", "--epochs"), ("--eval-interval", "--evaluations")):
        given, other, name = value_of(flag, arguments), value_of(instead, arguments), instead.removeprefix("--")
        if given is not None and hasattr(config, name):
            require(other in (None, "None"), f"{flag} {given} and {instead} {other} are both given; one is enough")
            config = dataclasses.replace(config, **{name: None})  # type: ignore[arg-type]
    return config


def inspect(arguments: list[str]) -> int:
    """`jaxgpt inspect`."""
    if not arguments or arguments[0].startswith("-"):
        print(INSPECT_USAGE, end="")
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    name, *rest = arguments
    options = parse(InspectOptions, [*taken("--batch", rest), *taken("--rows", rest)], "jaxgpt inspect")
    folder = RunFolder(Path(name))
    config = folder.saved_config() if folder.exists() else recipes.recipe(name)
    config = _parsed(rest, "jaxgpt inspect RECIPE|RUN", config)

    from jaxgpt import launch
    from jaxgpt.apps.inspection import describe_batch
    from jaxgpt.data.special_tokens import SPECIAL_TOKENS, SPECIALS

    prepared = launch.PREPARE[type(config)](config, print)
    batch = dict(next(iter(prepared.task.batches(options.batch, options.batch + 1, WHOLE))))
    labels: tuple[str, ...] = ()
    special: dict[int, str] = {}
    if isinstance(prepared.config, FinetuneConfig):
        labels, size = prepared.config.labels, prepared.config.model.vocab_size or 0
        if not prepared.config.lm_weight:
            batch["lm_weights"] = batch["lm_weights"] * 0  # what is in the batch, but not in the loss
        special = dict(zip(range(size - SPECIALS, size), SPECIAL_TOKENS, strict=True))
    for line in describe_batch(
        batch, lambda token: special.get(token) or prepared.tokenizer.name(token), labels, options.rows
    ):
        print(line)
    return 0


def taken(flag: str, arguments: list[str]) -> list[str]:
    """Take a flag, with its value if one follows, out of the arguments."""
    for number, argument in enumerate(arguments):
        if argument == flag or argument.startswith(flag + "="):
            valued = argument == flag and not "".join(arguments[number + 1 : number + 2]).startswith("--")
            taken = arguments[number : number + 1 + valued]
            del arguments[number : number + len(taken)]
            return taken
    return []
