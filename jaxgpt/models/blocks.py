"""The Transformer block, and a stack of them: encoder, decoder, GPT. Dimension letters: see `attention.py`."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgpt.config import BlockConfig, Weights
from jaxgpt.models.attention import Scale, dropout, fold_in
from jaxgpt.models.cache import DecoderCache, KVCache
from jaxgpt.models.compact import compact
from jaxgpt.models.layers import MLP, CrossAttention, MultiHeadAttention
from jaxgpt.models.norms import Norm
from jaxgpt.models.sharding import constrain

Parameters = Mapping[str, Any]


class Block(nn.Module):
    """One Transformer block: sublayers, each inside a residual sum and a layer norm.

    x + attention(norm(x)), then x + mlp(norm(x)); with `norm="post"`, norm(x + ...) instead. Three kinds:

    - of GPT: causal self-attention, within each of the documents that `segments` numbers, and the feed-forward layer.
    - of an encoder, told by a `mask` without `cross`: the same, and every position sees all that are real.
    - of a decoder (`cross`): causal self-attention, then attention to a `source` whose real positions `mask` names.

    `layer` counts blocks from 0; the dropout keys are the same for all. It is also the step of a scan over layers: `x`
    is carried and nothing else comes out, since there is no cache then.
    """

    config: BlockConfig
    output_std: float | None
    cross: bool = False
    window: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer: int | Int[Array, ""],
        dropout_keys: Key[Array, " B"] | None,
        cache: KVCache | None = None,
        source: Float[Array, "G S D"] | None = None,
        mask: Bool[Array, "G S"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "#B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        c = self.config
        keys = fold_in(dropout_keys, layer)
        weights_dropout = c.dropout if c.attention_dropout is None else c.attention_dropout
        scale = attention_scale(c, layer)
        dtypes = (c.parameter_dtype, c.compute_dtype)
        stds = (c.init_std, self.output_std)
        before = c.norm == "pre"

        norm = layer_norm(c, "attention_norm")
        attention = MultiHeadAttention(
            c.heads, c.bias, *stds, weights_dropout, c.attention, c.kv_heads, c.qk_norm, self.window, *dtypes,
            name="attention",
        )  # fmt: skip
        own = None if self.cross else mask
        attended, cache = attention(
            norm(x) if before else x, cache, layer, fold_in(keys, 0), scale, own, segments, positions
        )
        x = x + dropout(attended, c.dropout, fold_in(keys, 1))
        x = x if before else norm(x)

        if self.cross:
            norm = layer_norm(c, "cross_norm")
            cross = CrossAttention(
                c.heads, c.bias, *stds, weights_dropout, c.attention, *dtypes, name="cross_attention"
            )
            past = cast(DecoderCache | None, cache)
            attended, cache = cross(norm(x) if before else x, source, mask, past, layer, fold_in(keys, 3), scale)
            x = x + dropout(attended, c.dropout, fold_in(keys, 4))
            x = x if before else norm(x)

        norm = layer_norm(c, "mlp_norm")
        mlp = MLP(c.hidden_width, c.activation, c.bias, *stds, *dtypes, name="mlp")
        x = x + dropout(mlp(norm(x) if before else x), c.dropout, fold_in(keys, 2))
        return constrain(x if before else norm(x), "batch", "length", "width"), cache


def apply_blocks(
    parent: nn.Module,
    config: BlockConfig,
    layers: int,
    x: Float[Array, "B T D"],
    dropout_keys: Key[Array, " B"] | None,
    cache: KVCache | None = None,
    source: Float[Array, "G S D"] | None = None,
    mask: Bool[Array, "G S"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    positions: Int[Array, "#B T"] | None = None,
    *,
    cross: bool = False,
    output_std: float | None = None,
    window: int | None = None,
) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Run a stack of blocks, and the last norm of pre-norm stacks, as submodules of `parent` (see `Block`).

    Parameters of all blocks lie stacked on a leading L axis (`blocks`), applied by a scan; or, for decoding, one by one
    (see `decoding_parameters`).

    Raises:
        ValueError: a cache, and parameters not laid out for it.
    """
    block = (config, output_std, cross, window)
    x = constrain(x, "batch", "length", "width")
    if parent.has_variable("params", "block_0"):
        for layer in range(layers):
            x, cache = Block(*block, name=f"block_{layer}")(
                x, layer, dropout_keys, cache, source, mask, segments, positions
            )
    elif cache is None:
        numbers = jnp.arange(layers, dtype=jnp.int32)
        scan = _scan_over_layers(config, layers)(*block, name="blocks")
        x, _ = scan(x, numbers, dropout_keys, None, source, mask, segments, positions)
    else:
        raise ValueError("with a cache, the parameters must be laid out by decoding_parameters")
    return layer_norm(config, "final_norm")(x) if config.norm == "pre" else x, cache


def layer_norm(config: BlockConfig, name: str) -> Norm:
    """A norm of the stack; root mean square normalisation has no bias."""
    centred = config.normalizer == "layer"
    dtypes = (config.parameter_dtype, config.compute_dtype)
    return Norm(config.norm_epsilon, config.bias and centred, centred, *dtypes, name=name)


def attention_scale(config: BlockConfig, layer: int | Int[Array, ""]) -> Scale:
    """What multiplies the attention scores of a block; None means 1 / sqrt(H), as published."""
    if config.scale_attention and not config.scale_attention_by_layer:
        return None
    scale = 1.0 / math.sqrt(config.head_width) if config.scale_attention else 1.0
    return scale / (layer + 1) if config.scale_attention_by_layer else scale


def embedding_dropout(
    config: BlockConfig, x: Float[Array, "B T D"], dropout_keys: Key[Array, " B"] | None
) -> Float[Array, "B T D"]:
    """Dropout of the sum of token and position embeddings (Vaswani et al. 2017, section 5.4)."""
    share = config.dropout if config.embedding_dropout is None else config.embedding_dropout
    return dropout(x, share, dropout_keys)


def vocab_size(config: BlockConfig) -> int:
    """V, once it is known.

    Raises:
        ValueError: it is not set.
    """
    if config.vocab_size is None:
        raise ValueError("model.vocab-size is not set; it is the tokenizer's unless given")
    return config.vocab_size


def _scan_over_layers(config: BlockConfig, layers: int) -> Any:
    """`Block` repeated: parameters stacked, one program for all layers, unrolled where that is faster."""
    # A rolled scan compiles once whatever L is; on CPU it costs a narrow model 15-30% of its step, a wide one nothing.
    narrow = layers <= 12 and config.width < 512
    unroll = config.unroll or (layers if jax.default_backend() == "cpu" and narrow else 1)
    # Within a loop nothing can be taken from the forward pass instead of computing it again; unrolled, XLA would do so.
    block = nn.remat(Block, prevent_cse=unroll > 1) if config.remat else Block
    return nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(0, *(nn.broadcast,) * 6),
        length=layers,
        unroll=min(unroll, layers),
    )


def decoding_parameters(parameters: Parameters) -> Parameters:
    """Lay the parameters of a stack out for decoding: `block_0`, `block_1`, ... one by one.

    A token's work is to read every matrix once; of stacked ones XLA copies a layer's part first (measured on CPU). Same
    values, twice the memory as long as both are kept; parameters that are laid out already come back as they are.
    """
    if "blocks" not in parameters:
        return parameters
    blocks = cast(dict[str, Any], parameters["blocks"])
    layers = len(blocks["attention_norm"]["scale"])
    rest = {name: leaf for name, leaf in parameters.items() if name != "blocks"}
    return rest | {f"block_{layer}": jax.tree.map(operator.itemgetter(layer), blocks) for layer in range(layers)}


def compact_parameters(parameters: Parameters, weights: Weights) -> Parameters:
    """The same in fewer bits, laid out for decoding: the matrices of the blocks and the head (see `models.compact`).

    A token embedding that is the head too is one of them; what is not a matrix stays as it is.
    """
    laid_out = {
        name: _compact_block(leaf, weights) if name.startswith("block_") else leaf
        for name, leaf in decoding_parameters(parameters).items()
    }
    if "head" in laid_out:
        return laid_out | {"head": compact(cast(Array, laid_out["head"]), weights)}
    return laid_out | {"token_embedding": compact(cast(Any, laid_out["token_embedding"])["embedding"], weights)}


def _compact_block(block: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, leaf in block.items():
        if isinstance(leaf, Mapping):
            found[name] = _compact_block(leaf, weights)
        elif name == "kernel":
            found |= compact(leaf.T, weights)
        else:
            found[name] = leaf
    return found
