"""The same checkpoint in PyTorch: logits, gradients and AdamW steps of `transformers` beside ours."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxgpt.config import GPTConfig, OptimizerConfig
from jaxgpt.models.blocks import Parameters
from jaxgpt.models.gpt import GPT, next_token_logits
from jaxgpt.models.losses import cross_entropy
from jaxgpt.storage.leaves import by_path
from jaxgpt.storage.weights import export_tensors
from jaxgpt.training.optimizer import make_optimizer

STEPS = 3
# Epsilon large beside rounding: Adam divides by the gradient's size, and where that is noise the sign of it is too.
SETTINGS = OptimizerConfig(
    learning_rate=1e-4, schedule="constant", warmup_steps=0, weight_decay=0.1, clip_norm=1.0, epsilon=1e-6
)


@dataclass(frozen=True)
class Differences:
    """How far ours is from PyTorch's."""

    logits: float
    """the largest difference"""
    gradient: float
    """norm of the difference over the norm, of the tensor where that is greatest"""
    tensor: str
    """that tensor, as transformers calls it"""
    logits_after_steps: float
    """the largest difference after STEPS AdamW steps on both sides"""
    largest_logit: float
    """what the differences of logits can be held against"""


def require_torch() -> None:
    """Raise `ValueError` unless torch and transformers are installed."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError("--reference hf needs torch and transformers: pip install torch transformers") from error


def load_torch(folder: Path, dtype: str = "float32") -> Any:
    """The model of an exported folder in transformers, deterministic (dropout off), with attention as it defines it."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager", local_files_only=True
    )
    return model.eval()


@functools.partial(jax.jit, static_argnums=0)
def logits(config: GPTConfig, parameters: Parameters, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Logits of what follows each token, the whole sequence at once, without a cache."""
    hidden, _ = GPT(config).apply({"params": parameters}, tokens)
    return next_token_logits(config, parameters, hidden)


@functools.partial(jax.jit, static_argnums=0)
def _step(
    config: GPTConfig, parameters: Parameters, state: Any, tokens: Int[Array, "B T"], step: Float[Array, ""]
) -> tuple[Parameters, Parameters, Any]:
    """Gradients of the mean negative log-likelihood of all tokens but the first; parameters and state after a step."""

    def mean_loss(parameters: Parameters) -> Float[Array, ""]:
        predicted = logits(config, parameters, tokens)[:, :-1]
        total, weight = cross_entropy(predicted, tokens[:, 1:], jnp.ones(tokens[:, 1:].shape, predicted.dtype))
        return total / weight

    gradients = jax.grad(mean_loss)(parameters)
    updates, state = make_optimizer(SETTINGS, steps=STEPS).update(gradients, state, parameters, position=step)
    return gradients, optax.apply_updates(parameters, updates), state


def compare(config: GPTConfig, parameters: Parameters, theirs: Any, tokens: Int[np.ndarray, "B T"]) -> Differences:
    """Run both on the same tokens. `theirs` (see `load_torch`) is trained on the way, and so changed."""
    import torch

    inputs = torch.from_numpy(np.asarray(tokens, np.int64))

    def apart(parameters: Parameters) -> tuple[float, float]:
        with torch.no_grad():
            expected = theirs(inputs).logits.double().numpy()
        ours = np.asarray(logits(config, parameters, jnp.asarray(tokens)), np.float64)
        return float(np.abs(ours - expected).max()), float(np.abs(expected).max())

    before, largest = apart(parameters)
    named = dict(theirs.named_parameters())
    ours = set(export_tensors(config, by_path(parameters), zero_biases=False))
    for name, parameter in named.items():  # biases that our model does not have stay zero in theirs
        parameter.requires_grad_(name in ours)
    trained = [named[name] for name in sorted(ours)]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": SETTINGS.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    torch_optimizer = torch.optim.AdamW(
        groups, lr=SETTINGS.learning_rate, betas=(SETTINGS.beta1, SETTINGS.beta2), eps=SETTINGS.epsilon
    )
    state = jax.jit(make_optimizer(SETTINGS, steps=STEPS).init)(parameters)
    worst, tensor = 0.0, ""
    for step in range(1, STEPS + 1):
        torch_optimizer.zero_grad()
        theirs(inputs, labels=inputs).loss.backward()
        gradients, parameters, state = _step(config, parameters, state, jnp.asarray(tokens), jnp.float32(step))
        if step == 1:
            worst, tensor = _worst(export_tensors(config, by_path(gradients), zero_biases=False), named)
        torch.nn.utils.clip_grad_norm_(trained, SETTINGS.clip_norm or 0.0)
        torch_optimizer.step()
    return Differences(before, worst, tensor, apart(parameters)[0], largest)


def _worst(gradients: Mapping[str, np.ndarray], named: Mapping[str, Any]) -> tuple[float, str]:
    """The greatest norm-relative difference of a gradient, and of which tensor."""
    relative = {}
    for name, ours in gradients.items():
        expected = named[name].grad.double().numpy()
        relative[name] = float(np.linalg.norm(np.asarray(ours, np.float64) - expected)) / max(
            float(np.linalg.norm(expected)), 1e-9
        )
    name = max(relative, key=relative.__getitem__)
    return relative[name], name
