"""Task heads: one linear layer on what a GPT makes of its last token (Radford et al. 2018, section 3.2 and 3.3)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxgpt.config import GPTConfig
from jaxgpt.models.attention import dropout
from jaxgpt.models.blocks import Parameters

HEAD = "task_head"


def init_head(config: GPTConfig, outputs: int, key: Key[Array, ""]) -> Parameters:
    """A new head (D, C): normal, of the model's initial standard deviation. The paper's has no bias."""
    std = config.init_std or config.width**-0.5
    return {"kernel": std * jax.random.normal(key, (config.width, outputs), config.parameter_dtype)}


def head_logits(
    head: Parameters,
    hidden: Float[Array, "B O T D"],
    last: Int[Array, "B O"],
    both_orders: bool = False,
    dropout_rate: float = 0.0,
    dropout_keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B C"]:
    """Logits of an example, in at least float32, from O sequences a row: hidden states at `last`, times the head.

    Args:
        head: `kernel` (D, C), and `bias` (C,) if it has one.
        hidden: after the model's last norm.
        last: where each sequence's extract token stands. Nothing is inferred from ids.
        both_orders: the O sequences are the orders of one pair, whose features are added up (similarity). Otherwise,
            where O > 1, they are options: C = O, and the head has one column.
        dropout_keys: a key for each row; None for evaluation.
    """
    features = jnp.take_along_axis(hidden, last[:, :, None, None], axis=2)[:, :, 0]
    if both_orders:
        features = features.sum(axis=1, keepdims=True)
    features = dropout(features, dropout_rate, dropout_keys)
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    logits = jnp.matmul(features, head["kernel"].astype(features.dtype), preferred_element_type=dtype)
    if "bias" in head:
        logits = logits + head["bias"].astype(dtype)
    return logits[:, 0] if logits.shape[1] == 1 else logits[..., 0]


def shrink_vocabulary(parameters: Parameters, size: int) -> Parameters:
    """Parameters of a GPT with the first `size` rows of the token embedding alone (and of the head)."""
    embedding = {"embedding": parameters["token_embedding"]["embedding"][:size]}
    whole = {**parameters, "token_embedding": embedding}
    return whole | {"head": parameters["head"][:size]} if "head" in parameters else whole


def grow_vocabulary(
    parameters: Parameters, size: int, fresh: Int[Any, " n"], std: float, key: Key[Array, ""]
) -> Parameters:
    """Parameters of a GPT with at least `size` rows of the token embedding (and of the head, if it has its own).

    The rows `fresh`, of tokens that the model has never seen, are drawn anew: normal, of standard deviation `std`.
    """

    def grown(table: Float[Array, "V D"], key: Key[Array, ""]) -> Float[Array, "W D"]:
        table = jnp.pad(table, ((0, max(0, size - len(table))), (0, 0)))
        return table.at[fresh].set(std * jax.random.normal(key, (len(fresh), table.shape[1]), table.dtype))

    embedding = {"embedding": grown(parameters["token_embedding"]["embedding"], key)}
    whole = {**parameters, "token_embedding": embedding}
    return whole | {"head": grown(parameters["head"], jax.random.fold_in(key, 1))} if "head" in parameters else whole
