"""Will it fit, and how fast can it be: a GPT's training step on devices that need not be there."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from jaxgpt.compiled import compile_step, shard_bytes, state_shapes, topology_devices
from jaxgpt.config import DataConfig, TrainConfig
from jaxgpt.models.sharding import AXES, BATCH, make_mesh
from jaxgpt.training.metrics import training_flops_per_token

GIB = 2.0**30
ROOM = 0.95  # share of a chip's memory that a program may have; the rest is the runtime's
TOKENIZER_SIZES = {"byte": 257, "character": 128}


@dataclass(frozen=True)
class Chip:
    """One device's peaks, from Google's pages on the TPU versions: bfloat16, and links in one direction."""

    flops: float
    """FLOP/s"""
    memory: float
    """bytes"""
    bandwidth: float
    """of the memory, bytes a second"""
    links: float
    """to other chips, bytes a second"""
    dimensions: int
    """of the grid that chips are linked in"""


CHIPS: Mapping[str, Chip] = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9, 3),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, 2),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, 3),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 400e9, 2),
}


@dataclass(frozen=True)
class Setting:
    """A config whose batch fits a mesh."""

    config: TrainConfig
    mesh: Mapping[str, int]

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def shares(self) -> int:
        """Into how many parts the rows of a batch are divided."""
        return math.prod(self.mesh[axis] for axis in BATCH)

    @property
    def micro_tokens(self) -> int:
        """Tokens that a device computes with at once."""
        return self.config.tokens_per_step // (self.shares * self.config.parallel.gradient_accumulation)


@dataclass(frozen=True)
class Plan:
    """What one step takes on each device."""

    setting: Setting
    source: Literal["compiled", "by formula"]
    chip: Chip | None
    kinds: Mapping[str, float]
    """bytes a device, by what they are for"""
    flops: float
    """of the model, a device and step (see `metrics.training_flops_per_token`)"""
    collective_bytes: float
    """that a device sends, a step"""
    memory_bytes: float
    """that a device reads and writes at least, a step; by formula"""

    @property
    def bytes(self) -> float:
        return sum(self.kinds.values())

    @property
    def fits(self) -> bool:
        """Whether the memory is enough; where it is not known, true."""
        return self.chip is None or self.bytes <= ROOM * self.chip.memory

    @property
    def seconds(self) -> dict[str, float]:
        """What each of the three limits would take alone: computing, memory, links. Empty for an unknown chip."""
        if self.chip is None:
            return {}
        again = 4 / 3 if self.setting.config.model.remat else 1.0
        return {
            "computing": self.flops * again / self.chip.flops,
            "memory": self.memory_bytes / self.chip.bandwidth,
            "links": self.collective_bytes / self.chip.links,
        }

    @property
    def step_seconds(self) -> float:
        """The least that a step can take, all three at the same time: a bound (Williams et al. 2009), no forecast."""
        return max(self.seconds.values(), default=math.nan)

    @property
    def tokens_per_second(self) -> float:
        return self.setting.config.tokens_per_step / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation at that bound (Chowdhery et al. 2022, appendix B)."""
        return math.nan if self.chip is None else self.flops / self.step_seconds / self.chip.flops


def plan(config: TrainConfig, topology: str, mesh: Mapping[str, int] | None = None) -> tuple[Plan, list[str]]:
    """Plan the step of `config`, by the compiler if it can be had, else by formula.

    Args:
        topology: TPUs such as v5e:16x16, or `local`: the devices of this machine.
        mesh: devices along each axis (default: as few along fsdp as memory allows, the rest along data).

    Returns:
        The plan, and what the user should know about it.

    Raises:
        ValueError: no such topology, a mesh of another size, or a model that cannot be cut so.
    """
    chip = chip_of(topology)
    notes: list[str] = []
    devices: list[Any] = []
    try:
        devices = jax.devices() if topology == "local" else topology_devices(topology)
        count = len(devices)
    except ValueError as error:
        if "jaxgpt[plan]" not in str(error):
            raise
        count = _count(topology)
        notes.append(f"by formula, not compiled: {error}")
    config, more = prepared(config, topology)
    notes += more
    for shape in [dict(mesh)] if mesh else _meshes_to_try(config, count, chip):
        setting, more = fitted(config, shape)
        result = _compiled(setting, devices, chip) if devices else estimate(setting, chip)
        if result.fits:
            break
    return result, [*notes, *more]


def search(config: TrainConfig, topology: str) -> Iterator[Plan]:
    """Plans of meshes, rows a device, remat and compute dtypes that fit, by formula, the fastest a token first."""
    chip = chip_of(topology)
    if chip is None:
        raise ValueError(f"--search needs a topology whose chips are known ({', '.join(CHIPS)}), not {topology}")
    config, _ = prepared(config, topology)
    count = _count(topology)
    found = []
    for shape, remat, dtype in itertools.product(
        _meshes(config, count), (False, True), dict.fromkeys(("bfloat16", config.model.compute_dtype))
    ):
        model = dataclasses.replace(config.model, remat=remat, compute_dtype=dtype)
        for accumulation in (1, 2, 4, 8, 16):
            parallel = dataclasses.replace(config.parallel, gradient_accumulation=accumulation)
            setting, _ = fitted(dataclasses.replace(config, model=model, parallel=parallel), shape)
            if setting.config.parallel.gradient_accumulation == accumulation:
                found.append(estimate(setting, chip))
    fitting = [one for one in found if one.fits]
    # Of those that are equally fast, the one with the most room in the other limits.
    yield from sorted(fitting, key=lambda one: (-round(one.tokens_per_second, -3), sum(one.seconds.values())))


def confirmed(found: Plan, topology: str) -> Plan:
    """The same plan by the compiler."""
    return _compiled(found.setting, topology_devices(topology), found.chip)


def chip_of(topology: str) -> Chip | None:
    """The chip of a topology; None for `local`.

    Raises:
        ValueError: it names none.
    """
    if topology == "local":
        return None
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not _count(topology):
        raise ValueError(
            f"topology {topology!r} is not VERSION:SHAPE with a version of {', '.join(CHIPS)}, as v5e:16x16, or local"
        )
    chip, dimensions = CHIPS[name], shape.count("x") + 1
    if dimensions != chip.dimensions:
        example = "x".join("4" * chip.dimensions)
        raise ValueError(
            f"topology {topology!r} has {dimensions} dimensions; {name} has {chip.dimensions}, as {name}:{example}"
        )
    return chip


def _count(topology: str) -> int:
    """Devices of VERSION:AxB or AxBxC; 0 if it is not of that form."""
    sizes = topology.partition(":")[2].split("x")
    return math.prod(int(size) for size in sizes) if all(size.isdecimal() for size in sizes) else 0


def prepared(config: TrainConfig, topology: str) -> tuple[TrainConfig, list[str]]:
    """With what otherwise the data would tell, the vocabulary, and the backend that it will run on, its loops."""
    data: DataConfig = config.data
    if topology != "local":
        model = dataclasses.replace(config.model, unroll=config.model.unroll or 1)
        config = dataclasses.replace(config, model=model)
    if config.model.vocab_size is not None:
        return config, []
    size = TOKENIZER_SIZES.get(data.tokenizer, data.vocab_size)
    model = dataclasses.replace(config.model, vocab_size=size)
    note = f"the vocabulary is taken to have {size:,} tokens; the data will tell (or --model.vocab-size)"
    return dataclasses.replace(config, model=model), [note]


def fitted(config: TrainConfig, mesh: Mapping[str, int]) -> tuple[Setting, list[str]]:
    """Round the batch up to what divides over the mesh, and the micro-batches down."""
    mesh = {axis: mesh.get(axis, 1) for axis in AXES}
    shares, rows = math.prod(mesh[axis] for axis in BATCH), config.data.batch_size
    own = -(-rows // shares)
    accumulation = max(n for n in range(1, config.parallel.gradient_accumulation + 1) if own % n == 0)
    notes = []
    if own * shares != rows:
        notes.append(f"data.batch-size {rows} does not divide over {shares} devices; planned with {own * shares}")
    data = dataclasses.replace(config.data, batch_size=own * shares)
    parallel = dataclasses.replace(config.parallel, gradient_accumulation=accumulation)
    return Setting(dataclasses.replace(config, data=data, parallel=parallel), mesh), notes


def _meshes(config: TrainConfig, count: int) -> Iterator[dict[str, int]]:
    """All that the model's axes divide by; fsdp and tensor in powers of two."""
    model = config.model
    powers = [2**n for n in range(count.bit_length()) if count % 2**n == 0]
    for tensor, fsdp in itertools.product([n for n in powers if n <= 8], powers):
        columns = (model.heads, model.hidden_width, model.vocab_size or 1)
        if count % (fsdp * tensor) == 0 and model.width % fsdp == 0 and all(n % tensor == 0 for n in columns):
            yield {"data": count // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}


def _meshes_to_try(config: TrainConfig, count: int, chip: Chip | None) -> list[dict[str, int]]:
    """Without tensor, from the least fsdp that fits by formula on."""
    shapes = [shape for shape in _meshes(config, count) if shape["tensor"] == 1]
    fitting = [shape for shape in shapes if estimate(fitted(config, shape)[0], chip).fits]
    return fitting or shapes[-1:]


def _compiled(setting: Setting, devices: list[Any], chip: Chip | None) -> Plan:
    by_formula = estimate(setting, chip)
    needed = devices[: setting.devices] if chip is None else devices
    try:
        program = compile_step(setting.config, make_mesh(setting.mesh, needed))
    except MemoryError as error:
        return dataclasses.replace(by_formula, source="compiled", kinds={"more than there is": float(str(error))})
    sent = by_formula.collective_bytes if program.collective_bytes is None else program.collective_bytes
    state = {name: by_formula.kinds[name] for name in ("parameters", "optimizer state")}
    # The compiler says what all temporaries take together, and gradients are of a known size.
    gradients = min(by_formula.kinds["gradients"], program.temporary_bytes)
    kinds = state | {
        "batch": program.argument_bytes - sum(state.values()),
        "gradients": gradients,
        "activations and other temporaries": program.temporary_bytes - gradients,
    }
    return dataclasses.replace(by_formula, source="compiled", kinds=kinds, collective_bytes=sent)


def estimate(setting: Setting, chip: Chip | None) -> Plan:
    """The plan by formula. State and gradients are exact; what is kept and sent is counted as follows.

    Kept for the backward pass, a token and layer: what 13 vectors of D take, 6 of which, like 2 of F, are cut by tensor
    (fitted to compiled programs, not counted; see benchmarks/RESULTS.md); with remat one D a layer, and all of one
    layer. Whole on each device: the embedding table, a copy for the products and its gradient, and two layers' gathered
    weights. Sent: each layer's weights, gathered for every pass over it, and all gradients added up, a micro-batch;
    with tensor 4 sums of the stream a layer (Shoeybi et al. 2019). Read and written: weights for every pass, all state
    once, activations twice.
    """
    config, mesh = setting.config, setting.mesh
    model, state = config.model, state_shapes(config)
    lying = AbstractMesh(tuple(mesh[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    parameters = shard_bytes(state.parameters, lying)
    optimizer = shard_bytes(state.optimizer_state, lying)
    compute, tensor, fsdp = jnp.dtype(model.compute_dtype).itemsize, mesh["tensor"], mesh["fsdp"]
    tokens, times = setting.micro_tokens, config.parallel.gradient_accumulation
    d, f, layers, vocabulary = model.width, model.hidden_width, model.layers, model.vocab_size or 0

    layer = 7 * d + (6 * d + 2 * f) / tensor
    kept = tokens * compute * (layers * d + layer if model.remat else layers * layer)
    table = vocabulary * d / tensor * (4 + 4 + compute) if setting.devices > 1 else vocabulary * d * compute
    weights = (4 * d * d + 2 * d * f) * compute / tensor
    kinds = {
        "parameters": parameters,
        "optimizer state": optimizer,
        "batch": 3 * 4 * config.tokens_per_step / setting.shares,
        "gradients": parameters,
        "activations": kept,
        "gathered weights": table + 2 * weights if fsdp > 1 else table,
    }
    passes = 3 if model.remat else 2
    all_weights = layers * weights + vocabulary * d * compute / tensor
    share, of_fsdp = (setting.shares - 1) / setting.shares, (fsdp - 1) / fsdp
    sent = times * (passes * all_weights * of_fsdp + 2 * share * all_weights)
    sent += times * layers * 4 * tokens * d * compute * 2 * (tensor - 1) / tensor
    touched = times * ((passes + 1) * all_weights + 2 * kept) + 2 * (parameters + optimizer) + 2 * parameters
    flops = training_flops_per_token(model, config.sequence_length, vocabulary)
    return Plan(setting, "by formula", chip, kinds, flops * config.tokens_per_step / setting.devices, sent, touched)
