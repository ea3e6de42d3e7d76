"""The same bits on any number of devices: one program for each part of a batch, their sums added in one order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.training.step import Step


def place_shards(batch: dict[str, np.ndarray], devices: Sequence[jax.Device], shards: int) -> list[dict[str, Any]]:
    """Cut a global batch into `shards` equal parts, its virtual shards; each device gets neighbours of about the same
    number."""
    parts = {name: np.split(x, shards) for name, x in batch.items()}
    return [
        jax.device_put({name: x[number] for name, x in parts.items()}, devices[number * len(devices) // shards])
        for number in range(shards)
    ]


def compile_strict(step: Step, devices: Sequence[jax.Device], donate: bool) -> Callable[..., Any]:
    """Turn a step into `program(state, shards, *scalars)`, of which no bit depends on `devices`.

    XLA computes a sum in another order when its shape, or the program around it, is another. So the sums of a shard are
    a program of their own, for one device, of a shape that does not depend on how many there are; it runs once for each
    shard. Two trees are added by another, leaf by leaf, in the order of a binary tree over the shards; what follows is
    a third, on the first device, where the state lies. All are dispatched without waiting, so devices work at the same
    time, and none waits for another in a collective.
    """
    sums = jax.jit(step.sums)
    add = jax.jit(_add, donate_argnums=0)
    finish = jax.jit(step.finish, donate_argnums=(0,) if donate else ())

    def program(state: Any, shards: Sequence[dict[str, Any]], *scalars: Any) -> Any:
        read = step.reads(state)
        copies = {device: jax.device_put(read, device) for device in devices}

        def total(parts: Sequence[dict[str, Any]]) -> tuple[Any, jax.Device]:
            """The sums of all parts, and where they lie."""
            if len(parts) == 1:
                (device,) = parts[0]["row"].devices()
                return sums(copies[device], parts[0]), device
            half = (len(parts) + 1) // 2
            (left, here), (right, _) = total(parts[:half]), total(parts[half:])
            return add(left, jax.device_put(right, here)), here

        return finish(state, total(shards)[0], *scalars)

    return program


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)
