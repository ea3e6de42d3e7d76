"""The same step on one device, on several by `jax.pmap`, or over a mesh by `jit`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxgpt.config import ParallelConfig
from jaxgpt.training.step import identity

AXIS = "data"


@dataclass(frozen=True)
class Layout:
    """On which devices a step runs and how; `notes` is what the user should know about the choice."""

    strategy: Literal["single", "pmap", "mesh"]
    devices: tuple[jax.Device, ...]
    notes: tuple[str, ...] = ()

    @property
    def replicated(self) -> jax.sharding.Sharding:
        """How the state lies: whole on every device, with no replica axis in its shapes."""
        if self.strategy == "single":
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(self._mesh, PartitionSpec())

    @property
    def _mesh(self) -> jax.sharding.Mesh:
        return jax.sharding.Mesh(np.array(self.devices), (AXIS,), axis_types=(AxisType.Auto,))

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Give each device its rows of a global batch."""
        if self.strategy == "pmap":
            # pmap itself sends row i of the leading axis to device i.
            return {name: x.reshape(len(self.devices), -1, *x.shape[1:]) for name, x in batch.items()}
        if self.strategy == "mesh":
            return jax.device_put(batch, NamedSharding(self._mesh, PartitionSpec(AXIS)))
        return jax.device_put(batch, self.replicated)

    def compile(self, step: Callable[..., Any], *, scalars: int = 0, donate: bool = False) -> Callable[..., Any]:
        """Turn `step(state, batch, *scalars, reduce=)` into a program for these devices.

        State and scalars go in whole and come out whole (`in_axes=None`, `out_axes=None`): the same pytree whatever
        the strategy. With `donate` the old state's memory is reused and the old state is gone.
        """
        donated = (0,) if donate else ()
        if self.strategy != "pmap":
            return jax.jit(functools.partial(step, reduce=identity), donate_argnums=donated)
        return jax.pmap(
            functools.partial(step, reduce=functools.partial(jax.lax.psum, axis_name=AXIS)),
            axis_name=AXIS,
            in_axes=(None, 0) + (None,) * scalars,
            out_axes=None,
            devices=self.devices,
            donate_argnums=donated,
        )


def choose_layout(config: ParallelConfig, batch_size: int, name: str = "data.batch-size") -> Layout:
    """Choose devices and strategy for global batches of `batch_size` sequences, or of a multiple of it.

    `name` is the setting that it is.

    `auto` takes pmap with the largest number of local devices that divides the batch, or the one device there is.

    Raises:
        ValueError: more devices asked for than there are, or an explicit strategy whose devices (times the
            accumulation steps) do not divide the batch.
    """
    local = jax.local_devices()
    accumulation = config.gradient_accumulation
    if config.devices is not None and config.devices > len(local):
        raise ValueError(f"parallel.devices is {config.devices}, but there are {len(local)} local devices")
    wanted = config.devices or len(local)
    if batch_size % accumulation:
        raise ValueError(f"parallel.gradient-accumulation {accumulation} does not divide {name} {batch_size}")
    if config.strategy == "single":
        if config.devices not in (None, 1):
            raise ValueError(f"parallel.strategy single runs on one device, not {config.devices}")
        return Layout("single", (local[0],))
    if config.strategy == "auto":
        used = max(n for n in range(1, wanted + 1) if batch_size % (n * accumulation) == 0)
        notes = (f"{name} {batch_size} does not divide over {wanted} devices; using {used}",) if used < wanted else ()
        return Layout("pmap" if used > 1 else "single", tuple(local[:used]), notes)
    if batch_size % (wanted * accumulation):
        rows = f"{wanted} devices" + (f" x {accumulation} micro-batches" if accumulation > 1 else "")
        raise ValueError(
            f"{name} {batch_size} does not divide over {rows}; change it, or parallel.devices, "
            "or take parallel.strategy auto"
        )
    return Layout(config.strategy, tuple(local[:wanted]))
