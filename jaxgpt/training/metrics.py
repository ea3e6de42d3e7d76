"""What a model costs: parameters, floating-point operations, bytes; and how much of a chip it uses."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.config import GPTConfig, TrainConfig

# Dense peak of one chip in FLOP/s, from the makers' data sheets: bfloat16, without sparsity. Keys are looked up as
# parts of `device_kind`, in this order.
PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "TPU v6": 918e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "TPU v3": 123e12,
    "TPU v2": 45e12,
}


def count_parameters(parameters: Any) -> int:
    """Number of scalars in a tree of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters))


def training_flops_per_token(config: GPTConfig, sequence_length: int, vocab_size: int) -> int:
    """Floating-point operations of one token's forward and backward pass: 6 N + 12 L T D (Chowdhery et al. 2022, B).

    N counts the parameters of the matrix products: blocks and output head, not embeddings that are only looked up.
    Attention is counted in full (12 L T D), as is customary, although a causal kernel needs about half.
    """
    d, f = config.width, config.hidden_width
    kv, gates = config.head_width * (config.kv_heads or config.heads), 2 if config.activation == "swiglu" else 1
    products = config.layers * (2 * d * d + 2 * d * kv + (1 + gates) * d * f) + vocab_size * d
    return 6 * products + 12 * config.layers * sequence_length * d


def estimate_training_bytes(config: TrainConfig, parameters: int, vocab_size: int, devices: int) -> int:
    """Bytes one device needs in training, by formula (not measured), as a first orientation.

    State: parameters, two moments and a gradient. Activations kept for the backward pass, for each token and layer:
    8 D of the block's vectors, 2 F of the feed-forward layer, and N T / 2 attention weights; with remat one D a layer.
    Logits and their gradient: 2 V.
    """
    model, length = config.model, config.sequence_length
    tokens = config.tokens_per_step // (devices * config.parallel.gradient_accumulation)
    parameter_bytes, compute_bytes = (jnp.dtype(d).itemsize for d in (model.parameter_dtype, model.compute_dtype))
    layer = 8 * model.width + 2 * model.hidden_width + model.heads * length // 2
    kept = model.layers * model.width + layer if model.remat else model.layers * layer
    return 4 * parameters * parameter_bytes + tokens * (kept * compute_bytes + 2 * vocab_size * 4)


def chip_peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of a known accelerator (see `PEAK_FLOPS`), or None: on CPU it has to be measured."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device.device_kind), None)
