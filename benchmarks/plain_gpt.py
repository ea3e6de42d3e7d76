"""GPT-2 in plain PyTorch, from the formulas, in the form that is fastest there; a module for processes that have torch.

Pre-norm blocks, learned positions, GELU in its tanh form, tied head (Radford et al. 2019), as in nanoGPT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (what everybody calls it)

from jaxgpt.config import GPTConfig, OptimizerConfig

# The products that GPT-2's files hold as (in, out); Linear has them (out, in).
TURNED = ("c_attn.weight", "c_fc.weight", "c_proj.weight")


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        d, f, bias = config.width, config.hidden_width, config.bias
        self.heads, self.dropout = config.heads, config.dropout
        self.ln_1 = nn.LayerNorm(d, eps=config.norm_epsilon, bias=bias)
        self.ln_2 = nn.LayerNorm(d, eps=config.norm_epsilon, bias=bias)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(d, 3 * d, bias=bias), "c_proj": nn.Linear(d, d, bias=bias)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(d, f, bias=bias), "c_proj": nn.Linear(f, d, bias=bias)})

    def forward(self, x: Any) -> Any:
        """(B, T, D) to (B, T, D)."""
        b, t, d = x.shape
        drop = self.dropout if self.training else 0.0
        parts = self.attn["c_attn"](self.ln_1(x)).split(d, dim=2)
        query, key, value = (part.view(b, t, self.heads, -1).transpose(1, 2) for part in parts)
        heads = F.scaled_dot_product_attention(query, key, value, dropout_p=drop, is_causal=True)
        x = x + F.dropout(self.attn["c_proj"](heads.transpose(1, 2).reshape(b, t, d)), drop)
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + F.dropout(self.mlp["c_proj"](hidden), drop)


class PlainGPT(nn.Module):
    """Tokens to logits, with the shapes of a `GPTConfig`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.wte = nn.Embedding(config.vocab_size or 0, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.h = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.ln_f = nn.LayerNorm(config.width, eps=config.norm_epsilon, bias=config.bias)
        self.register_buffer("positions", torch.arange(config.context), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                depth = 2 * config.layers if name.endswith("c_proj.weight") else 1
                nn.init.normal_(parameter, std=(config.init_std or 0.02) / depth**0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Any) -> Any:
        """(B, T) int64 to (B, T, V)."""
        x = self.wte(tokens) + self.wpe(self.positions[: tokens.shape[1]])
        x = F.dropout(x, self.dropout if self.training else 0.0)
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)

    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Take over the weights of GPT-2's files, by their names; biases that it has not are left out."""
        own = dict(self.named_parameters())
        with torch.no_grad():
            for name, parameter in own.items():
                value = torch.from_numpy(np.array(tensors[f"transformer.{name}"]))
                parameter.copy_(value.T if name.endswith(TURNED) else value)


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """PyTorch's fused AdamW with our settings: only matrices decay. The learning rate is the peak's."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon, fused=True)
