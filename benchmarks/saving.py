"""What a checkpoint costs a run: `python benchmarks/saving.py [RECIPE] [--batch-size N] [--sequence-length T]`.

The step is the program's own, from the recipe's config; the data is random token ids. A save is what the loop waits for
(checksums, and the start of Orbax's save) and by how much the steps are slower until it is committed.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import train_step
from measure import environment, seconds_of, spread

# isort: split
import numpy as np

from jaxgpt import recipes
from jaxgpt.arguments import parse
from jaxgpt.config import require
from jaxgpt.environment import keep_freed_memory
from jaxgpt.storage.checkpoint import Checkpoints


@dataclass(frozen=True)
class Options:
    """Measure what saving a recipe's state costs."""

    batch_size: int | None = None
    """global batch in sequences (default: the recipe's)"""
    sequence_length: int | None = None
    """tokens of a sequence (default: the recipe's)"""
    steps: int = 3
    """steps between saves that are timed, to compare with"""
    saves: int = 3
    """saves, of which the first is not counted: it makes the folder"""
    interval: int = 100
    """steps between saves of the run whose share is told"""
    json: bool = False
    """print one JSON object last"""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("saves", 2), ("interval", 1)):
            require(getattr(self, name) >= least, f"{name} is {getattr(self, name)}; it must be at least {least}")


def measure(recipe: str, options: Options, folder: Path) -> dict[str, Any]:
    """Steps without and with a save under way, and the wait for its start, in turn."""
    step_options = train_step.Options(batch_size=options.batch_size, sequence_length=options.sequence_length)
    config = train_step.configure(recipe, step_options)
    shape = (config.data.batch_size, config.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size or 0, shape).astype(np.int32)
    step, facts, state = train_step.our_steps(config, tokens, share=False)
    step()
    checkpoints = Checkpoints(folder)
    alone, waits, slower, sizes = [], [], [], []
    for number in range(options.saves):
        plain = [seconds_of(step) for _ in range(options.steps)]

        def save(number: int = number) -> None:
            trees = {"parameters": state().parameters, "optimizer": state().optimizer_state}
            checkpoints.save(number, trees, metrics=None, extra={})

        wait, beside = seconds_of(save), []
        while not (folder / str(number)).exists():
            beside.append(seconds_of(step))
        checkpoints.wait()
        if number:
            alone += plain
            waits.append(wait)
            slower.append(sum(beside) - len(beside) * statistics.median(plain))
            sizes.append(sum(path.stat().st_size for path in (folder / str(number)).rglob("*") if path.is_file()))
    checkpoints.close()
    cost = statistics.median([wait + more for wait, more in zip(waits, slower, strict=True)])
    return {
        "benchmark": "saving",
        "recipe": recipe,
        "state_bytes": facts["state_bytes"],
        "checkpoint_bytes": max(sizes),
        "seconds_per_step": spread(alone),
        "seconds_waited": spread(waits),
        "seconds_slower": spread(slower),
        "share": cost / (options.interval * statistics.median(alone)),
        "environment": environment(),
    }


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    rest = list(arguments)
    recipe = rest.pop(0) if rest and not rest[0].startswith("-") else "shakespeare-char-cpu"
    try:
        options = parse(Options, rest, "saving.py [RECIPE]")
        keep_freed_memory(recipes.recipe(recipe).model.width)
        with tempfile.TemporaryDirectory() as folder:
            result = measure(recipe, options, Path(folder) / "checkpoints")
    except ValueError as error:
        print(f"saving.py: {error}", file=sys.stderr)
        return 2
    for name in ("seconds_per_step", "seconds_waited", "seconds_slower"):
        figures = result[name]
        print(f"{name:<18}{figures['median']:.3f} ({figures['min']:.3f} to {figures['max']:.3f})")
    print(f"{'state':<18}{result['state_bytes'] / 1e6:,.0f} MB, {result['checkpoint_bytes'] / 1e6:,.0f} MB on disk")
    print(f"{'share of the time':<18}{result['share']:.2%} at an interval of {options.interval} steps")
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
