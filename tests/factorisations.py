"""Every factorisation of eight devices into data x fsdp x tensor computes what one device does.

`python tests/factorisations.py [--steps 20]` trains a GPT and an encoder-decoder on one device and over each of the ten
meshes of eight virtual ones, from scratch and fine-tuning, and prints a table; it fails where a loss differs by more
than 1e-5, or where the bytes of parameters and optimiser state that a device holds do not fall with fsdp x tensor.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

if __name__ == "__main__":  # before JAX starts; in the test suite conftest.py does it
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import AdaptConfig, GPTConfig, OptimizerConfig, ParallelConfig, TrainConfig, TransformerConfig
from jaxgpt.models import gpt, transformer
from jaxgpt.tasks import initial, lm, translation
from jaxgpt.training.optimizer import make_optimizer
from jaxgpt.training.parallel import choose_layout
from jaxgpt.training.step import TrainState, train_step

ROWS, LENGTH, VOCABULARY = 16, 16, 64
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=0, schedule="constant"), 100)
GPT = GPTConfig(vocab_size=VOCABULARY, context=LENGTH, layers=2, heads=8, width=64, dropout=0.1)
PAIR = TransformerConfig(
    vocab_size=VOCABULARY, context=LENGTH, heads=8, width=64, encoder_layers=1, decoder_layers=1, dropout=0.1
)
LORA = TrainConfig(model=GPT, init_from="base", adapt=AdaptConfig("lora"))
BOUND = 1e-5
# Of the bytes: vectors of the model's width, tables by position and adapters are not cut along every axis.
SLACK = {"gpt": 0.05, "encoder-decoder": 0.05, "gpt, adapters": 0.15}


class Work:
    """What a model learns, as far as a step asks."""

    def __init__(self, kind: str) -> None:
        self.pair = kind == "encoder-decoder"
        if self.pair:
            self.init: Any = lambda key: (transformer.init_parameters(PAIR, key), {})
            self.loss: Any = functools.partial(translation.loss, PAIR, 0.1)
        elif kind == "gpt":
            self.init = lambda key: (gpt.init_parameters(GPT, key), {})
            self.loss = functools.partial(lm.loss, GPT, AdaptConfig())
        else:
            self.init = functools.partial(initial.separated, LORA, base=gpt.init_parameters(GPT, jax.random.key(9)))
            self.loss = functools.partial(lm.loss, GPT, LORA.adapt)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Random tokens and weights, other ones in each row."""
        random = np.random.default_rng(step)
        tokens, targets, source = random.integers(0, VOCABULARY, (3, ROWS, LENGTH)).astype(np.int32)
        both = {
            "targets": targets, "weights": random.uniform(0, 1, (ROWS, LENGTH)).astype(np.float32),
            "row": np.arange(ROWS, dtype=np.int32),
        }  # fmt: skip
        lengths = random.integers(1, LENGTH, ROWS).astype(np.int32)
        pair = {"source": source, "source_length": lengths, "target": tokens}
        return both | (pair if self.pair else {"tokens": tokens})


def factorisations(count: int) -> Iterator[tuple[int, int, int]]:
    """All (data, fsdp, tensor) whose product is `count`."""
    for fsdp in range(1, count + 1):
        for tensor in range(1, count + 1):
            if count % (fsdp * tensor) == 0:
                yield count // (fsdp * tensor), fsdp, tensor


def train(kind: str, parallel: ParallelConfig, steps: int) -> tuple[list[float], int]:
    """The losses, and the bytes of parameters and optimiser state that the first device holds."""
    work, layout = Work(kind), choose_layout(parallel, ROWS)
    step = functools.partial(train_step, loss=work.loss, optimizer=OPTIMIZER, seed=5)
    program = layout.compile(step, scalars=1, donate=True)

    def initial_state() -> TrainState:
        parameters, frozen = work.init(jax.random.key(1))
        return TrainState(jnp.zeros((), jnp.int32), parameters, OPTIMIZER.init(parameters), frozen)

    state = layout.initial(initial_state)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    losses = []
    for number in range(steps):
        state, metrics = program(state, layout.place(work.batch(number)), np.float32(number))
        losses.append(float(metrics["loss"]))
    return losses, held


def compare(kind: str, shape: tuple[int, int, int], expected: tuple[list[float], int]) -> tuple[float, float]:
    """Train over a mesh; return the largest relative difference of a loss, and the share of the bytes a device holds.

    Raises:
        AssertionError: the losses differ, or the bytes do not fall.
    """
    data, fsdp, tensor = shape
    mesh = ParallelConfig("mesh", mesh=f"data={data},fsdp={fsdp},tensor={tensor}")
    losses, held = train(kind, mesh, len(expected[0]))
    difference = max(abs(ours / theirs - 1) for ours, theirs in zip(losses, expected[0], strict=True))
    share = held / expected[1]
    assert difference <= BOUND, f"{kind} over {mesh.mesh}: the losses differ by {difference:.1e}"
    assert 1 / (fsdp * tensor) <= share <= 1 / (fsdp * tensor) + SLACK[kind], (
        f"{kind} over {mesh.mesh}: {share:.1%} a device"
    )
    return difference, share


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    print("| model | data x fsdp x tensor | largest difference of a loss | bytes a device |\n| --- | --- | --- | --- |")
    for kind in SLACK:
        expected = train(kind, ParallelConfig("single"), steps)
        assert len(expected[0]) == steps and all(map(math.isfinite, expected[0]))
        for shape in factorisations(8):
            difference, share = compare(kind, shape, expected)
            print(f"| {kind} | {' x '.join(map(str, shape))} | {difference:.1e} | {share:.1%} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
