"""Parameters for tests, drawn by NumPy: to compile what draws a model's takes longer than most of what is tested."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import GPTConfig
from jaxgpt.models.gpt import init_parameters


def drawn(init: Callable[[jax.Array], Any], seed: int = 0, std: float = 0.5) -> Any:
    """Of the shapes that `init` makes of a key; biases and norms too are none that have no effect."""
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.array(random.normal(path[-1].key == "scale", std, leaf.shape), leaf.dtype), shapes
    )


def random_gpt(config: GPTConfig, seed: int = 0) -> Any:
    """The parameters of a GPT."""
    return drawn(functools.partial(init_parameters, config), seed)
