"""A training step compiled for devices that need not be there, and what its program says of memory and traffic."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxgpt.config import AdaptConfig, TrainConfig
from jaxgpt.models.gpt import GPT
from jaxgpt.models.sharding import batch_sharding, state_shardings
from jaxgpt.tasks import lm
from jaxgpt.training.optimizer import make_optimizer
from jaxgpt.training.step import TrainState, train_step

# What libtpu reads when it is loaded: that there is no TPU here to ask for, and that nobody wants its log.
WITHOUT_TPU = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # only what is computed on needs to be held by one process alone
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


class Program(NamedTuple):
    """What the compiler says of one device's program."""

    argument_bytes: float
    """state and batch, on one device"""
    temporary_bytes: float
    """what the step needs besides, at its peak"""
    collective_bytes: float | None
    """what a device sends to others in one step, rings assumed; None where the program cannot be read"""


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a TPU topology such as v5e:16x16, described, not there. Needs the package libtpu.

    Raises:
        ValueError: there is no such topology, or no libtpu.
    """
    from jax.experimental import topologies

    for variable, value in WITHOUT_TPU.items():
        os.environ.setdefault(variable, value)
    try:
        # A chip of v4 has two cores, which are used as one device.
        config = {"chip_config_name": "megacore"} if name.startswith("v4") else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **config).devices)
    except Exception as error:
        if "TPU support not installed" in str(error):
            raise ValueError("to compile for TPUs without one needs the extra: pip install 'jaxgpt[plan]'") from error
        raise ValueError(f"there is no TPU topology {name}: {str(error).removeprefix('INVALID_ARGUMENT: ')}") from error


def state_shapes(config: TrainConfig) -> TrainState:
    """The shapes of everything a run carries from step to step; `config.model.vocab_size` is set."""
    optimizer = make_optimizer(config.optimizer, config.steps, config.model.width)

    def make() -> TrainState:
        parameters = GPT(config.model).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        return TrainState(jnp.zeros((), jnp.int32), parameters, optimizer.init(parameters))

    shapes: TrainState = jax.eval_shape(make)
    return shapes


def compile_step(config: TrainConfig, mesh: Mesh) -> Program:
    """Compile the step of `config` for a mesh, of devices that may be there or not, and read the program.

    Raises:
        MemoryError: it needs more than a device has: so many bytes.
    """
    state = state_shapes(config)
    rows, length = config.data.batch_size, config.sequence_length
    batch: dict[str, Any] = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in ("tokens", "targets")}
    batch |= {"weights": jax.ShapeDtypeStruct((rows, length), jnp.float32)}
    batch |= {"row": jax.ShapeDtypeStruct((rows,), jnp.int32)}
    step = functools.partial(
        train_step,
        loss=functools.partial(lm.loss, config.model, AdaptConfig()),
        optimizer=make_optimizer(config.optimizer, config.steps, config.model.width),
        seed=config.seed,
        micro_batches=config.parallel.gradient_accumulation,
    )
    lying, whole = state_shardings(state, mesh), NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        program = jax.jit(
            step,
            in_shardings=(lying, jax.tree.map(lambda x: batch_sharding(mesh), batch), whole),
            out_shardings=(lying, whole),
            donate_argnums=0,
        )
        lowered = program.lower(state, batch, jax.ShapeDtypeStruct((), jnp.float32))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = re.search(r"\(([\d.]+)G\)", str(error))
        raise MemoryError(float(needed.group(1)) * 2**30 if needed else math.inf) from error
    memory = compiled.memory_analysis()
    assert memory is not None
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Program(
        float(memory.argument_size_in_bytes),
        float(memory.temp_size_in_bytes + fresh),
        _sent(compiled),
    )


def _sent(compiled: Any) -> float | None:
    try:
        return collective_bytes(compiled.as_text())
    except jax.errors.JaxRuntimeError:  # programs for v5p can be newer than the reader of this JAX
        return None


DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
COLLECTIVE = re.compile(
    r" = (?P<result>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def collective_bytes(program: str) -> float:
    """Bytes that one device sends in one run of a compiled program (its HLO as text), with rings.

    Of n devices, each sends (n - 1) / n of the result of an all-gather or all-to-all, twice that for an all-reduce,
    (n - 1) times its part of a reduce-scatter. What is in a loop counts as often as the loop runs, where the compiler
    says how often.
    """
    bodies = _computations(program)
    total = 0.0
    seen: set[tuple[str, str]] = set()
    for name, times in _runs(bodies).items():
        for line in bodies[name]:
            found = COLLECTIVE.search(line)
            channel = re.search(r"channel_id=(\d+)", line)
            # One that is spread over several steps of a pipeline keeps its channel; but so do others that were merged.
            same = found and channel and (channel.group(1), found["result"])
            if found is None or same in seen:
                continue
            if same:
                seen.add(same)
            size, members = _bytes_of(found["result"]), _group_size(line)
            share = (members - 1) / members
            total += times * size * {"all-reduce": 2 * share, "reduce-scatter": members - 1}.get(found["kind"], share)
    return total


def _computations(program: str) -> dict[str, list[str]]:
    """The lines of each computation; that of the entry is named ENTRY."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in program.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines = bodies.setdefault("ENTRY" if header.group(1) else header.group(2), [])
        else:
            lines.append(line)
    return bodies


def _runs(bodies: dict[str, list[str]]) -> dict[str, float]:
    """How often each computation runs, those that are called from the entry on."""
    runs: dict[str, float] = {}

    def visit(name: str, times: float) -> None:
        if name not in bodies:
            return
        runs[name] = max(runs.get(name, 0.0), times)
        for line in bodies[name]:
            trips = _trips(line, bodies) if " while(" in line else 1
            for called in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                visit(called, times * trips)

    visit("ENTRY", 1.0)
    return runs


def _trips(loop: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop runs: what the compiler noted, or the one number that its counter is compared with, else 1."""
    if noted := re.search(r'known_trip_count":\{"n":"(\d+)"', loop):
        return int(noted.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", loop)
    lines = bodies.get(condition.group(1), []) if condition else []
    limits = [int(n) for line in lines for n in re.findall(r" s32\[\]\S* constant\((\d+)\)", line)]
    return limits[0] if len(limits) == 1 else 1


def _bytes_of(shape: str) -> int:
    """Of a shape or a tuple of them, in HLO's spelling."""
    sizes = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(
        DTYPE_BYTES.get(dtype, 4) * math.prod(int(size) for size in dimensions.split(",") if size)
        for dtype, dimensions in sizes
    )


def _group_size(line: str) -> int:
    """How many devices take part together; three spellings."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found.group(1))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(found.group(1).split(","))
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found.group(2)) if axis in sizes)
    return 2


def shard_bytes(tree: Any, mesh: Mesh | AbstractMesh) -> float:
    """Bytes of a tree of shapes on one device of a mesh (of devices, or abstract)."""
    shardings: Sequence[Any] = jax.tree.leaves(state_shardings(tree, mesh))
    leaves = zip(jax.tree.leaves(tree), shardings, strict=True)
    return float(sum(math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize for x, where in leaves))
