"""Speed and memory of one training step: `python benchmarks/train_step.py [RECIPE] [--vs torch plain] [--json]`.

The step is the program's own, from the recipe's config; the data is random token ids. Everyone runs in a process of
its own, has the same weights, and takes a turn in each round.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import jaxgpt  # noqa: F401  (sets XLA's flags before JAX starts)

# isort: split
import jax
import numpy as np
from measure import MEMORY_PROBE, Worker, environment, in_turn, measured_peak_flops, seconds_of, spelled
from parts import measure_parts
from parts import table as table_of_parts
from peers import require_torch, torch_train_step

from jaxgpt import recipes
from jaxgpt.arguments import parse
from jaxgpt.config import Dtype, Strategy, TrainConfig, require
from jaxgpt.environment import keep_freed_memory
from jaxgpt.models.gpt import init_parameters
from jaxgpt.storage.leaves import by_path
from jaxgpt.storage.weights import export_tensors
from jaxgpt.tasks.lm import loss
from jaxgpt.training.metrics import chip_peak_flops, count_parameters, training_flops_per_token
from jaxgpt.training.optimizer import make_optimizer
from jaxgpt.training.parallel import choose_layout
from jaxgpt.training.step import TrainState, train_step

CLOSE = 1e-4  # relative: first losses further apart are those of different models
FORMULA = "(6 N + 12 L T D) x tokens/s / peak; N: parameters of blocks and head"


@dataclass(frozen=True)
class Options:
    """Measure one training step of a recipe."""

    strategy: Strategy = "auto"
    """how it is spread over devices"""
    batch_size: int | None = None
    """global batch in sequences (default: the recipe's)"""
    sequence_length: int | None = None
    """tokens of a sequence (default: the recipe's)"""
    compute_dtype: Dtype | None = None
    """what the layers compute in (default: the recipe's; float32 beside torch)"""
    gradient_accumulation: int | None = None
    """micro-batches a device computes one after another (default: the recipe's; 1 where the batch is given)"""
    steps: int = 20
    """steps a round"""
    rounds: int = 5
    """rounds; beside a peer they alternate with its own"""
    vs: tuple[Literal["torch", "plain"], ...] = ()
    """measure PyTorch in the same run: GPT-2 of transformers (torch), one written plainly for speed (plain), or both"""
    compile: bool = False
    """the peers through torch.compile"""
    parts: bool = False
    """the step's parts as well, each timed alone beside what the machine allows (one device)"""
    json: bool = False
    """print one JSON object last"""

    def __post_init__(self) -> None:
        for name in ("steps", "rounds"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        require(bool(self.vs) or not self.compile, "compile is of the peers; it needs --vs")


def configure(recipe: str, options: Options) -> TrainConfig:
    """The recipe with the options applied; a vocabulary that the model leaves open has the tokenizer's size."""
    config = recipes.recipe(recipe)
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{recipe} trains no GPT; benchmarks/translate.py measures translation")
    data, model, parallel = config.data, config.model, replace(config.parallel, strategy=options.strategy)
    if options.batch_size is not None:
        data, parallel = replace(data, batch_size=options.batch_size), replace(parallel, gradient_accumulation=1)
    if options.gradient_accumulation is not None:
        parallel = replace(parallel, gradient_accumulation=options.gradient_accumulation)
    data = replace(data, sequence_length=options.sequence_length or data.sequence_length)
    dtype: Dtype = options.compute_dtype or ("float32" if options.vs else model.compute_dtype)
    by_kind = {"character": 66, "byte": 257}  # tinyshakespeare's characters and end-of-text; bytes and end-of-text
    vocab_size = model.vocab_size or by_kind.get(data.tokenizer, data.vocab_size)
    model = replace(model, compute_dtype=dtype, vocab_size=vocab_size)
    if options.vs:
        require_torch(model)
    return replace(config, model=model, data=data, parallel=parallel)


def our_step(
    config: TrainConfig, tokens: np.ndarray, share: bool
) -> tuple[Callable[[], dict[str, Any]], dict[str, Any]]:
    """A function that runs one step of the program itself, and what is known before it runs.

    Args:
        tokens: (B, T + 1) token ids; the model predicts each from those before it.
        share: with the initial weights, as GPT-2's files name them, for the peers.
    """
    return our_steps(config, tokens, share)[:2]


def our_steps(
    config: TrainConfig, tokens: np.ndarray, share: bool, keep: bool = True
) -> tuple[Callable[[], dict[str, Any]], dict[str, Any], Callable[[], TrainState]]:
    """As `our_step`, and a function for the state that the steps have come to; `keep`: freed memory, as `train.py`."""
    if keep:
        keep_freed_memory(config.model.width)
    layout = choose_layout(config.parallel, config.data.batch_size)
    optimizer = make_optimizer(config.optimizer, config.steps)
    step = functools.partial(
        train_step,
        loss=functools.partial(loss, config.model, config.adapt),
        optimizer=optimizer,
        seed=config.seed,
        micro_batches=config.parallel.gradient_accumulation,
    )

    def initial_state() -> TrainState:
        parameters = init_parameters(config.model, jax.random.key(0))
        return TrainState(jax.numpy.zeros((), jax.numpy.int32), parameters, optimizer.init(parameters))

    state = layout.initial(jax.jit(initial_state))
    rows = len(tokens)
    batch = layout.place(
        {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "weights": np.ones((rows, tokens.shape[1] - 1), np.float32),
            "row": np.arange(rows, dtype=np.int32),
        }
    )
    program: Any = layout.compile(step, scalars=1, donate=True)
    position, device = np.float32(config.optimizer.warmup_steps), layout.devices[0]
    peak = chip_peak_flops(device) or measured_peak_flops()
    facts = {
        "environment": environment(),
        "strategy": layout.strategy,
        "devices": len(layout.devices),
        "parameters": count_parameters(state.parameters),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        "tensors": export_tensors(config.model, by_path(state.parameters)) if share else None,
        "peak_flops": peak if device.platform == "cpu" else peak * len(layout.devices),  # virtual ones share the cores
        # Ahead of time, and not by way of the cache on disk, so that it is compilation that is measured.
        "compile_seconds": seconds_of(lambda: program.lower(state, batch, position).compile()),
    }

    def run() -> dict[str, Any]:
        nonlocal state
        state, metrics = program(state, batch, position)
        return {"loss": float(metrics["loss"])} | (device.memory_stats() or {})

    return run, facts, lambda: state


def measure(config: TrainConfig, options: Options) -> dict[str, Any]:
    """Time the steps, ours and the peers' in turn, and their memory.

    Raises:
        ValueError: the losses of the first step are not the same.
    """
    length, vocab_size = config.sequence_length, config.model.vocab_size or 0
    shape = (config.data.batch_size, length + 1)
    tokens = np.random.default_rng(0).integers(0, vocab_size, shape).astype(np.int32)
    with contextlib.ExitStack() as stack:
        workers = {"ours": stack.enter_context(Worker(our_step, config, tokens, bool(options.vs)))}
        facts = workers["ours"].facts
        tensors = facts.pop("tensors")
        for peer in options.vs:
            worker = Worker(torch_train_step, peer, config, tokens, tensors, options.compile)
            workers[peer] = stack.enter_context(worker)
        del tensors
        losses = {name: worker.call()["loss"] for name, worker in workers.items()}  # loads what was compiled, too
        for name, value in losses.items():
            apart = abs(losses["ours"] / value - 1)
            require(config.model.dropout > 0 or apart < CLOSE, f"{name} is not the same model: first losses {losses}")
        memory = {name: measured_memory(worker) for name, worker in workers.items()}
        turns = {name: functools.partial(worker.seconds, options.steps) for name, worker in workers.items()}
        results = in_turn(turns, options.rounds, "tokens_per_second", config.tokens_per_step * options.steps)
    for name, row in results.items():
        rate = row["tokens_per_second"]
        row["seconds_per_step"] = {
            "median": config.tokens_per_step / rate["median"],
            "min": config.tokens_per_step / rate["max"],
            "max": config.tokens_per_step / rate["min"],
        }
        row["peak_memory_bytes"], row["peak_memory_probe"] = memory[name]
    flops = training_flops_per_token(config.model, length, vocab_size)
    mfu = flops * results["ours"]["tokens_per_second"]["median"] / facts["peak_flops"]
    return facts | {
        "tokens_per_step": config.tokens_per_step,
        "mfu": mfu,
        "mfu_formula": FORMULA,
        "first_losses": losses,
        "results": results,
    }


def measured_memory(worker: Worker) -> tuple[int | None, str]:
    """Peak memory of a contestant's steps, in bytes, and how it was measured."""
    growth = worker.peak_memory(2)
    if "peak_bytes_in_use" in (stats := worker.call()):
        return stats["peak_bytes_in_use"], "device.memory_stats()['peak_bytes_in_use']"
    return None if growth is None else growth + worker.facts["state_bytes"], MEMORY_PROBE


def table(recipe: str, config: TrainConfig, result: dict[str, Any]) -> str:
    """The result for people."""
    model, about, results = config.model, result["environment"], result["results"]
    own = results["ours"]
    versions = ", ".join(
        f"{name} {about['versions'][name]}" for name in ("jax", "torch", "transformers") if name in about["versions"]
    )
    lines = [
        ("recipe", f"{recipe}: {result['parameters'] / 1e6:.2f}M parameters, {model.compute_dtype}, random token ids"),
        ("shape", f"{config.data.batch_size} x {config.sequence_length} tokens a step"),
        ("machine", f"{about['processor']}, {about['cores']} cores; {versions}; {about['date']}"),
        ("runs on", f"{result['devices']} device(s), {result['strategy']}"),
        ("compile", f"{result['compile_seconds']:.2f} s"),
        ("MFU", f"{result['mfu']:.1%} of {result['peak_flops'] / 1e9:,.0f} GFLOP/s; {FORMULA}"),
        ("memory", own["peak_memory_probe"]),
        ("figures", "median (least to greatest) of the rounds; ratio: ours over theirs, above 1 is faster"),
        ("", f"{'':<8}{'tokens/s':<32}{'ms a step':<32}{'peak memory':<14}ratio"),
    ]
    for name, row in results.items():
        size = row["peak_memory_bytes"]
        memory = "not measured" if size is None else f"{size / 2**30:.3f} GiB"
        ratio = spelled(row["ratio"], digits=2) if "ratio" in row else ""
        rate, step = spelled(row["tokens_per_second"], digits=0), spelled(row["seconds_per_step"], 1e3)
        lines.append(("", f"{name:<8}{rate:<32}{step:<32}{memory:<14}{ratio}"))
    return "\n".join(f"{name:<11}{value}".rstrip() for name, value in lines)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    rest = list(arguments)
    recipe = rest.pop(0) if rest and not rest[0].startswith("-") else "shakespeare-char-cpu"
    try:
        options = parse(Options, rest, "train_step.py [RECIPE]")
        config = configure(recipe, options)
        result = measure(config, options)
        if options.parts:
            step = result["results"]["ours"]["seconds_per_step"]["median"]
            result["breakdown"] = measure_parts(config, step, options.rounds)
    except ValueError as error:
        print(f"train_step.py: {error}", file=sys.stderr)
        return 2
    result = {"benchmark": "train_step", "recipe": recipe, "options": asdict(options)} | result
    print(table(recipe, config, result))
    if options.parts:
        print(table_of_parts(result["breakdown"]))
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
