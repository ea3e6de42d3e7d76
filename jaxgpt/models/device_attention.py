"""Attention by a vendor's kernels: cuDNN on NVIDIA, splash attention on TPU. Dimension letters: see `attention.py`.

What they compute equals `attention.reference_attention`, gradients included, up to the rounding of their dtype.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Segments = tuple[Int[Array, "B T"], Int[Array, "B S"]] | None


def cudnn_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    scale: Float[Array, ""],
    causal: bool,
    segments: Segments,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Flash attention of cuDNN, for bfloat16 and float16 on NVIDIA GPUs (Dao et al. 2022).

    Raises:
        ValueError, NotImplementedError: no such GPU, or a shape or dtype that cuDNN does not take (JAX's own).
    """
    mask = None if segments is None else segments[0][:, None, :, None] == segments[1][:, None, None, :]
    query = query * scale.astype(query.dtype)  # the kernel's own scale is a constant, ours may differ by layer
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, scale=1.0, is_causal=causal, implementation="cudnn",
        local_window_size=None if window is None or not causal else (window - 1, 0),
    )  # fmt: skip


def splash_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    scale: Float[Array, ""],
    causal: bool,
    segments: Segments,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Block-sparse flash attention in Pallas, for TPU: blocks above the diagonal are not computed.

    T and S must be multiples of 128, the head width of 64. On another backend the kernel is interpreted, slowly.

    Raises:
        ValueError, NotImplementedError: a shape that it does not take (JAX's own).
    """
    # Importing the kernels takes half a second, which only a TPU should pay.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (query.shape[1], key.shape[1])
    one: masks.Mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    if causal and window is not None:
        one = masks.LocalMask(shape, (window - 1, 0), offset=0)
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([one] * query.shape[2]), interpret=jax.default_backend() != "tpu"
    )
    numbers = None if segments is None else splash.SegmentIds(*segments)
    first = [x.swapaxes(1, 2) for x in (query * scale.astype(query.dtype), key, value)]
    heads = jax.vmap(kernel)(*first, segment_ids=numbers) if numbers is not None else jax.vmap(kernel)(*first)
    return jnp.swapaxes(heads, 1, 2)
