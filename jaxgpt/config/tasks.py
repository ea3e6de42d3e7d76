"""The tasks there are: the kind of config of each, by the name that stands in a run's config.json."""

from __future__ import annotations

from jaxgpt.config.runs import RunConfig, TrainConfig
from jaxgpt.config.translation import TranslationConfig
from jaxgpt.config.tuning import ChatConfig, FinetuneConfig

TASKS: dict[str, type[RunConfig]] = {
    "language-modelling": TrainConfig,
    "translation": TranslationConfig,
    "fine-tuning": FinetuneConfig,
    "chat": ChatConfig,
}
