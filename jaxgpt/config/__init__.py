"""What a run is made of: frozen dataclasses, checked when they are built, JSON both ways.

Every field is also a command-line flag: `TrainConfig.data.batch_size` is `--data.batch-size`, and the
sentence under a field is its `--help`. A recipe (`recipes.py`) is a complete `RunConfig`.
"""

from __future__ import annotations

from jaxgpt.config.conversion import BAD_INPUT, flatten, from_dict, require, suggestion, to_dict
from jaxgpt.config.devices import Distributed, HostsConfig, ParallelConfig, Strategy
from jaxgpt.config.generation import GenerationConfig, LengthRule
from jaxgpt.config.models import (
    OWN_OF_A_RUN,
    ActivationName,
    AttentionName,
    BlockConfig,
    Dtype,
    GPTConfig,
    TransformerConfig,
    Weights,
    gpt_size,
    transformer_size,
)
from jaxgpt.config.optimizer import OptimizerConfig
from jaxgpt.config.runs import AdaptConfig, DataConfig, GPTRunConfig, LoraTarget, RunConfig, TrainConfig
from jaxgpt.config.tasks import TASKS
from jaxgpt.config.translation import PairsConfig, TranslationConfig
from jaxgpt.config.tuning import ChatConfig, ConversationsConfig, ExamplesConfig, FinetuneConfig, TuningTask

__all__ = [
    "BAD_INPUT",
    "OWN_OF_A_RUN",
    "TASKS",
    "ActivationName",
    "AdaptConfig",
    "AttentionName",
    "BlockConfig",
    "ChatConfig",
    "ConversationsConfig",
    "DataConfig",
    "Distributed",
    "Dtype",
    "ExamplesConfig",
    "FinetuneConfig",
    "GPTConfig",
    "GPTRunConfig",
    "GenerationConfig",
    "HostsConfig",
    "LengthRule",
    "LoraTarget",
    "OptimizerConfig",
    "PairsConfig",
    "ParallelConfig",
    "RunConfig",
    "Strategy",
    "TrainConfig",
    "TransformerConfig",
    "TranslationConfig",
    "TuningTask",
    "Weights",
    "flatten",
    "from_dict",
    "gpt_size",
    "require",
    "suggestion",
    "to_dict",
    "transformer_size",
]
