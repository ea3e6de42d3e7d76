"""Time and memory of causal attention: `python benchmarks/attention.py [--vs torch] [--lengths 128 512] [--json]`.

What is timed is the value and the gradients by queries, keys and values, all random.
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
import jax.numpy as jnp
import numpy as np
from measure import MEMORY_PROBE, Worker, cores, environment, in_turn, spelled

from jaxgpt.arguments import parse
from jaxgpt.config import AttentionName, Dtype, require
from jaxgpt.environment import keep_freed_memory
from jaxgpt.models.attention import attention


@dataclass(frozen=True)
class Options:
    """Measure causal attention with its gradients."""

    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    """tokens of a sequence"""
    batch_size: int = 1
    """sequences"""
    heads: int = 12
    """heads"""
    head_width: int = 64
    """width of each"""
    dtype: Dtype = "float32"
    """of queries, keys and values; float32 beside torch"""
    implementation: AttentionName = "auto"
    """form of attention"""
    rounds: int = 7
    """rounds; beside a peer they alternate with its own"""
    vs: Literal["none", "torch"] = "none"
    """measure PyTorch's scaled_dot_product_attention in the same run"""
    json: bool = False
    """print one JSON object last"""

    def __post_init__(self) -> None:
        for name in ("batch_size", "heads", "head_width", "rounds"):
            value, option = getattr(self, name), name.replace("_", "-")
            require(value >= 1, f"{option} is {value}; it must be at least 1")
        require(bool(self.lengths) and min(self.lengths) >= 1, f"lengths are {self.lengths}; each must be at least 1")
        require(self.vs == "none" or self.dtype == "float32", f"beside torch the dtype is float32, not {self.dtype}")


def our_turn(inputs: Sequence[np.ndarray], options: Options) -> tuple[Callable[[], np.ndarray], dict[str, Any]]:
    """A function that computes the gradients of the sum of what the heads give, and returns that by the queries."""
    keep_freed_memory()
    attend = functools.partial(attention, causal=True, implementation=options.implementation)

    def total(query: Any, key: Any, value: Any, weights: Any) -> Any:
        return jnp.sum(attend(query, key, value) * weights)

    program = jax.jit(jax.grad(total, (0, 1, 2)))
    arrays = [jnp.asarray(x, options.dtype) for x in inputs]
    return lambda: np.asarray(jax.block_until_ready(program(*arrays))[0]), {"environment": environment()}


def torch_turn(inputs: Sequence[np.ndarray]) -> tuple[Callable[[], np.ndarray], dict[str, Any]]:
    """The same of PyTorch; heads lie first there, as its kernel wants them."""
    import torch

    torch.set_num_threads(cores())
    *parts, weights = (torch.from_numpy(np.ascontiguousarray(x.swapaxes(1, 2))) for x in inputs)
    query, key, value = (x.requires_grad_() for x in parts)

    def turn() -> np.ndarray:
        for x in (query, key, value):
            x.grad = None
        heads = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        (heads * weights).sum().backward()
        return np.asarray(query.grad.numpy().swapaxes(1, 2))

    return turn, {}


def measure(length: int, options: Options) -> dict[str, Any]:
    """Seconds and peak memory of one length; beside a peer, that the gradients are the same.

    Raises:
        ValueError: they are not.
    """
    random = np.random.default_rng(length)
    shape = (options.batch_size, length, options.heads, options.head_width)
    inputs = [random.normal(size=shape).astype(np.float32) for _ in range(4)]
    with contextlib.ExitStack() as stack:
        workers = {"ours": stack.enter_context(Worker(our_turn, inputs, options))}
        if options.vs == "torch":
            workers["torch"] = stack.enter_context(Worker(torch_turn, inputs))
        found = {name: worker.call() for name, worker in workers.items()}
        for name, theirs in found.items():
            distance = float(np.linalg.norm(found["ours"] - theirs) / np.linalg.norm(theirs))
            if not distance < 1e-3:
                raise ValueError(
                    f"the gradients of {name} and ours are {distance:.1e} apart: they compute different things"
                )
        turns = {name: functools.partial(worker.seconds, 1) for name, worker in workers.items()}
        results = in_turn(turns, options.rounds, "calls_per_second", 1)
        for name, worker in workers.items():
            results[name]["peak_memory_bytes"] = worker.peak_memory(1)
    return workers["ours"].facts | {"length": length, "results": results}


def table(options: Options, results: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """The results for people."""
    shape = f"{options.batch_size} x T x {options.heads} heads x {options.head_width}, {options.dtype}"
    lines = [
        f"attention  causal, value and gradients; {shape}, implementation {options.implementation}",
        f"machine    {about['processor']}, {about['cores']} cores; jax {about['versions']['jax']}; {about['date']}",
        f"{'T':>6}  {'':8}{'ms':28}{'peak memory':16}ratio",
    ]
    for result in results:
        for name, values in result["results"].items():
            rate, memory = values["calls_per_second"], values["peak_memory_bytes"]
            times = {"median": 1 / rate["median"], "min": 1 / rate["max"], "max": 1 / rate["min"]}
            size = "not measured" if memory is None else f"{memory / 2**20:,.0f} MiB"
            ratio = spelled(values["ratio"], digits=2) if "ratio" in values else ""
            lines.append(f"{result['length']:>6}  {name:8}{spelled(times, 1e3, 2):28}{size:16}{ratio}")
    lines.append(f"memory: {MEMORY_PROBE}; here without the inputs")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    try:
        options = parse(Options, list(arguments), "attention.py")
        results = [measure(length, options) for length in options.lengths]
    except ValueError as error:
        print(f"attention.py: {error}", file=sys.stderr)
        return 2
    about = results[0].pop("environment")
    print(table(options, results, about))
    if options.json:
        print(
            json.dumps({"benchmark": "attention", "options": asdict(options), "results": results, "environment": about})
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
