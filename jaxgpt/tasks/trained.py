"""A trained run read back from its folder: config, parameters and tokenizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import jax

from jaxgpt.config import Dtype, RunConfig, TrainConfig, TranslationConfig
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.models import gpt, transformer
from jaxgpt.models.blocks import Parameters
from jaxgpt.storage.checkpoint import Checkpoints
from jaxgpt.storage.runs import RunFolder

Which = Literal["best", "last", "average"]
Config = TypeVar("Config", bound=RunConfig)
INIT: dict[type[RunConfig], Callable[[Any, jax.Array], Parameters]] = {
    TrainConfig: gpt.init_parameters,
    TranslationConfig: transformer.init_parameters,
}
# What uses a run, which stands for {}.
COMMANDS: dict[type[RunConfig], str] = {
    TrainConfig: "jaxgpt generate --model {} --prompt TEXT",
    TranslationConfig: "jaxgpt translate --model {}",
}


@dataclass(frozen=True)
class Trained(Generic[Config]):
    """What a run made."""

    config: Config
    parameters: Parameters
    tokenizer: Tokenizer


def load_trained(
    run: RunFolder, kind: type[Config], checkpoint: Which | None = None, dtype: Dtype | None = None
) -> Trained[Config]:
    """Read a run of the task that `kind` is the config of.

    Args:
        checkpoint: the one with the lowest held-out loss, the newest, or the mean of the newest (default: the mean if
            the run was to average several, else the best).
        dtype: what the parameters become and what is computed in (default: the run's own).

    Raises:
        FileNotFoundError: no run, or no checkpoint yet.
        ValueError: a run of another task, or a damaged file.
    """
    config = run.saved_config()
    if not isinstance(config, kind):
        use = COMMANDS[type(config)].format(run.path)
        raise ValueError(f"{run.path} is a run of another task, {run.describe()['task']}; what uses it is: {use}")
    checkpoints = Checkpoints(run.checkpoints, regular=config.saves_at, read_only=True)
    if checkpoints.latest_step is None:
        raise FileNotFoundError(f"{run.path} has no checkpoint yet")
    shapes = jax.eval_shape(functools.partial(INIT[type(config)], config.model), jax.random.key(0))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    checkpoint = checkpoint or ("average" if config.average > 1 else "best")
    if checkpoint == "average":
        parameters, _ = checkpoints.restore_average(config.average, shapes, device)
    else:
        step = checkpoints.latest_step if checkpoint == "last" else checkpoints.best_step
        assert step is not None
        parameters = checkpoints.restore(step, {"parameters": shapes}, device)[0]["parameters"]
    if dtype is not None:
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, parameter_dtype=dtype, compute_dtype=dtype)
        )
        parameters = jax.tree.map(lambda leaf: leaf.astype(dtype), parameters)
    return Trained(config, parameters, load_tokenizer(run.tokenizer))
