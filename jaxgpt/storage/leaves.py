"""The leaves of a tree of arrays: their names, and checksums of what they hold."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jaxgpt.hosts import is_whole, whole


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path, as "blocks/mlp/up/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def checksums(tree: Any) -> dict[str, int]:
    """CRC-32 of the bytes of every leaf, by its path in the tree."""
    leaves = by_path(tree)
    with ThreadPoolExecutor() as pool:  # training waits for them, and zlib computes without the interpreter's lock
        # Arrays of which other hosts have parts are gathered one after another, on all hosts in the same order.
        each: Any = pool.map if all(map(is_whole, leaves.values())) else map
        return dict(zip(leaves, each(_checksum, leaves.values()), strict=True))


def _checksum(leaf: Any) -> int:
    # Viewed as bytes first: the buffer protocol does not know bfloat16.
    return zlib.crc32(np.ascontiguousarray(whole(leaf)).reshape(-1).view(np.uint8).data)
