"""The same step on one device, on several by `jax.pmap`, over a mesh by `jit`, or to the same bits on any number."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.metadata
import math
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxgpt.config import ParallelConfig
from jaxgpt.data.batches import WHOLE, Share
from jaxgpt.hosts import whole
from jaxgpt.models.sharding import BATCH, batch_sharding, make_mesh, mesh_shape, state_shardings
from jaxgpt.training.step import Step, identity
from jaxgpt.training.strict import compile_strict, place_shards

AXIS = "data"
Strategy = Literal["single", "pmap", "mesh", "strict"]


@dataclass(frozen=True)
class Layout:
    """On which devices a step runs and how; `notes` is what the user should know about the choice."""

    strategy: Strategy
    devices: tuple[jax.Device, ...]
    notes: tuple[str, ...] = ()
    shape: Mapping[str, int] = field(default_factory=dict)
    """devices along each axis of a mesh, see `models.sharding`; those that it does not name have one"""
    shards: int = 1
    """strict: parts of every batch, each computed by itself, see `training.strict`"""

    @property
    def share(self) -> Share:
        """The rows of every global batch that this host reads: those that its devices work on."""
        here = jax.process_index()
        return self.share_of([device for device in self.devices if device.process_index == here])

    def share_of(self, devices: Collection[jax.Device]) -> Share:
        """The rows of every global batch that some devices, side by side, work on."""
        if self.strategy != "mesh":
            return WHOLE
        tensor = self.shape.get("tensor", 1)  # so many devices after another work on the same rows
        parts = [place // tensor for place, device in enumerate(self.devices) if device in devices]
        return Share(min(parts), max(parts) + 1, len(self.devices) // tensor)

    @property
    def mesh(self) -> Mesh:
        """The devices as a mesh; all along data where no shape is given."""
        return make_mesh(self.shape or {AXIS: len(self.devices)}, self.devices)

    def shardings(self, tree: Any) -> Any:
        """How each leaf of a state lies: whole on every device, with no replica axis; over a mesh, cut by its rules."""
        if self.strategy == "mesh":
            return state_shardings(tree, self.mesh)
        one = SingleDeviceSharding(self.devices[0])
        whole = one if self.strategy in ("single", "strict") else NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda leaf: whole, tree)

    def initial(self, make: Callable[[], Any]) -> Any:
        """What `make` makes, lying as it is to; over a mesh it never lies whole on one device."""
        if self.strategy == "mesh":
            return jax.jit(make, out_shardings=self.shardings(jax.eval_shape(make)))()
        made = make()
        return jax.device_put(made, self.shardings(made))

    def place(self, batch: dict[str, np.ndarray]) -> Any:
        """Give each device its rows of a global batch, `batch` being this host's share, as `compile` takes it."""
        if self.strategy == "strict":
            return place_shards(batch, self.devices, self.shards)
        if self.strategy == "pmap":
            # pmap itself sends row i of the leading axis to device i.
            return {name: x.reshape(len(self.devices), -1, *x.shape[1:]) for name, x in batch.items()}
        if self.strategy == "mesh":
            share, sharding = self.share, batch_sharding(self.mesh)
            times, own = share.parts, share.stop - share.first

            def spread(x: np.ndarray) -> jax.Array:
                shape = (len(x) * times // own, *x.shape[1:])
                return jax.make_array_from_process_local_data(sharding, x, shape)

            return {name: spread(x) for name, x in batch.items()}
        return batch  # the program itself takes it to where the state lies, with half the work of `device_put`

    def compile(self, step: Callable[..., Any], *, scalars: int = 0, donate: bool = False) -> Callable[..., Any]:
        """Turn `step(state, batch, *scalars, reduce=)` into a program for these devices.

        State and scalars go in whole and come out whole (`in_axes=None`, `out_axes=None`): the same pytree whatever
        the strategy; over a mesh each leaf as `shardings` says. With `donate` the old state's memory is reused and the
        old state is gone. With the strategy strict, `step` is a `Step`.
        """
        if self.strategy == "strict":
            assert isinstance(step, Step)
            return compile_strict(step, self.devices, donate)
        donated = (0,) if donate else ()
        if self.strategy == "single":
            return jax.jit(functools.partial(step, reduce=identity), donate_argnums=donated)
        if self.strategy == "mesh":
            mesh = self.mesh

            def lying(*inputs: Any) -> Any:
                with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # which the models' constraints look at
                    results = step(*inputs, reduce=identity)
                return jax.lax.with_sharding_constraint(results, self.shardings(results))

            return jax.jit(lying, donate_argnums=donated)
        return jax.pmap(
            functools.partial(step, reduce=functools.partial(jax.lax.psum, axis_name=AXIS)),
            axis_name=AXIS,
            in_axes=(None, 0) + (None,) * scalars,
            out_axes=None,
            devices=self.devices,
            donate_argnums=donated,
        )


@contextlib.contextmanager
def compiling(program: Callable[..., Any], *arguments: Any) -> Iterator[None]:
    """Compile a jitted program for these arguments in a thread, while what is in this context is done.

    Others (of pmap, of the strategy strict) are left alone: a call does not find what was compiled of them before.
    What goes wrong goes wrong again where the program is called. Ctrl-C does not wait for the compiler.
    """
    if not isinstance(program, jax.stages.Wrapped):
        yield
        return

    done = threading.Event()  # a thread that was waited for in vain says that it has ended (Python 3.11)

    def compile_program() -> None:
        with contextlib.suppress(Exception):
            program.lower(*arguments).compile()
        done.set()

    threading.Thread(target=compile_program, daemon=True).start()
    atexit.register(_leave_unless, done)
    try:
        yield
    except Exception:
        done.wait()
        raise
    done.wait()


def _leave_unless(done: threading.Event) -> None:
    """End the process before Python goes away under a compiler that still runs, as it does after Ctrl-C alone."""
    if not done.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)


def on_one_device(tree: Any) -> Any:
    """Every array whole on a local device, for what is not spread over devices, such as decoding."""

    def local(x: jax.Array) -> jax.Array:
        x = whole(x)  # what other hosts have; of one host an array stays cut as it is
        return x.addressable_data(0) if x.is_fully_replicated else jax.device_put(x, jax.local_devices()[0])

    return jax.tree.map(local, tree)


def choose_layout(
    config: ParallelConfig,
    batch_size: int,
    name: str = "data.batch-size",
    strict: bool = False,
    hosts: Sequence[Sequence[jax.Device]] | None = None,
) -> Layout:
    """Choose devices and strategy for global batches of `batch_size` sequences, or of a multiple of it.

    `auto` takes a mesh of the devices of all hosts; on one host pmap, or the one device there is. Of each host it takes
    the largest number of devices that divides the batch.

    Args:
        name: the setting that `batch_size` is.
        strict: whether the bits are to be the same on any number of devices (see `training.strict`).
        hosts: the devices of each host, as many everywhere (default: the local ones, of one host).

    Raises:
        ValueError: more devices asked for than there are, or an explicit strategy whose devices (times the
            accumulation steps) do not divide the batch, or which is for one host where there are several.
    """
    hosts = hosts or [jax.local_devices()]
    accumulation, several = config.gradient_accumulation, len(hosts) > 1
    if config.devices is not None and config.devices > len(hosts[0]):
        raise ValueError(f"parallel.devices is {config.devices}, but there are {len(hosts[0])} local devices")
    wanted = config.devices or len(hosts[0])
    if batch_size % accumulation:
        raise ValueError(f"parallel.gradient-accumulation {accumulation} does not divide {name} {batch_size}")
    if several and config.strategy not in ("auto", "mesh"):
        raise ValueError(
            f"parallel.strategy {config.strategy} is for one host, and there are {len(hosts)}: leave it out, or take "
            "mesh"
        )
    if strict:
        return _strict_layout(config, [own[:wanted] for own in hosts], batch_size, name)
    if config.mesh is not None:
        # With strategy auto, to name a mesh is to ask for it.
        return _mesh_layout(config.mesh, [own[:wanted] for own in hosts], batch_size, accumulation, name)
    if config.strategy == "single":
        if config.devices not in (None, 1):
            raise ValueError(f"parallel.strategy single runs on one device, not {config.devices}")
        return Layout("single", (hosts[0][0],))
    fitting = [n for n in range(1, wanted + 1) if batch_size % (n * len(hosts) * accumulation) == 0]
    if config.strategy == "auto" and fitting:
        used = fitting[-1]
        each = " of each host" if several else ""
        notes = (f"{name} {batch_size} does not divide over {wanted} devices{each}; using {used}",)
        strategy: Strategy = "mesh" if several else "pmap" if used > 1 else "single"
        return Layout(strategy, _side_by_side(hosts, used), notes if used < wanted else ())
    if wanted not in fitting:
        rows = f"{wanted * len(hosts)} devices" + (f" x {accumulation} micro-batches" if accumulation > 1 else "")
        raise ValueError(
            f"{name} {batch_size} does not divide over {rows}; change it, or parallel.devices, "
            "or take parallel.strategy auto"
        )
    return Layout("pmap" if config.strategy == "pmap" else "mesh", _side_by_side(hosts, wanted))


def _side_by_side(hosts: Sequence[Sequence[jax.Device]], each: int) -> tuple[jax.Device, ...]:
    """So many devices of each host, those of a host one after another: a host then reads one run of rows."""
    return tuple(device for own in hosts for device in own[:each])


def _mesh_layout(
    spelled: str, hosts: Sequence[Sequence[jax.Device]], batch_size: int, accumulation: int, name: str
) -> Layout:
    """A mesh of the first devices of each host that it needs."""
    shape = mesh_shape(spelled)
    needed, there = math.prod(shape.values()), sum(map(len, hosts))
    if needed > there:
        raise ValueError(f"parallel.mesh {spelled} needs {needed} devices, but there are {there} to use")
    if needed % len(hosts):
        raise ValueError(f"parallel.mesh {spelled} needs {needed} devices, as many of each of {len(hosts)} hosts")
    each, tensor = needed // len(hosts), shape.get("tensor", 1)
    if len(hosts) > 1 and each % tensor and tensor % each:
        raise ValueError(
            f"parallel.mesh {spelled} has {tensor} devices along tensor, which neither divide the {each} of a host nor "
            "are a multiple of them"
        )
    shares = math.prod(shape.get(axis, 1) for axis in BATCH)
    if batch_size % (shares * accumulation):
        rows = f"{shares} devices" + (f" x {accumulation} micro-batches" if accumulation > 1 else "")
        raise ValueError(f"{name} {batch_size} does not divide over the {rows} of parallel.mesh {spelled}; change one")
    return Layout("mesh", _side_by_side(hosts, each), shape=shape)


def _strict_layout(config: ParallelConfig, hosts: Sequence[Sequence[jax.Device]], batch_size: int, name: str) -> Layout:
    """So many virtual shards on as many of the devices as there are shards for."""
    if len(hosts) > 1:
        raise ValueError(
            f"strict-reproducibility runs on the devices of one host, and there are {len(hosts)} processes"
        )
    devices = hosts[0]
    shards, accumulation = config.virtual_shards, config.gradient_accumulation
    if batch_size % (shards * accumulation):
        rows = f"parallel.virtual-shards {shards}" + (f" x {accumulation} micro-batches" if accumulation > 1 else "")
        raise ValueError(
            f"strict-reproducibility: {name} {batch_size} does not divide into the {rows}; change one of them"
        )
    used = tuple(devices[: 1 if config.strategy == "single" else shards])
    notes = (
        f"strict reproducibility: {shards} virtual shards on {len(used)} of {len(devices)} devices; the same bits on "
        f"any number of devices of this kind, {used[0].device_kind}, with jaxlib {importlib.metadata.version('jaxlib')}"
        + ("" if used[0].platform == "cpu" else " (shown on CPUs; not tried on this kind)"),
    )
    return Layout("strict", used, notes, shards=shards)
