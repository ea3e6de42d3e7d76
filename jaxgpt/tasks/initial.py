"""What a GPT's training begins with: parameters drawn anew, or those of another model, with a head and an adapter."""

from __future__ import annotations

import jax
from jaxtyping import Array, Key

from jaxgpt.config import AdaptConfig, FinetuneConfig, GPTConfig, GPTRunConfig
from jaxgpt.data.special_tokens import SPECIALS
from jaxgpt.models.blocks import Parameters
from jaxgpt.models.gpt import init_parameters
from jaxgpt.models.heads import HEAD, grow_vocabulary, init_head
from jaxgpt.models.lora import ADAPTER, init_adapter
from jaxgpt.models.partition import separate


def needs_base(config: GPTRunConfig) -> bool:
    """Whether a checkpoint of the run holds a part of the model alone, and the rest is the pretrained one's."""
    return config.adapt.method != "all"


def adapter_shapes(model: GPTConfig, adapt: AdaptConfig) -> Parameters:
    """The shapes of an adapter of a model."""
    return jax.eval_shape(lambda: init_adapter(model, adapt, jax.random.key(0)))


def separated(config: GPTRunConfig, key: Key[Array, ""], base: Parameters | None) -> tuple[Parameters, Parameters]:
    """Initial parameters, a function of the key alone: those that are trained, and those that stay as they are.

    Args:
        config: of the run, with the vocabulary resolved: the last three ids are those of a head's special tokens.
        base: parameters of the model that it begins with, which are not changed; None: drawn anew.
    """
    model = config.model
    size = model.vocab_size
    assert size is not None
    std = model.init_std or model.width**-0.5
    if base is None:
        parameters: Parameters = init_parameters(model, key)
    else:
        # Copies: what is trained is donated to the first step.
        parameters = jax.tree.map(lambda leaf: jax.numpy.array(leaf, model.parameter_dtype), base)
    if isinstance(config, FinetuneConfig):
        if base is not None:
            fresh = jax.numpy.arange(size - SPECIALS, size)
            parameters = grow_vocabulary(parameters, size, fresh, std, jax.random.fold_in(key, 1))
        parameters = {**parameters, HEAD: init_head(model, config.outputs, jax.random.fold_in(key, 2))}
    if config.adapt.method == "lora":
        parameters = {**parameters, ADAPTER: init_adapter(model, config.adapt, jax.random.fold_in(key, 3))}
    return separate(parameters, config.adapt)
