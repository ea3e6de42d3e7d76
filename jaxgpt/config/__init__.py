"""What a run is made of: frozen dataclasses, checked when they are built, JSON both ways.

Every field is also a command-line flag: `TrainConfig.data.batch_size` is `--data.batch-size`, and the
sentence under a field is its `--help`. A recipe (`recipes.py`) is a complete `RunConfig`.
"""

from __future__ import annotations

from jaxgpt.config.conversion import flatten, from_dict, require, suggestion, to_dict
from jaxgpt.config.generation import GenerationConfig, LengthRule
from jaxgpt.config.models import (
    ActivationName,
    AttentionName,
    BlockConfig,
    Dtype,
    GPTConfig,
    TransformerConfig,
    gpt_size,
    transformer_size,
)
from jaxgpt.config.runs import (
    TASKS,
    DataConfig,
    OptimizerConfig,
    PairsConfig,
    ParallelConfig,
    RunConfig,
    Strategy,
    TrainConfig,
    TranslationConfig,
)

__all__ = [
    "TASKS",
    "ActivationName",
    "AttentionName",
    "BlockConfig",
    "DataConfig",
    "Dtype",
    "GPTConfig",
    "GenerationConfig",
    "LengthRule",
    "OptimizerConfig",
    "PairsConfig",
    "ParallelConfig",
    "RunConfig",
    "Strategy",
    "TrainConfig",
    "TransformerConfig",
    "TranslationConfig",
    "flatten",
    "from_dict",
    "gpt_size",
    "require",
    "suggestion",
    "to_dict",
    "transformer_size",
]
