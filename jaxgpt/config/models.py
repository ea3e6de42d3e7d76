"""What the networks are made of: GPT, and the encoder-decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from jaxgpt.config.conversion import require, suggestion

Dtype = Literal["float32", "bfloat16", "float64"]
Weights = Literal["int8", "bfloat16"]
AttentionName = Literal["auto", "reference", "blocked", "cudnn", "splash"]
ActivationName = Literal["gelu_new", "gelu", "relu", "silu", "tanh", "relu-squared", "swiglu"]
PositionsName = Literal["learned", "sinusoidal", "rotary"]
NormName = Literal["layer", "rms"]

# What a run that begins with another model decides for itself; the rest is that model's.
OWN_OF_A_RUN = (
    "dropout", "embedding_dropout", "attention_dropout", "attention", "remat", "unroll", "compute_dtype",
    "parameter_dtype",
)  # fmt: skip


@dataclass(frozen=True)
class BlockConfig:
    """What the blocks of every model here are made of."""

    vocab_size: int | None = None
    """V, rows of the token embedding (default: as many as the tokenizer has)"""
    context: int = 1024
    """longest sequence the model can see, in tokens"""
    heads: int = 12
    """N, attention heads a block"""
    kv_heads: int | None = None
    """heads of keys and values, each for as many query heads (Ainslie et al. 2023; default: as many as heads)"""
    width: int = 768
    """D, width of the residual stream"""
    hidden: int | None = None
    """F, width inside the feed-forward layer (default: 4 x width)"""
    dropout: float = 0.0
    """share of activations zeroed in training: embeddings, attention weights, residual branches"""
    embedding_dropout: float | None = None
    """the same for the embeddings alone (default: dropout)"""
    attention_dropout: float | None = None
    """the same for the attention weights alone (default: dropout)"""
    bias: bool = True
    """biases in the dense layers and the layer norms"""
    positions: PositionsName = "learned"
    """positional encoding: a trained table, the sinusoids of Vaswani et al. 2017, or rotary (Su et al. 2021)"""
    activation: ActivationName = "gelu_new"
    """of the feed-forward layer: GELU in its tanh form (gelu_new, as published) or exact (gelu), relu, silu, tanh,
    relu-squared (So et al. 2021), swiglu (Shazeer 2020)"""
    norm: Literal["pre", "post"] = "pre"
    """layer norms before each sublayer and at the end (GPT-2), or after each residual sum (the first GPT)"""
    normalizer: NormName = "layer"
    """layer norm (Ba et al. 2016), or rms, which neither centres nor has biases (Zhang and Sennrich 2019)"""
    qk_norm: bool = False
    """bring each head's queries and keys to unit mean square first (Henry et al. 2020)"""
    zero_init: bool = False
    """the last matrix of each sublayer starts at zero, so that blocks start as the identity (Zhang et al. 2019)"""
    scale_attention: bool = True
    """divide attention scores by the root of the head width"""
    scale_attention_by_layer: bool = False
    """divide those of block i by i + 1 as well"""
    norm_epsilon: float = 1e-5
    """added to the variance in every layer norm"""
    init_std: float | None = 0.02
    """standard deviation of the initial weights (None: Glorot and Bengio 2010, from the sides of each matrix)"""
    parameter_dtype: Dtype = "float32"
    """what the parameters are stored in"""
    compute_dtype: Dtype = "float32"
    """what the layers compute in; losses are always at least float32"""
    attention: AttentionName = "auto"
    """how attention is computed: by the full score matrix, blocks of queries, cuDNN, Pallas (TPU), or the best here"""
    remat: bool = False
    """recompute each block in the backward pass: less memory, about a third more time"""
    unroll: int | None = None
    """blocks unrolled in the scan over layers (default: all on CPU of up to 12 layers narrower than 512, else 1)"""

    def __post_init__(self) -> None:
        for name in ("context", "heads", "width"):
            require(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("vocab_size", "hidden", "unroll"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.{name.replace('_', '-')} is {value}; it must be at least 1")
        require(
            self.width % self.heads == 0,
            f"model.heads is {self.heads}, which does not divide model.width {self.width}",
        )
        require(
            self.kv_heads is None or (self.kv_heads >= 1 and self.heads % self.kv_heads == 0),
            f"model.kv-heads is {self.kv_heads}, which does not divide model.heads {self.heads}",
        )
        require(
            self.positions != "sinusoidal" or self.width % 2 == 0,
            f"model.width is {self.width}; sinusoidal positions need an even width",
        )
        require(
            self.positions != "rotary" or self.head_width % 2 == 0,
            f"model.width / model.heads is {self.head_width}; rotary positions need an even head width",
        )
        for name in ("dropout", "embedding_dropout", "attention_dropout"):
            share = getattr(self, name)
            in_range = share is None or 0.0 <= share < 1.0
            require(in_range, f"model.{name.replace('_', '-')} is {share}; it must be in [0, 1)")
        require(self.norm_epsilon > 0, f"model.norm-epsilon is {self.norm_epsilon}; it must be positive")
        std = self.init_std
        require(std is None or std > 0, f"model.init-std is {std}; it must be positive, or None")

    @property
    def head_width(self) -> int:
        """H, width of one attention head."""
        return self.width // self.heads

    @property
    def hidden_width(self) -> int:
        """F, width inside the feed-forward layer."""
        return self.hidden if self.hidden is not None else 4 * self.width


@dataclass(frozen=True)
class GPTConfig(BlockConfig):
    """A GPT as published (Radford et al. 2019): pre-norm blocks, learned positions, tanh-GELU, tied head.

    With `norm="post"` it is the first GPT (Radford et al. 2018).
    """

    layers: int = 12
    """L, number of blocks; residual projections start at init_std / sqrt(2 L)"""
    tied_head: bool = True
    """the output head is the token embedding (Press and Wolf 2017)"""
    window: int | None = None
    """each position sees the last so many only, itself among them (Beltagy et al. 2020; default: all)"""
    scale_embeddings: bool = False
    """multiply token embeddings by sqrt(D), as Vaswani et al. 2017 do (section 3.4)"""
    logit_cap: float | None = None
    """keep logits within +-C, as C tanh(logit / C) (Gemma Team 2024, section 2; default: as they are)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.layers >= 1, f"model.layers is {self.layers}; it must be at least 1")
        require(
            self.window is None or self.window >= 1, f"model.window is {self.window}; it must be at least 1, or None"
        )
        cap = self.logit_cap
        require(cap is None or cap > 0, f"model.logit-cap is {cap}; it must be positive, or None")


@dataclass(frozen=True)
class TransformerConfig(BlockConfig):
    """The encoder-decoder of "Attention Is All You Need" (Vaswani et al. 2017), base size.

    Post-norm, sinusoidal positions, ReLU; one embedding, scaled by sqrt(D), for source, target and output.
    """

    context: int = 256
    """longest source, and longest target, in tokens"""
    heads: int = 8
    """N, attention heads a block"""
    width: int = 512
    """D, width of the residual stream"""
    dropout: float = 0.1
    """share of activations zeroed in training: embeddings and residual branches"""
    attention_dropout: float | None = 0.0
    """the same for the attention weights, where the paper has none (None: as dropout)"""
    positions: Literal["learned", "sinusoidal"] = "sinusoidal"
    """positional encoding: the sinusoids of the paper, or a trained table"""
    activation: ActivationName = "relu"
    """of the feed-forward layer"""
    norm: Literal["pre", "post"] = "post"
    """layer norms after each residual sum, as in the paper, or before each sublayer and at the end"""
    init_std: float | None = None
    """standard deviation of the initial weights (default: Glorot and Bengio 2010, from the sides of each matrix)"""
    encoder_layers: int = 6
    """blocks of the encoder"""
    decoder_layers: int = 6
    """blocks of the decoder"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("encoder_layers", "decoder_layers"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name.replace('_', '-')} is {value}; it must be at least 1")


def transformer_size(name: str, **changes: Any) -> TransformerConfig:
    """An encoder-decoder of a published size, with `changes`.

    `base` and `big` are those of Vaswani et al. 2017 (table 3), `tiny` that of Wu et al. 2021.

    Raises:
        ValueError: there is no such size.
    """
    sizes: dict[str, dict[str, Any]] = {
        "tiny": {"encoder_layers": 4, "decoder_layers": 4, "width": 128, "hidden": 256, "heads": 4},
        "base": {},
        "big": {"width": 1024, "heads": 16, "dropout": 0.3},
    }
    require(name in sizes, f"there is no Transformer of size {name}{suggestion(name, sizes)}")
    return TransformerConfig(**sizes[name] | changes)


def gpt_size(name: str, **changes: Any) -> GPTConfig:
    """A GPT of a published size (Radford et al. 2019, table 2), or `tiny`, nanoGPT's for a laptop; with `changes`.

    Raises:
        ValueError: there is no such size.
    """
    sizes = {
        "tiny": {"layers": 4, "heads": 4, "width": 128, "context": 64},
        "124M": {"layers": 12, "heads": 12, "width": 768},
        "355M": {"layers": 24, "heads": 16, "width": 1024},
        "774M": {"layers": 36, "heads": 20, "width": 1280},
        "1558M": {"layers": 48, "heads": 25, "width": 1600},
    }
    require(name in sizes, f"there is no GPT of size {name}{suggestion(name, sizes)}")
    return GPTConfig(**sizes[name] | changes)
