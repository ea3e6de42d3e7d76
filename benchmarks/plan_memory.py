"""Is what `jaxgpt plan` predicts what a run takes: `python benchmarks/plan_memory.py [--recipes NAME ...] [--json]`.

Each recipe's step is planned for one device of this machine (as by `--topology local`: by the compiler, and by formula)
and then runs, both in processes of their own; of the second the peak memory is measured. Freed memory is not kept
there, as `train.py` does: what is kept depends on how it was broken up, and is up to as much again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jaxgpt  # noqa: F401  (sets XLA's flags before JAX starts)

# isort: split
import numpy as np
import train_step
from measure import Worker

from jaxgpt import plan as planning
from jaxgpt.arguments import parse
from jaxgpt.config import TrainConfig, require


@dataclass(frozen=True)
class Options:
    """Compare planned and measured memory."""

    recipes: tuple[str, ...] = ("default", "shakespeare-char")
    """whose step, one or several"""
    batch_size: int = 16
    """sequences a step"""
    json: bool = False
    """print one JSON object last"""

    def __post_init__(self) -> None:
        require(bool(self.recipes), "recipes is empty; name one or several")
        require(self.batch_size >= 1, f"batch-size is {self.batch_size}; it must be at least 1")


def compare(config: TrainConfig) -> dict[str, Any]:
    """Bytes of one recipe's step, planned and measured.

    Raises:
        ValueError: this system does not say how much memory a process takes.
    """
    with Worker(planned, config) as worker:
        compiled, by_formula = worker.call()
    tokens = np.zeros((config.data.batch_size, config.sequence_length + 1), np.int32)
    one = replace(config, parallel=replace(config.parallel, strategy="single", devices=1))
    with Worker(step, one, tokens) as worker:
        worker.call()
        measured, probe = train_step.measured_memory(worker)
        facts = worker.facts
    if measured is None:
        raise ValueError("this system does not say how much memory a process takes")
    result = {"planned": compiled, "by_formula": by_formula, "measured": measured, "probe": probe}
    result |= {name: facts[name] for name in ("environment", "parameters", "state_bytes")}
    return result | {"error": compiled / measured - 1, "error_by_formula": by_formula / measured - 1}


def step(config: TrainConfig, tokens: np.ndarray) -> tuple[Callable[[], Any], dict[str, Any]]:
    """A function that runs one step of the program itself, and what is known before it runs."""
    return train_step.our_steps(config, tokens, share=False, keep=False)[:2]


def planned(config: TrainConfig) -> tuple[Callable[[], tuple[float, float]], dict[str, Any]]:
    """A function that plans a step on one device of this machine: bytes, compiled and by formula."""

    def call() -> tuple[float, float]:
        result, _ = planning.plan(config, "local", {"data": 1})
        return result.bytes, planning.estimate(result.setting, None).bytes

    return call, {}


def table(results: dict[str, dict[str, Any]]) -> str:
    """The result for people."""
    first = next(iter(results.values()))
    about = first["environment"]
    lines = [
        f"machine  {about['processor']}, {about['cores']} cores; jax {about['versions']['jax']}; {about['date']}",
        f"probe    {first['probe']}",
        f"{'MiB':<22}{'measured':>10}{'planned':>10}{'error':>9}{'by formula':>12}{'error':>9}",
    ]
    for name, row in results.items():
        sizes = [row[key] / 2**20 for key in ("measured", "planned", "by_formula")]
        lines.append(
            f"{name:<22}{sizes[0]:>10,.1f}{sizes[1]:>10,.1f}{row['error']:>9.1%}"
            f"{sizes[2]:>12,.1f}{row['error_by_formula']:>9.1%}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run the comparison; return the exit code."""
    try:
        options = parse(Options, list(arguments), "plan_memory.py")
        shape = train_step.Options(batch_size=options.batch_size)
        results = {name: compare(train_step.configure(name, shape)) for name in options.recipes}
    except ValueError as error:
        print(f"plan_memory.py: {error}", file=sys.stderr)
        return 2
    print(table(results))
    if options.json:
        print(json.dumps({"benchmark": "plan_memory", "options": asdict(options), "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
