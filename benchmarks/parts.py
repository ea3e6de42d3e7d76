"""Where a training step's time goes: each part alone, with gradients, beside the least that the machine allows."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import Worker, measured_bandwidth, measured_peak_flops

from jaxgpt.config import TrainConfig
from jaxgpt.data.batches import WindowBatches
from jaxgpt.data.shards import TokenStream
from jaxgpt.environment import keep_freed_memory
from jaxgpt.models.gpt import init_parameters, next_token_loss
from jaxgpt.models.layers import MLP, MultiHeadAttention
from jaxgpt.training.metrics import chip_peak_flops, count_parameters
from jaxgpt.training.optimizer import global_norm, make_optimizer

PARTS = ("attention", "mlp", "head", "optimizer", "data")


def parts_of_step(config: TrainConfig) -> tuple[Callable[[str], None], dict[str, Any]]:
    """A function that computes one part of a step on one device, and what is known of the parts and the machine.

    Of each part: how many `times` it is in a step, its FLOPs, and the bytes it must at least read and write.

    The parts are those of one micro-batch's whole step: attention and mlp of one block, with their products; the head
    with its loss; clipping and the optimiser; the making of a batch on the host. What is left of a step (norms, sums,
    embeddings, dropout keys) is nobody's.
    """
    keep_freed_memory(config.model.width)
    model = config.model
    parameters = init_parameters(model, jax.random.key(0))
    count = count_parameters(parameters)
    rows, length = config.data.batch_size // config.parallel.gradient_accumulation, config.sequence_length
    x = jax.random.normal(jax.random.key(1), (rows, length, model.width), model.compute_dtype)
    dtypes: dict[str, Any] = {"parameter_dtype": model.parameter_dtype, "compute_dtype": model.compute_dtype}
    attention = MultiHeadAttention(
        model.heads, model.bias, implementation=model.attention, kv_heads=model.kv_heads, qk_norm=model.qk_norm,
        window=model.window, **dtypes,
    )  # fmt: skip
    mlp = MLP(model.hidden_width, model.activation, model.bias, **dtypes)
    calls = {
        "attention": _with_gradients(attention, lambda y: y[0], x, model.positions == "rotary"),
        "mlp": _with_gradients(mlp, lambda y: y, x),
        "head": _head(config, parameters, x),
        "optimizer": _optimizer(config, parameters),
        "data": _data(config),
    }
    tokens, d, vocab = rows * length, model.width, model.vocab_size or 0
    blocks = count_parameters(parameters["blocks"]["attention"]) / model.layers
    blocks_mlp = count_parameters(parameters["blocks"]["mlp"]) / model.layers
    size, micro = jnp.dtype(model.compute_dtype).itemsize, config.parallel.gradient_accumulation
    # Of attention's scores half are needed (causal): 6 T D a token forward and backward, a window's share of it.
    scores = 6 * min(length, model.window or length) * d
    facts = {
        "attention": (model.layers * micro, tokens * (6 * blocks + scores), size * (3 * blocks + 12 * tokens * d)),
        "mlp": (model.layers * micro, tokens * 6 * blocks_mlp, size * (3 * blocks_mlp + 4 * tokens * d)),
        "head": (micro, tokens * 6 * vocab * d, size * (3 * vocab * d + 2 * tokens * d)),
        # Gradient, parameter and two moments read, the last three written.
        "optimizer": (1, 0.0, 4.0 * 7 * count),
        "data": (1, 0.0, 0.0),
    }
    device = jax.devices()[0]

    def call(part: str) -> None:
        jax.block_until_ready(calls[part]())

    for part in PARTS:
        call(part)  # compiles
    named = {part: dict(zip(("times", "flops", "bytes"), values, strict=True)) for part, values in facts.items()}
    peaks = {"flops": chip_peak_flops(device) or measured_peak_flops(), "bandwidth": measured_bandwidth()}
    return call, {"parts": named, "peaks": peaks}


def _with_gradients(module: Any, pick: Callable[[Any], Any], x: Any, rotate: bool = False) -> Callable[[], Any]:
    given = {"positions": jnp.arange(x.shape[1])[None]} if rotate else {}
    variables = jax.jit(functools.partial(module.init, **given))(jax.random.key(0), x)

    @jax.jit
    def gradients(variables: Any, x: Any, gradient: Any) -> Any:
        _, pull = jax.vjp(lambda v, x: pick(module.apply(v, x, **given)), variables, x)
        return pull(gradient)

    return lambda: gradients(variables, x, x)


def _head(config: TrainConfig, parameters: Any, x: Any) -> Callable[[], Any]:
    targets = jax.random.randint(jax.random.key(2), x.shape[:2], 0, config.model.vocab_size or 1)
    weights = jnp.ones(x.shape[:2], jnp.float32)
    name = "head" if "head" in parameters else "token_embedding"
    table = {name: parameters[name]}
    loss = functools.partial(next_token_loss, config.model)
    gradients = jax.jit(jax.grad(lambda table, x: loss(table, x, targets, weights), (0, 1)))
    return lambda: gradients(table, x)


def _optimizer(config: TrainConfig, parameters: Any) -> Callable[[], Any]:
    optimizer = make_optimizer(config.optimizer, config.steps, config.model.width)
    parameters = jax.tree.map(jnp.copy, parameters)  # these are donated, and others need theirs
    carried = (parameters, jax.jit(optimizer.init)(parameters))
    gradients = jax.tree.map(lambda p: jnp.full(p.shape, 1e-3, p.dtype), parameters)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(carried: Any, gradients: Any) -> Any:
        parameters, state = carried
        norm, position = global_norm(gradients), jnp.float32(config.optimizer.warmup_steps)
        updates, state = optimizer.update(gradients, state, parameters, position=position, norm=norm)
        return optax.apply_updates(parameters, updates), state

    def call() -> Any:
        nonlocal carried
        carried = update(carried, gradients)
        return carried

    return call


def _data(config: TrainConfig) -> Callable[[], Any]:
    size = min(config.model.vocab_size or 1, 2**16)
    ids = np.random.default_rng(0).integers(0, size, max(10**6, 2 * config.tokens_per_step), np.uint16)
    windows = WindowBatches(TokenStream((ids,), 1, len(ids)), config.sequence_length, config.data.batch_size, 0)
    return lambda: windows.batch(0)


def measure_parts(config: TrainConfig, step_seconds: float, rounds: int) -> dict[str, Any]:
    """Seconds of each part in a step, its share, and how near it is to what the machine's peaks allow."""
    with Worker(parts_of_step, config) as worker:
        facts, peaks = worker.facts["parts"], worker.facts["peaks"]
        results: dict[str, Any] = {}
        for part in PARTS:
            once = worker.seconds(1, part)
            repeats = max(1, min(20, int(0.5 / max(once, 1e-6))))
            seconds = statistics.median(worker.seconds(repeats, part) / repeats for _ in range(rounds))
            fact = facts[part]
            limit = max(fact["flops"] / peaks["flops"], fact["bytes"] / peaks["bandwidth"])
            results[part] = {
                "seconds": seconds * fact["times"],
                "share": seconds * fact["times"] / step_seconds,
                "flops_per_second": fact["flops"] / seconds,
                "limit_seconds": limit * fact["times"],
            }
    # A batch is made beside the step before, so its time is not part of the sum.
    rest = step_seconds - sum(row["seconds"] for part, row in results.items() if part != "data")
    results["rest"] = {"seconds": rest, "share": rest / step_seconds}
    return {"peaks": peaks, "step_seconds": step_seconds, "parts": results}


def table(result: dict[str, Any]) -> str:
    """The parts for people."""
    peaks = result["peaks"]
    lines = [
        f"{'peaks':<11}{peaks['flops'] / 1e9:,.0f} GFLOP/s, {peaks['bandwidth'] / 1e9:,.1f} GB/s, both measured; the "
        "limit is the larger of what operations and bytes take at them",
        f"{'part':<11}{'ms a step':>10}{'share':>8}{'GFLOP/s':>9}{'limit, ms':>11}{'of it':>8}",
    ]
    for part, row in result["parts"].items():
        text = f"{part:<11}{row['seconds'] * 1e3:>10.1f}{row['share']:>8.1%}"
        if row.get("limit_seconds"):
            rate = f"{row['flops_per_second'] / 1e9:,.0f}" if row["flops_per_second"] else ""
            text += f"{rate:>9}{row['limit_seconds'] * 1e3:>11.1f}{row['limit_seconds'] / row['seconds']:>8.0%}"
        lines.append(text + ("  (on the host, beside the step before)" if part == "data" else ""))
    return "\n".join(lines)
