"""Which parameters of a pretrained model change: the tree cut into those that do and those that stay, and rejoined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.config import AdaptConfig
from jaxgpt.models.blocks import Parameters
from jaxgpt.models.heads import HEAD
from jaxgpt.models.lora import ADAPTER


def separate(parameters: Parameters, adapt: AdaptConfig) -> tuple[Parameters, Parameters]:
    """Cut parameters into those that are trained and those that stay as they are (see `AdaptConfig.method`).

    Of the last K layers, the blocks' stacked leaves are cut in two. `combine` makes the same tree of both again.
    """
    if adapt.method == "all":
        return parameters, {}
    chosen = {HEAD} | ({ADAPTER} if adapt.method == "lora" else set())
    if adapt.method == "last":
        chosen.add("final_norm")
    trained = {name: leaf for name, leaf in parameters.items() if name in chosen}
    frozen = {name: leaf for name, leaf in parameters.items() if name not in chosen}
    if adapt.method == "last":
        last = adapt.last_layers
        trained["blocks"] = jax.tree.map(lambda leaf: leaf[-last:], parameters["blocks"])
        frozen["blocks"] = jax.tree.map(lambda leaf: leaf[:-last], parameters["blocks"])
    return trained, frozen


def combine(trained: Parameters, frozen: Parameters) -> Parameters:
    """The tree that `separate` cut in two."""
    whole: dict[str, Any] = {**frozen}
    for name, leaf in trained.items():
        whole[name] = _stack(frozen[name], leaf) if name in frozen else leaf
    return whole


def _stack(below: Any, above: Any) -> Any:
    if isinstance(below, Mapping):
        return {name: _stack(below[name], above[name]) for name in below}
    return jnp.concatenate([below, above])
