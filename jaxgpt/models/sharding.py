"""How parameters and activations lie on a mesh: one table from what an axis means to the mesh axis it is cut along."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

# The axes of a mesh, outermost first. Rows of a batch are spread over the first two; parameters are cut along the last
# two, and gathered (fsdp: Rajbhandari et al. 2020) or computed with in parts (tensor: Shoeybi et al. 2019).
AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": BATCH,
    "embed": "fsdp",
    "heads": "tensor",
    "hidden": "tensor",
    "vocabulary": "tensor",
    "layers": None,
    "length": None,
    "width": None,
}
# Parameters by the end of their path. Vectors of width D (norms, the biases of what is added to the stream) stay whole.
LOGICAL_AXES: Mapping[str, tuple[str | None, ...]] = {
    "token_embedding/embedding": ("vocabulary", "embed"),
    "position_embedding/embedding": (None, "embed"),
    "qkv/kernel": ("layers", "embed", "heads"),
    "qkv/bias": ("layers", "heads"),
    "query/kernel": ("layers", "embed", "heads"),
    "query/bias": ("layers", "heads"),
    "key_value/kernel": ("layers", "embed", "heads"),
    "key_value/bias": ("layers", "heads"),
    "out/kernel": ("layers", "heads", "embed"),
    "up/kernel": ("layers", "embed", "hidden"),
    "up/bias": ("layers", "hidden"),
    "down/kernel": ("layers", "hidden", "embed"),
}
HEAD = ("vocabulary", "embed")


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of all `devices`, so many along each axis; axes that are not named have one.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = [shape.get(axis, 1) for axis in AXES]
    if math.prod(sizes) != len(devices):
        spelled = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ValueError(f"a mesh of {spelled} has {math.prod(sizes)} places, but there are {len(devices)} devices")
    return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(text: str) -> dict[str, int]:
    """Read `data=2,fsdp=4`.

    Raises:
        ValueError: it is not of this form, or names an axis that there is not, or one twice.
    """
    shape: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh {text!r}: {part.strip()!r} is not AXIS=SIZE with an axis of {', '.join(AXES)}")
        if axis in shape:
            raise ValueError(f"mesh {text!r} names the axis {axis} twice")
        shape[axis] = int(size)
    return shape


def state_shardings(state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The sharding of each leaf of a state (arrays or their shapes), parameters and the optimiser's moments alike.

    Raises:
        ValueError: an axis of a parameter does not divide by the mesh axis that it is cut along, or two of its axes
            are to be cut along the same one; it is named.
    """

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]
        logical = HEAD if names[-1:] == ["head"] else LOGICAL_AXES.get("/".join(names[-2:]), ())
        if len(logical) != len(leaf.shape):
            return NamedSharding(mesh, PartitionSpec())
        axes = [None if name is None else RULES[name] for name in logical]
        for twice in (axis for axis in AXES if axes.count(axis) > 1):
            raise ValueError(f"{'/'.join(names[-2:])} is to be cut along the mesh axis {twice} twice: {logical}")
        for size, axis in zip(leaf.shape, axes, strict=True):
            if isinstance(axis, str) and size % mesh.shape[axis]:
                raise ValueError(
                    f"{'/'.join(names[-2:])} {leaf.shape} cannot be cut along the mesh axis {axis}: "
                    f"{mesh.shape[axis]} does not divide {size}; take another --parallel.mesh or size"
                )
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(of_leaf, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows are spread over all devices but those that share a row's work (tensor)."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Say how `x` is to lie, by what its axes mean; nothing happens where no mesh is set (see `jax.set_mesh`).

    Without it XLA would let the stream be cut as the parameters are, and add up every product over the devices.
    """
    if not _mesh_is_set():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(RULES[axis] for axis in axes)))


def add_up_rows(sums: Callable[..., Any], whole: Any, *rows: jax.Array) -> Any:
    """`sums(whole, *rows)`, which adds something up over rows: each device for its own, and all together once.

    Where a loop adds up gradients of `whole`, XLA would add them up over the devices in every turn.
    """
    if not _mesh_is_set() or math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in BATCH) == 1:
        return sums(whole, *rows)

    def own(whole: Any, *rows: jax.Array) -> Any:
        return jax.lax.psum(sums(whole, *rows), BATCH)

    by_rows = (PartitionSpec(BATCH),) * len(rows)
    apart = jax.shard_map(
        own, in_specs=(PartitionSpec(), *by_rows), out_specs=PartitionSpec(), axis_names=set(BATCH), check_vma=False
    )
    return apart(whole, *rows)


def _mesh_is_set() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and set(AXES) <= set(mesh.axis_names)
