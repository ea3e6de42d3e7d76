"""Whole runs of `python train.py`, beside the same in PyTorch: `python benchmarks/compare.py WHAT --data TEXT`.

WHAT is `runs` (steps a second of a training loop, data and log included), `quality` (seconds to a held-out loss, beside
nanoGPT's recipe for a CPU) or `start` (seconds from the command to the end of step 1, with and without what an earlier
run left in the cache).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jaxgpt  # noqa: F401  (sets XLA's flags before JAX starts)

# isort: split
from measure import Worker, environment, in_turn, spelled, spread
from peers import require_torch
from torch_loop import torch_run, write_splits

from jaxgpt import recipes
from jaxgpt.arguments import parse
from jaxgpt.config import TrainConfig, require, suggestion

ROOT = Path(__file__).parents[1]
PEERS_RECIPE = "shakespeare-char-cpu"
LARGE = "--data.tokenizer byte --data.batch-size 1 --data.sequence-length 64 --parallel.gradient-accumulation 1"
SHAPES = {"tiny": PEERS_RECIPE, "124M": f"gpt2 {LARGE} --model.compute-dtype float32"}


@dataclass(frozen=True)
class Options:
    """Measure whole runs."""

    data: str
    """a text to train on, the last tenth of it held out"""
    vs: tuple[Literal["torch", "plain"], ...] = ()
    """measure PyTorch in the same run: GPT-2 of transformers (torch), one written plainly for speed (plain), or both"""
    steps: int = 500
    """runs: steps of a run"""
    rounds: int = 3
    """runs and start: runs of each, in turn"""
    recipe: str = "shakespeare-fast"
    """quality: ours"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """quality: a run for each"""
    peer_steps: int = 2000
    """quality: steps of nanoGPT's recipe"""
    peer_seeds: tuple[int, ...] = (1,)
    """quality: a run of each peer for each"""
    shape: Literal["tiny", "124M"] = "tiny"
    """start: of the model; 124M with 1 x 64 tokens a step"""
    json: bool = False
    """print one JSON object last"""

    def __post_init__(self) -> None:
        for name in ("rounds", "peer_steps"):
            value, option = getattr(self, name), name.replace("_", "-")
            require(value >= 1, f"{option} is {value}; it must be at least 1")
        require(self.steps >= 2, f"steps is {self.steps}; it must be at least 2")
        require(bool(self.seeds) and bool(self.peer_seeds), "seeds is empty; it must be one number or several")
        require(Path(self.data).is_file(), f"there is no file {self.data}")


def run_train(arguments: str, folder: Path, cache: Path) -> list[dict[str, Any]]:
    """Run `python train.py ARGUMENTS` to its end; return its metrics.

    Raises:
        ValueError: it failed; with what it said.
    """
    done = subprocess.run(_command(arguments, folder), env=_environment(cache), capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"train.py {arguments} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return _metrics(folder)


def _command(arguments: str, folder: Path) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *arguments.split(), "--sample-tokens", "0", "--out", str(folder)]


def _environment(cache: Path) -> dict[str, str]:
    return os.environ | {"JAXGPT_CACHE": str(cache), "PYTHONPATH": str(ROOT)}


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """What is in metrics.jsonl by now, whole lines."""
    path = folder / "metrics.jsonl"
    text = path.read_text("utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _seconds_at(metrics: Sequence[dict[str, Any]], step: int) -> float:
    """When a step had ended, in seconds of the run: from the loop's beginning, imports and data being there."""
    return next(record["seconds"] for record in metrics if record["step"] == step and "train/loss" in record)


@contextlib.contextmanager
def peers(options: Options, folder: Path) -> Iterator[tuple[dict[str, Worker], TrainConfig]]:
    """The peers, each in its process with the data ready, and the config that they have: nanoGPT's."""
    size = write_splits(Path(options.data), folder)
    config = recipes.recipe(PEERS_RECIPE)
    assert isinstance(config, TrainConfig)
    config = replace(config, model=replace(config.model, vocab_size=size))
    if options.vs:
        require_torch(config.model)
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(Worker(torch_run, name, config, folder)) for name in options.vs}, config


def measure_runs(options: Options, folder: Path) -> dict[str, Any]:
    """Steps a second from the end of the first step to that of the last, of whole runs in turn."""
    arguments = f"{PEERS_RECIPE} --data.path {options.data} --steps {options.steps} --eval-interval 1000000"
    number = iter(range(options.rounds + 1))

    def ours() -> float:
        metrics = run_train(arguments, folder / f"run{next(number)}", folder / "cache")
        return _seconds_at(metrics, options.steps) - _seconds_at(metrics, 1)

    ours()  # compiles and tokenises
    with peers(options, folder) as (workers, _):
        turns = {"ours": ours}
        for name, worker in workers.items():
            turns[name] = functools.partial(_peer_seconds, worker, options.steps)
        return {"results": in_turn(turns, options.rounds, "steps_per_second", options.steps - 1)}


def _peer_seconds(worker: Worker, steps: int) -> float:
    return worker.call(steps, None, 0)["seconds_after_first"]


def measure_quality(options: Options, folder: Path) -> dict[str, Any]:
    """Seconds of our recipe's whole training, compilation included, and of the peers'; and the losses they end with."""
    config = recipes.recipe(options.recipe)
    ours = []
    for seed in options.seeds:
        arguments = f"{options.recipe} --data.path {options.data} --seed {seed}"
        metrics = run_train(arguments, folder / f"seed{seed}", folder / f"cache{seed}")
        last = next(record for record in metrics if record["step"] == config.steps and "eval/loss" in record)
        ours.append({"seed": seed, "seconds": _seconds_at(metrics, config.steps), "held_out": last["eval/loss"]})
    found: dict[str, list[dict[str, Any]]] = {"ours": ours}
    with peers(options, folder) as (workers, peers_config):
        for name, worker in workers.items():
            steps, interval = options.peer_steps, peers_config.eval_interval
            found[name] = [{"seed": seed} | worker.call(steps, interval, seed) for seed in options.peer_seeds]
    results: dict[str, Any] = {}
    for name, runs in found.items():
        results[name] = {key: statistics.mean(run[key] for run in runs) for key in ("seconds", "held_out")}
        results[name] |= {"runs": runs}
        if name != "ours":
            results[name]["share"] = results["ours"]["seconds"] / results[name]["seconds"]
    return {"steps": {"ours": config.steps, "peers": options.peer_steps}, "results": results}


def measure_start(options: Options, folder: Path) -> dict[str, Any]:
    """Seconds from the command to the end of step 1, first with an empty cache, then with what that run left."""
    arguments = f"{SHAPES[options.shape]} --data.path {options.data} --steps 1"
    found: dict[str, list[float]] = {"cold": [], "warm": []}
    for number in range(options.rounds):
        for state, seconds in found.items():
            run = folder / f"{state}{number}"
            seconds.append(_seconds_to_step_1(_command(arguments, run), run, _environment(folder / f"cache{number}")))
    return {"results": {state: {"seconds": spread(seconds)} for state, seconds in found.items()}}


def _seconds_to_step_1(command: list[str], run: Path, variables: dict[str, str]) -> float:
    start = time.perf_counter()
    process = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not any("train/loss" in record for record in _metrics(run)):
        if process.poll() is not None:
            raise ValueError(f"{' '.join(command)} failed: {process.communicate()[1].strip()}")
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    process.communicate()  # what follows step 1 is not in the figure, but must not disturb the next
    return seconds


MEASURE = {"runs": measure_runs, "quality": measure_quality, "start": measure_start}


def table(what: str, options: Options, result: dict[str, Any]) -> str:
    """The result for people."""
    about = result["environment"]
    lines = [
        ("machine", f"{about['processor']}, {about['cores']} cores; jax {about['versions']['jax']}; {about['date']}")
    ]
    if what == "runs":
        lines.append(
            ("task", f"{options.steps} steps of {PEERS_RECIPE}, whole runs, from the end of the first step on")
        )
    elif what == "quality":
        lines.append(
            ("task", f"{options.recipe} ({result['steps']['ours']} steps) beside {options.peer_steps} of nanoGPT's")
        )
    else:
        lines.append(("task", f"from the command to the end of step 1: train.py {SHAPES[options.shape]}"))
    for name, row in result["results"].items():
        if what == "runs":
            ratio = f"   ratio {spelled(row['ratio'], digits=2)}, ours over theirs" if "ratio" in row else ""
            lines.append((name, f"{spelled(row['steps_per_second'], digits=2)} steps/s{ratio}"))
        elif what == "quality":
            share = f"   our time is {row['share']:.3f} of it" if "share" in row else ""
            loss = f"held-out loss {row['held_out']:.4f} nats a character"
            lines.append((name, f"{row['seconds']:.1f} s, {loss}, mean of {len(row['runs'])} seeds{share}"))
        else:
            lines.append((name, f"{spelled(row['seconds'], digits=2)} s"))
    return "\n".join(f"{name:<9}{value}" for name, value in lines)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    what, *rest = list(arguments) or [""]
    try:
        known = what in (*MEASURE, "-h", "--help")
        require(known, f"WHAT is {what or 'missing'}; it must be {', '.join(MEASURE)}{suggestion(what, MEASURE)}")
        options = parse(Options, rest if what in MEASURE else [what], f"compare.py {'|'.join(MEASURE)}")
        with tempfile.TemporaryDirectory() as folder:
            result = MEASURE[what](replace(options, data=os.path.abspath(options.data)), Path(folder))
    except ValueError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    result = {"benchmark": f"compare {what}", "options": asdict(options)} | result | {"environment": environment()}
    print(table(what, options, result))
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
