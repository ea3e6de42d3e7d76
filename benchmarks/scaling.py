"""Speed of a training step on several devices: `python benchmarks/scaling.py [RECIPE] [--devices 1 2 4 8] [--json]`.

On a CPU the devices are virtual and share its cores, so that more of them can be no faster: what it shows there is what
each way of running a step costs. The global batch is the same for all.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import jaxgpt  # noqa: F401  (sets XLA's flags before JAX starts)

# isort: split
import numpy as np
import train_step
from measure import Worker, in_turn, spelled

from jaxgpt.arguments import parse
from jaxgpt.config import Strategy, TrainConfig, require
from jaxgpt.environment import DEVICE_COUNT_FLAG, prepare_backend

ONE = "single x 1"


@dataclass(frozen=True)
class Options:
    """Measure a training step on several devices."""

    devices: tuple[int, ...] = (1, 2, 4, 8)
    """numbers of devices; those of a CPU are virtual"""
    strategies: tuple[Literal["pmap", "mesh"], ...] = ("pmap", "mesh")
    """ways of running on them, beside a single device"""
    batch_size: int = 16
    """global batch in sequences"""
    sequence_length: int | None = None
    """tokens of a sequence (default: the recipe's)"""
    steps: int = 10
    """steps a round"""
    rounds: int = 5
    """rounds; in each, everyone takes a turn"""
    json: bool = False
    """print one JSON object last"""

    def __post_init__(self) -> None:
        require(bool(self.devices) and min(self.devices) >= 1, f"devices is {self.devices}; each must be at least 1")
        for number in self.devices:
            require(
                self.batch_size % number == 0, f"batch-size {self.batch_size} does not divide over {number} devices"
            )


@contextlib.contextmanager
def virtual_devices(number: int) -> Iterator[None]:
    """Let processes that are started now have so many devices, if theirs are those of a CPU."""
    names = ("XLA_FLAGS", "NPROC")
    before = {name: os.environ.get(name) for name in names}
    kept = [flag for flag in (before["XLA_FLAGS"] or "").split() if not flag.startswith(DEVICE_COUNT_FLAG)]
    os.environ["XLA_FLAGS"] = " ".join([*kept, *([f"{DEVICE_COUNT_FLAG}={number}"] if number > 1 else [])])
    prepare_backend()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def measure(config: TrainConfig, options: Options) -> dict[str, Any]:
    """Tokens a second of every strategy on every number of devices, in turn."""
    size = config.model.vocab_size or 1
    shape = (options.batch_size, config.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(0, size, shape).astype(np.int32)
    settings: list[tuple[Strategy, int]] = [("single", 1), *itertools.product(options.strategies, options.devices)]
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for strategy, number in settings:
            parallel = replace(config.parallel, strategy=strategy, devices=number)
            with virtual_devices(number):
                worker = Worker(train_step.our_step, replace(config, parallel=parallel), tokens, False)
            workers[f"{strategy} x {number}"] = stack.enter_context(worker)
            worker.call()
        turns = {name: functools.partial(worker.seconds, options.steps) for name, worker in workers.items()}
        amount = config.tokens_per_step * options.steps
        results = in_turn(turns, options.rounds, "tokens_per_second", amount, ONE)
        facts = workers[ONE].facts
    for (strategy, number), row in zip(settings, results.values(), strict=True):
        row |= {"strategy": strategy, "devices": number}
    virtual = facts["environment"]["device"].endswith("cpu")
    return {"environment": facts["environment"], "virtual": virtual, "results": results}


def table(recipe: str, options: Options, result: dict[str, Any]) -> str:
    """The result for people."""
    about = result["environment"]
    lines = [
        f"machine    {about['processor']}, {about['cores']} cores; jax {about['versions']['jax']}; {about['date']}",
        f"task       a step of {recipe}, {options.batch_size} sequences in all, whatever the devices",
    ]
    if result["virtual"]:
        lines.append(f"devices    virtual: they share {about['cores']} cores, so more of them can be no faster")
    lines.append(f"{'':<11}{'tokens/s':<32}time, of the single device's")
    for name, row in result["results"].items():
        ratio = spelled(row["ratio"], digits=2) if "ratio" in row else ""
        lines.append(f"{name:<11}{spelled(row['tokens_per_second'], digits=0):<32}{ratio}".rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    rest = list(arguments)
    recipe = rest.pop(0) if rest and not rest[0].startswith("-") else "shakespeare-char-cpu"
    try:
        options = parse(Options, rest, "scaling.py [RECIPE]")
        shape = train_step.Options(batch_size=options.batch_size, sequence_length=options.sequence_length)
        config = train_step.configure(recipe, shape)
        result = measure(config, options)
    except ValueError as error:
        print(f"scaling.py: {error}", file=sys.stderr)
        return 2
    result = {"benchmark": "scaling", "recipe": recipe, "options": asdict(options)} | result
    print(table(recipe, options, result))
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
