"""What every benchmark needs: the environment, times with their spread, peak memory, the machine's peak speed."""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

MEMORY_PROBE = (
    "bytes of the state before the first step, plus the growth of the process's peak resident set (VmHWM) over the "
    "steps; freed memory is returned and the peak reset after compilation"
)
# (arguments) -> a call, and what is known of it before; run in the contestant's own process
Build = Callable[..., tuple[Callable[..., Any], dict[str, Any]]]
# OpenMP's threads spin for up to 200 ms after a peer's call, on the cores that the next call is to be timed on.
PAUSE_SECONDS = 0.25


def environment() -> dict[str, Any]:
    """Date, processor or accelerator, cores, and the versions that decide the speed."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "ctranslate2")
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{jax.device_count()} x {device.device_kind}",
        "processor": _processor(),
        "cores": cores(),
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name))},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def seconds_of(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, which returns only when its work is done."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spelled(values: dict[str, float], scale: float = 1.0, digits: int = 1) -> str:
    """A spread for people: the median, then least and greatest."""
    median, least, greatest = (f"{values[name] * scale:,.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({least} to {greatest})"


class Worker:
    """A contestant in a process of its own, which waits at its pipe while others have their turn.

    Two in one process break up the memory that the other has freed, so that its next step faults it in anew; and nobody
    runs two in one.
    """

    def __init__(self, build: Build, *arguments: Any) -> None:
        """Start the process; there, `build(*arguments)` makes what is called, and `facts`, what is known of it.

        Args:
            build: a function that its module has by name.

        Raises:
            ValueError: `build` did.
            RuntimeError: the process ended.
        """
        context = multiprocessing.get_context("spawn")  # a fork would take over threads that are not there
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.facts: dict[str, Any] = self._answer()

    def call(self, *arguments: Any) -> Any:
        """What one call returns."""
        return self._ask("call", 1, arguments)

    def seconds(self, times: int, *arguments: Any) -> float:
        """Seconds of so many calls, one after another, taken there."""
        return self._ask("seconds", times, arguments)

    def peak_memory(self, times: int, *arguments: Any) -> int | None:
        """Growth of the process's memory over so many calls (see `PeakMemory`)."""
        return self._ask("memory", times, arguments)

    def _ask(self, what: str, times: int, arguments: Sequence[Any]) -> Any:
        self._pipe.send((what, times, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a contestant's process ended with exit code {self._process.exitcode}") from None
        if isinstance(answer, ValueError):
            raise answer
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, build: Build, arguments: Sequence[Any]) -> None:
    """Answer a worker's requests until the pipe is closed; any error but `ValueError` ends the process."""
    try:
        call, facts = build(*arguments)
        pipe.send(facts)
    except ValueError as error:
        pipe.send(error)
        return
    while True:
        try:
            what, times, given = pipe.recv()
        except EOFError:
            return
        if what == "seconds":
            start = time.perf_counter()
            for _ in range(times):
                call(*given)
            pipe.send(time.perf_counter() - start)
        elif what == "memory":
            with PeakMemory() as probe:
                for _ in range(times):
                    call(*given)
            pipe.send(probe.growth)
        else:
            pipe.send(call(*given))


def in_turn(
    turns: Mapping[str, Callable[[], float]], rounds: int, unit: str, amount: float, reference: str = "ours"
) -> dict[str, dict[str, Any]]:
    """Give everyone `rounds` turns: how much of `amount` a second, and what the reference's is to theirs, by round.

    Args:
        turns: each does its work and returns the seconds that it took.
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds):
        for name, turn in sorted(turns.items(), reverse=number % 2 == 1):  # nobody is always first
            time.sleep(PAUSE_SECONDS)
            seconds[name].append(turn())
    results: dict[str, dict[str, Any]] = {}
    for name, values in seconds.items():
        results[name] = {unit: spread([amount / value for value in values])}
        if name != reference:
            ratios = [theirs / ours for ours, theirs in zip(seconds[reference], values, strict=True)]
            results[name]["ratio"] = spread(ratios)
    return results


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, Any]:
    """How far the texts are the same: after one token that differs, by rounding, all may."""
    first = [
        next((place for place, (a, b) in enumerate(zip(*rows, strict=True)) if a != b), None)
        for rows in zip(ours, theirs, strict=True)
    ]
    equal = [a == b for rows in zip(ours, theirs, strict=True) for a, b in zip(*rows, strict=True)]
    return {
        "equal_tokens": sum(equal) / len(equal),
        "equal_texts": first.count(None),
        "first_difference": min((place for place in first if place is not None), default=None),
    }


def measured_peak_flops(size: int = 2048, repeats: int = 20) -> float:
    """FLOP/s of the best of `repeats` float32 products of two `size` x `size` matrices: this machine's peak."""
    matrix = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    best = min(seconds_of(lambda: product(matrix, matrix).block_until_ready()) for _ in range(repeats))
    return 2 * size**3 / best


def measured_bandwidth(size: int = 2**28, repeats: int = 10) -> float:
    """Bytes a second of the best of `repeats` passes that read and write `size` bytes in place: the memory's peak."""
    numbers = jnp.zeros(size // 4, jnp.float32)
    program = jax.jit(lambda x: x + 1, donate_argnums=0)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        numbers = program(numbers).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


class PeakMemory:
    """Growth of the peak resident set while the block runs, on Linux (see MEMORY_PROBE); `growth` is None elsewhere."""

    growth: int | None = None

    def __enter__(self) -> PeakMemory:
        self._supported = Path("/proc/self/clear_refs").exists()
        if self._supported:
            ctypes.CDLL(None).malloc_trim(0)  # what compilation freed would otherwise hide what the steps take
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._supported:
            self.growth = max(0, _status("VmHWM") - self._before)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
