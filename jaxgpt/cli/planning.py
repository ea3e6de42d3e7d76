"""The verb plan: will a recipe fit, and how fast can it be, on devices that need not be there."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from itertools import islice
from typing import TYPE_CHECKING, Any

from jaxgpt import recipes
from jaxgpt.arguments import parse
from jaxgpt.cli.training import taken
from jaxgpt.config import TrainConfig, require

if TYPE_CHECKING:
    from jaxgpt.plan import Plan

PLAN_USAGE = """usage: jaxgpt plan RECIPE [--topology v5e:16x16] [--mesh AXIS=N,..] [--search] [--json] [--KEY value ..]

Compile the training step of a GPT's recipe for devices that need not be there, and print bytes a device by kind, FLOPs,
bytes sent, the least time a step can take and the share of the peak that would be. Topologies are those of TPU v4, v5e,
v5p and v6e (extra: pip install 'jaxgpt[plan]'; without it by formula), or local: the devices of this machine. Without
--mesh, as few devices along fsdp as the memory allows. --search tries meshes, micro-batches, remat and dtypes, and
prints the best that fits. --json prints one JSON object. The other settings are those of python train.py RECIPE --help.
"""
SHOWN = 8  # plans of a search
TRIED = 4  # of them compiled, until one fits


@dataclass(frozen=True)
class PlanOptions:
    """Where, and how."""

    topology: str = "local"
    """TPUs such as v5e:16x16, or local"""
    mesh: str | None = None
    """devices along each axis, as in data=64,fsdp=4"""
    search: bool = False
    """try meshes, micro-batches, remat and dtypes"""
    json: bool = False
    """one JSON object instead of lines"""


def plan(arguments: list[str]) -> int:
    """`jaxgpt plan`."""
    if not arguments or arguments[0].startswith("-"):
        print(PLAN_USAGE, end="")
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    name, *rest = arguments
    own = tuple(f"--{item.name}" for item in fields(PlanOptions))
    flags = [word for flag in own for word in taken(flag, rest)]
    options = parse(PlanOptions, flags, "jaxgpt plan")
    recipe = recipes.recipe(name)
    if not isinstance(recipe, TrainConfig):
        raise ValueError(f"{name} does not pretrain a GPT; plans are of recipes that do")
    config = parse(TrainConfig, rest, "jaxgpt plan RECIPE", recipe, taken=own)
    require(not (options.search and options.mesh), "--search tries all meshes; leave out --mesh")
    if options.topology != "local":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what the compiler logs of its own troubles

    from jaxgpt import plan as planning
    from jaxgpt.models.sharding import mesh_shape

    if not options.search:
        shape = None if options.mesh is None else mesh_shape(options.mesh)
        result, notes = planning.plan(config, options.topology, shape)
        _show(result, name, options, notes)
        return 0 if result.fits else 1
    found = list(islice(planning.search(config, options.topology), SHOWN))
    require(bool(found), f"nothing that was tried fits {options.topology}, by formula; take a larger one")
    if not options.json:
        print("by formula, the fastest that fit:")
        for one in found:
            print(f"  {_spelled(one)}")
    best = found[0]
    for one in found[:TRIED]:
        try:
            best = planning.confirmed(one, options.topology)
        except ValueError as error:
            _show(one, name, options, [f"not compiled: {error}"])
            return 0
        if best.fits:
            break
    _show(best, name, options, [])
    return 0 if best.fits else 1


def _spelled(one: Plan) -> str:
    config = one.setting.config
    model, micro = config.model, config.parallel.gradient_accumulation
    mesh = " x ".join(f"{axis} {size}" for axis, size in one.setting.mesh.items())
    remat = "remat" if model.remat else "no remat"
    return (
        f"{mesh:34} {micro:2} micro-batches  {remat:8}  {model.compute_dtype:8}  {one.bytes / 2**30:6.2f} GiB  "
        f"{one.step_seconds * 1e3:8.1f} ms  {one.tokens_per_second:12,.0f} tokens/s"
    )


def _show(result: Plan, name: str, options: PlanOptions, notes: list[str]) -> None:
    setting, chip = result.setting, result.chip
    config = setting.config
    values: dict[str, Any] = {
        "recipe": name,
        "topology": options.topology,
        "devices": setting.devices,
        "mesh": dict(setting.mesh),
        "source": result.source,
        "batch_size": config.data.batch_size,
        "sequence_length": config.sequence_length,
        "gradient_accumulation": config.parallel.gradient_accumulation,
        "remat": config.model.remat,
        "compute_dtype": config.model.compute_dtype,
        "bytes": {kind: round(size) for kind, size in result.kinds.items()},
        "total_bytes": round(result.bytes),
        "memory": None if chip is None else chip.memory,
        "fits": None if chip is None else result.fits,
        "flops": result.flops,
        "collective_bytes": round(result.collective_bytes),
    }
    if chip is not None:
        values |= {"seconds": result.seconds, "step_seconds": result.step_seconds, "mfu": result.mfu}
        values |= {"tokens_per_second": result.tokens_per_second}
    if options.json:
        print(json.dumps(values | {"notes": notes}))
        return
    for note in notes:
        print(note)
    mesh = " x ".join(f"{axis} {size}" for axis, size in setting.mesh.items())
    own = config.data.batch_size // (setting.shares * values["gradient_accumulation"])
    print(f"{name} on {options.topology}: {setting.devices} x ({mesh}), {result.source}")
    remat = ", remat" if config.model.remat else ""
    batch = f"{config.data.batch_size} x {config.sequence_length} tokens"
    _line("global batch", f"{batch}, {config.model.compute_dtype}{remat}")
    _line("a device computes", f"{own} rows at once, {values['gradient_accumulation']} times")
    for kind, size in result.kinds.items():
        _line(kind, f"{size / 2**30:10.3f} GiB")
    fits = "" if chip is None else f" of {chip.memory / 2**30:.0f}: it {'fits' if result.fits else 'does not fit'}"
    _line("together, a device", f"{result.bytes / 2**30:10.3f} GiB{fits}")
    _line("FLOPs a device", f"{result.flops / 1e12:10.2f} T a step")
    _line("sent by a device", f"{result.collective_bytes / 2**30:10.3f} GiB a step")
    if chip is None:
        _line("time", "of this machine's devices the peaks are not known")
    elif result.fits:
        parts = ", ".join(f"{limit} {seconds * 1e3:.1f}" for limit, seconds in result.seconds.items())
        _line("a step, at least", f"{result.step_seconds * 1e3:10.1f} ms  ({parts})")
        _line("MFU, at most", f"{result.mfu:10.1%}")
        _line("tokens/s, at most", f"{result.tokens_per_second:10,.0f}")


def _line(what: str, value: str) -> None:
    print(f"  {what:36}{value}")
