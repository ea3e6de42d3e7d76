"""Speed of fine-tuning a classifier: `python benchmarks/finetune.py [--vs torch] [--json]`.

The step is the program's own, with GPT-2's head for classes and no auxiliary loss, which the peer has not; the data is
random token ids of random lengths, padded to the same length on both sides.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jaxgpt  # noqa: F401  (sets XLA's flags before JAX starts)

# isort: split
import jax
import numpy as np
from measure import Worker, environment, in_turn, spelled
from peers import torch_classifier_step

from jaxgpt.arguments import parse
from jaxgpt.config import ExamplesConfig, FinetuneConfig, OptimizerConfig, gpt_size, require
from jaxgpt.data.example_batches import EncodedExamples, ExampleBatches, Sequences
from jaxgpt.environment import keep_freed_memory
from jaxgpt.models.partition import combine
from jaxgpt.tasks import initial
from jaxgpt.tasks.finetuning import loss
from jaxgpt.training.metrics import count_parameters
from jaxgpt.training.optimizer import make_optimizer
from jaxgpt.training.parallel import choose_layout
from jaxgpt.training.step import TrainState, train_step

CLOSE = 1e-3  # relative: losses of the first steps further apart are those of different models
OPTIMIZER = OptimizerConfig(learning_rate=6.25e-5, schedule="constant", warmup_steps=0, beta2=0.999, weight_decay=0.01)


@dataclass(frozen=True)
class Options:
    """Measure fine-tuning steps."""

    size: Literal["tiny", "124M", "355M"] = "124M"
    """the model's size"""
    vocab_size: int = 50260
    """tokens of its vocabulary"""
    classes: int = 2
    """classes of the head"""
    batch_size: int = 8
    """examples a step"""
    length: int = 64
    """tokens of the longest example; the others have at least half as many"""
    dropout: float = 0.0
    """share of activations zeroed; above 0 the losses of the two sides differ"""
    steps: int = 2
    """steps a round"""
    rounds: int = 7
    """rounds; beside a peer they alternate with its own"""
    vs: Literal["none", "torch"] = "none"
    """measure GPT2ForSequenceClassification of transformers in the same run"""
    seed: int = 0
    """of weights and examples"""
    json: bool = False
    """print one JSON object last"""

    def __post_init__(self) -> None:
        least = {"vocab_size": 8, "classes": 2, "batch_size": 1, "length": 4, "steps": 1, "rounds": 1}
        for name, bound in least.items():
            value, option = getattr(self, name), name.replace("_", "-")
            require(value >= bound, f"{option} is {value}; it must be at least {bound}")


def configure(options: Options) -> FinetuneConfig:
    """The run whose step is measured."""
    model = gpt_size(options.size, vocab_size=options.vocab_size, dropout=options.dropout)
    require(options.length <= model.context, f"length is {options.length}, more than the context of {model.context}")
    return FinetuneConfig(
        model=model, data=ExamplesConfig(batch_size=options.batch_size), optimizer=OPTIMIZER, lm_weight=0.0,
        head_dropout=0.0, labels=tuple(map(str, range(options.classes))),
    )  # fmt: skip


def make_batch(options: Options) -> dict[str, np.ndarray]:
    """Random examples as the program makes a batch of them; the last id, which pads the peer's, is in none."""
    generator = np.random.default_rng(options.seed)
    lengths = generator.integers((options.length + 1) // 2, options.length + 1, options.batch_size)
    lengths[0] = options.length
    sequences = [
        Sequences((generator.integers(0, options.vocab_size - 1, length).astype(np.int32),), 0) for length in lengths
    ]
    labels = generator.integers(0, options.classes, options.batch_size).astype(np.int32)
    return ExampleBatches(EncodedExamples(sequences, labels, []), [options.length], options.batch_size, 0).batch(0)


def our_step(
    config: FinetuneConfig, parameters: Any, batch: dict[str, np.ndarray], seed: int
) -> tuple[Callable[[], float], dict[str, Any]]:
    """A function that runs one step of the program itself, and how it is spread over devices."""
    keep_freed_memory(config.model.width)
    layout = choose_layout(config.parallel, len(batch["row"]), "batch-size")
    optimizer = make_optimizer(config.optimizer, steps=1)
    step = functools.partial(train_step, loss=functools.partial(loss, config), optimizer=optimizer, seed=seed)
    # A copy, because the step uses up what it is given.
    state = jax.jit(lambda p: TrainState(jax.numpy.zeros((), jax.numpy.int32), p, optimizer.init(p)))(parameters)
    state = jax.device_put(state, layout.shardings(state))
    placed, program = layout.place(batch), layout.compile(step, scalars=1, donate=True)

    def run() -> float:
        nonlocal state
        state, metrics = program(state, placed, np.float32(0))
        return float(metrics["loss"])

    return run, {"strategy": layout.strategy, "devices": len(layout.devices), "environment": environment()}


def measure(options: Options) -> dict[str, Any]:
    """Examples a second of both sides' steps, in turn; first, that their losses are the same."""
    config, batch = configure(options), make_batch(options)
    parameters = jax.tree.map(np.asarray, combine(*initial.separated(config, jax.random.key(options.seed), None)))
    with contextlib.ExitStack() as stack:
        workers = {"ours": stack.enter_context(Worker(our_step, config, parameters, batch, options.seed))}
        if options.vs == "torch":
            workers["torch"] = stack.enter_context(Worker(torch_classifier_step, config, parameters, batch))
        facts = workers["ours"].facts | {"parameters": count_parameters(parameters)}
        del parameters
        losses = {name: [worker.call() for _ in range(3)] for name, worker in workers.items()}  # compiles, too
        for name, theirs in losses.items():
            # A loss of nearly nothing, where a few examples are after a step or two, is rounding on both sides.
            apart = max(abs(a - b) / max(b, 0.01) for a, b in zip(losses["ours"], theirs, strict=True))
            require(options.dropout > 0 or apart < CLOSE, f"{name} is not the same model: losses {losses}")
        turns = {name: functools.partial(worker.seconds, options.steps) for name, worker in workers.items()}
        examples = options.batch_size * options.steps
        results = in_turn(turns, options.rounds, "examples_per_second", examples)
    return facts | {"losses": losses, "results": results}


def table(options: Options, result: dict[str, Any]) -> str:
    """The result for people."""
    about = result["environment"]
    lines = [
        ("model", f"GPT-2 {options.size} with a head for {options.classes} classes: {result['parameters'] / 1e6:.1f}M"),
        ("shape", f"{options.batch_size} examples x {options.length} tokens a step, float32, AdamW"),
        ("machine", f"{about['processor']}, {about['cores']} cores; jax {about['versions']['jax']}; {about['date']}"),
        ("runs on", f"{result['devices']} device(s), {result['strategy']}"),
    ]
    for name, row in result["results"].items():
        lines.append((name, f"{spelled(row['examples_per_second'])} examples/s, median of {options.rounds} rounds"))
        if "ratio" in row:
            ratio = spelled(row["ratio"], digits=2)
            lines.append(("ratio", f"{ratio}, ours over torch's, in turn; the first losses are the same"))
    return "\n".join(f"{name:<9}{value}" for name, value in lines)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    try:
        options = parse(Options, list(arguments), "finetune.py")
        result = measure(options)
    except ValueError as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        return 2
    result = {"benchmark": "finetune", "options": asdict(options)} | result
    print(table(options, result))
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
