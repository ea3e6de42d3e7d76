"""Low-rank adapters (Hu et al. 2021): W x becomes W x + alpha / r B A x, and of it only A and B are trained.

An adapter is a tree of its own beside the parameters of a GPT, under the key `adapter`: for each matrix it changes,
`lora_a` (L, in, r) and `lora_b` (L, r, out), which begins at zero.
"""

from __future__ import annotations

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxgpt.config import AdaptConfig, GPTConfig, LoraTarget
from jaxgpt.models.blocks import Parameters
from jaxgpt.models.layers import features_before

ADAPTER = "adapter"
# Where each matrix lies in a block.
PLACES: dict[LoraTarget, tuple[str, str]] = {
    "qkv": ("attention", "qkv"),
    "out": ("attention", "out"),
    "up": ("mlp", "up"),
    "down": ("mlp", "down"),
}


def init_adapter(config: GPTConfig, adapt: AdaptConfig, key: Key[Array, ""]) -> Parameters:
    """A new adapter, which changes nothing yet: A uniform in +-1 / sqrt(in), as the authors' and PEFT's, B zero."""
    width, hidden, rank = config.width, config.hidden_width, adapt.rank
    kv_width = config.head_width * (config.kv_heads or config.heads)
    sides: dict[LoraTarget, tuple[int, int]] = {
        "qkv": (width, width + 2 * kv_width), "out": (width, width),
        "up": (width, features_before(config.activation, hidden)), "down": (hidden, width),
    }  # fmt: skip
    blocks: dict[str, Any] = {}
    for number, target in enumerate(sorted(adapt.targets)):
        part, name = PLACES[target]
        inner, outer = sides[target]
        bound = 1.0 / math.sqrt(inner)
        a = jax.random.uniform(
            jax.random.fold_in(key, number), (config.layers, inner, rank), config.parameter_dtype, -bound, bound
        )
        b = jnp.zeros((config.layers, rank, outer), config.parameter_dtype)
        blocks.setdefault(part, {})[name] = {"lora_a": a, "lora_b": b}
    return {"blocks": blocks}


def attach(parameters: Parameters, adapt: AdaptConfig) -> Parameters:
    """Put an adapter where the layers of the model look for it, scaled by alpha / r; without one, nothing changes."""
    if ADAPTER not in parameters:
        return parameters
    scale = adapt.alpha / adapt.rank
    blocks = dict(parameters["blocks"])
    for part, name, leaves in _changed(parameters):
        own = dict(blocks[part])
        own[name] = {**own[name], "lora_a": leaves["lora_a"], "lora_b": leaves["lora_b"] * scale}
        blocks[part] = own
    return {name: leaf for name, leaf in parameters.items() if name != ADAPTER} | {"blocks": blocks}


def fold(parameters: Parameters, adapt: AdaptConfig) -> Parameters:
    """Add an adapter's products into the matrices: a model like any other, without the adapter."""
    if ADAPTER not in parameters:
        return parameters
    scale = adapt.alpha / adapt.rank
    blocks = dict(parameters["blocks"])
    for part, name, leaves in _changed(parameters):
        own = dict(blocks[part])
        kernel = own[name]["kernel"]
        wide = jnp.promote_types(kernel.dtype, jnp.float32)
        product = jnp.einsum("Lir,Lro->Lio", *(leaves[leaf].astype(wide) for leaf in ("lora_a", "lora_b")))
        own[name] = {**own[name], "kernel": (kernel.astype(wide) + scale * product).astype(kernel.dtype)}
        blocks[part] = own
    return {name: leaf for name, leaf in parameters.items() if name != ADAPTER} | {"blocks": blocks}


def _changed(parameters: Parameters) -> list[tuple[str, str, dict[str, Array]]]:
    """Part, name and leaves of each matrix that the adapter changes."""
    blocks = cast(dict[str, Any], parameters[ADAPTER]["blocks"])
    return [(part, name, leaves) for part, matrices in blocks.items() for name, leaves in matrices.items()]
