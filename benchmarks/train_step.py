"""Speed and memory of one training step: `python benchmarks/train_step.py [RECIPE] [--vs torch] [--json]`.

The step is the program's own, from the recipe's config; the data is random token ids.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import jaxgpt  # noqa: F401  (sets XLA's flags before JAX starts)

# isort: split
import jax
import numpy as np
from measure import MEMORY_PROBE, PAUSE_SECONDS, PeakMemory, environment, measured_peak_flops, seconds_of, spread
from peers import torch_train_step

from jaxgpt import recipes
from jaxgpt.arguments import parse
from jaxgpt.config import Dtype, Strategy, TrainConfig, require
from jaxgpt.environment import keep_freed_memory
from jaxgpt.models.gpt import init_parameters
from jaxgpt.tasks.lm import loss
from jaxgpt.training.metrics import chip_peak_flops, count_parameters, training_flops_per_token
from jaxgpt.training.optimizer import make_optimizer
from jaxgpt.training.parallel import choose_layout
from jaxgpt.training.step import TrainState, train_step

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
    vs: Literal["none", "torch"] = "none"
    """measure PyTorch's GPT-2 (transformers) in the same run"""
    json: bool = False
    """print one JSON object last"""

    def __post_init__(self) -> None:
        for name in ("steps", "rounds"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")


def configure(recipe: str, options: Options) -> tuple[TrainConfig, int]:
    """The recipe with the options applied, and its vocabulary size: where the model leaves it open, the tokenizer's."""
    config = recipes.recipe(recipe)
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{recipe} trains no GPT; benchmarks/translate.py measures translation")
    data, model, parallel = config.data, config.model, replace(config.parallel, strategy=options.strategy)
    if options.batch_size is not None:
        data, parallel = replace(data, batch_size=options.batch_size), replace(parallel, gradient_accumulation=1)
    if options.gradient_accumulation is not None:
        parallel = replace(parallel, gradient_accumulation=options.gradient_accumulation)
    data = replace(data, sequence_length=options.sequence_length or data.sequence_length)
    dtype: Dtype = options.compute_dtype or ("float32" if options.vs == "torch" else model.compute_dtype)
    by_kind = {"character": 66, "byte": 257}  # tinyshakespeare's characters and end-of-text; bytes and end-of-text
    vocab_size = model.vocab_size or by_kind.get(data.tokenizer, data.vocab_size)
    model = replace(model, compute_dtype=dtype, vocab_size=vocab_size)
    return replace(config, model=model, data=data, parallel=parallel), vocab_size


def our_step(
    config: TrainConfig, tokens: np.ndarray
) -> tuple[Callable[[], float], dict[str, Any], Callable[[], TrainState]]:
    """A function that runs one step of the program itself, what is known before it, and the state it has come to."""
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
    position = np.float32(config.optimizer.warmup_steps)
    facts = {
        "strategy": layout.strategy,
        "devices": len(layout.devices),
        "parameters": count_parameters(state.parameters),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        # Ahead of time, and not by way of the cache on disk, so that it is compilation that is measured.
        "compile_seconds": seconds_of(lambda: program.lower(state, batch, position).compile()),
    }

    def run() -> float:
        nonlocal state
        state, metrics = program(state, batch, position)
        return float(metrics["loss"])

    return run, facts, lambda: state


def measure(config: TrainConfig, vocab_size: int, options: Options) -> dict[str, Any]:
    """Time the steps, ours and the peer's in turn, and their memory."""
    length = config.sequence_length
    shape = (config.data.batch_size, length + 1)
    tokens = np.random.default_rng(0).integers(0, vocab_size, shape).astype(np.int32)
    device = jax.devices()[0]
    peak = chip_peak_flops(device) or measured_peak_flops()

    ours, facts, _ = our_step(config, tokens)
    ours()  # the first call loads what was compiled
    runs: dict[str, Callable[[], float]] = {"ours": ours}
    start_bytes = {"ours": facts["state_bytes"]}
    if options.vs == "torch":
        runs["theirs"], start_bytes["theirs"] = torch_train_step(config, vocab_size, tokens)
    memory: dict[str, int | None] = {}
    for name, step in runs.items():
        with PeakMemory() as probe:
            step()
            step()
        memory[name] = None if probe.growth is None else probe.growth + start_bytes[name]
    stats = device.memory_stats() or {}
    memory["ours"] = stats.get("peak_bytes_in_use", memory["ours"])

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, step in runs.items():
            time.sleep(PAUSE_SECONDS)
            seconds[name] += [seconds_of(step) for _ in range(options.steps)]

    per_step = config.tokens_per_step
    rate = {name: spread([per_step / value for value in values]) for name, values in seconds.items()}
    flops = training_flops_per_token(config.model, length, vocab_size)
    peak_of_all = peak * facts["devices"] if device.platform != "cpu" else peak  # virtual devices share the cores
    result = facts | {
        "tokens_per_step": per_step,
        "tokens_per_second": rate["ours"]["median"],
        "seconds_per_step": spread(seconds["ours"]),
        "total_seconds": {name: math.fsum(values) for name, values in seconds.items()},
        "mfu": flops * rate["ours"]["median"] / peak_of_all,
        "mfu_formula": FORMULA,
        "peak_flops": peak_of_all,
        "peak_memory_bytes": memory["ours"],
        "peak_memory_probe": MEMORY_PROBE if device.platform == "cpu" else "device.memory_stats()['peak_bytes_in_use']",
        "ours": rate["ours"],
    }
    if "theirs" in runs:
        result |= {
            "peer": "torch",
            "theirs": rate["theirs"],
            "ratio": rate["ours"]["median"] / rate["theirs"]["median"],
            "peer_peak_memory_bytes": memory["theirs"],
        }
    return result


def table(recipe: str, config: TrainConfig, result: dict[str, Any]) -> str:
    """The result for people."""
    model, about = config.model, result["environment"]
    step, gib = result["seconds_per_step"], 2**30

    def size(value: int | None) -> str:
        return "not measured on this system" if value is None else f"{value / gib:.3f} GiB"

    lines = [
        ("recipe", f"{recipe}: {result['parameters'] / 1e6:.2f}M parameters, {model.compute_dtype}, random token ids"),
        ("shape", f"{config.data.batch_size} x {config.sequence_length} tokens a step"),
        ("machine", f"{about['processor']}, {about['cores']} cores; jax {about['versions']['jax']}; {about['date']}"),
        ("runs on", f"{result['devices']} device(s), {result['strategy']}"),
        ("compile", f"{result['compile_seconds']:.2f} s"),
        ("step", f"{step['median'] * 1e3:.1f} ms, median ({step['min'] * 1e3:.1f} to {step['max'] * 1e3:.1f})"),
        ("tokens/s", f"{result['tokens_per_second']:,.0f}"),
        ("MFU", f"{result['mfu']:.1%} of {result['peak_flops'] / 1e9:,.0f} GFLOP/s; {FORMULA}"),
        ("memory", f"{size(result['peak_memory_bytes'])}, peak of the steps"),
        ("", f"({result['peak_memory_probe']})"),
    ]
    if "peer" in result:
        theirs = result["theirs"]
        lines += [
            ("PyTorch", f"{theirs['median']:,.0f} tokens/s ({theirs['min']:,.0f} to {theirs['max']:,.0f})"),
            ("its memory", size(result["peer_peak_memory_bytes"])),
            ("ratio", f"{result['ratio']:.2f} (ours over theirs; above 1 is faster)"),
        ]
    return "\n".join(f"{name:<11}{value}" for name, value in lines)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    rest = list(arguments)
    recipe = rest.pop(0) if rest and not rest[0].startswith("-") else "shakespeare-char-cpu"
    try:
        options = parse(Options, rest, "train_step.py [RECIPE]")
        config, vocab_size = configure(recipe, options)
        keep_freed_memory()
        result = measure(config, vocab_size, options)
    except ValueError as error:
        print(f"train_step.py: {error}", file=sys.stderr)
        return 2
    result = {"benchmark": "train_step", "recipe": recipe, "options": asdict(options)} | result
    result["environment"] = environment()
    print(table(recipe, config, result))
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
