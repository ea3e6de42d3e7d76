"""What people run today, at its documented best for the CPU, to be measured beside jaxgpt."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxgpt.config import TrainConfig


def torch_train_step(config: TrainConfig, vocab_size: int, tokens: np.ndarray) -> tuple[Callable[[], float], int]:
    """The GPT-2 of `transformers` in PyTorch: a function that runs one training step, and the bytes of its parameters.

    Same shape, batch, clipping and AdamW settings as ours; float32, all cores, `scaled_dot_product_attention`, the
    fused AdamW. Learning rate constant: a schedule costs nothing.

    Args:
        tokens: (B, T + 1) token ids; the model predicts each from those before it.

    Raises:
        ValueError: torch or transformers is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError("--vs torch needs torch and transformers: pip install torch transformers") from error
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    model_config, optimizer_config = config.model, config.optimizer
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "n_positions": model_config.context,
        "n_embd": model_config.width,
        "n_layer": model_config.layers,
        "n_head": model_config.heads,
        "n_inner": model_config.hidden_width,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model_config.dropout)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings, **drops, attn_implementation="sdpa"))
    model.train()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optimizer_config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (optimizer_config.beta1, optimizer_config.beta2)
    optimizer = torch.optim.AdamW(groups, lr=optimizer_config.learning_rate, betas=betas, fused=True)
    inputs = torch.from_numpy(tokens[:, :-1].astype(np.int64))
    targets = torch.from_numpy(tokens[:, 1:].astype(np.int64)).reshape(-1)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = model(inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.view(-1, vocab_size), targets)
        loss.backward()
        if optimizer_config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, optimizer_config.clip_norm)
        optimizer.step()
        return loss.item()

    return step, sum(p.numel() * p.element_size() for p in parameters)
