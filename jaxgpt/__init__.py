"""jaxgpt: Transformers and GPTs as pure functions in JAX and Flax.

The public names below are imported when they are first used, so that `import jaxgpt` is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

from jaxgpt.environment import prepare_backend

_HOMES = {
    "AdaptConfig": "config",
    "ChatConfig": "config",
    "ConversationsConfig": "config",
    "DataConfig": "config",
    "ExamplesConfig": "config",
    "FinetuneConfig": "config",
    "GPTConfig": "config",
    "GenerationConfig": "config",
    "OptimizerConfig": "config",
    "ParallelConfig": "config",
    "PairsConfig": "config",
    "TrainConfig": "config",
    "TransformerConfig": "config",
    "TranslationConfig": "config",
    "GPT": "models.gpt",
    "Transformer": "models.transformer",
    "gpt_size": "config",
    "transformer_size": "config",
    "Generated": "api",
    "LanguageModel": "api",
    "Chatbot": "apps.chatbot",
    "Classifier": "apps.sentiment",
    "Translator": "apps.translator",
    "export_adapter": "api",
    "export": "api",
    "load": "api",
    "train": "launch",
    "recipe": "recipes",
}
__all__ = ["__version__", *_HOMES]
__version__ = "0.1.0"

prepare_backend()  # the one import-time side effect: XLA reads its flags only once


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxgpt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxgpt.{_HOMES[name]}"), name)
