"""Models read back: a trained run from its folder, or a published GPT; each with its config and tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import (
    AdaptConfig,
    ChatConfig,
    Dtype,
    FinetuneConfig,
    GPTRunConfig,
    RunConfig,
    TrainConfig,
    TransformerConfig,
    TranslationConfig,
)
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.models import transformer
from jaxgpt.models.blocks import Parameters
from jaxgpt.models.lora import ADAPTER, fold
from jaxgpt.models.partition import combine
from jaxgpt.storage import adapters
from jaxgpt.storage.checkpoint import Checkpoints
from jaxgpt.storage.hub import find_model
from jaxgpt.storage.leaves import by_path
from jaxgpt.storage.runs import RunFolder
from jaxgpt.storage.weights import read_json
from jaxgpt.tasks import initial
from jaxgpt.tasks.published import Pretrained, load_published

Which = Literal["best", "last", "average"]
Config = TypeVar("Config", bound=RunConfig)
# What uses a run, which stands for {}.
COMMANDS: dict[type[RunConfig], str] = {
    TrainConfig: "jaxgpt generate --model {} --prompt TEXT",
    TranslationConfig: "jaxgpt translate --model {}",
    FinetuneConfig: "jaxgpt classify --model {} --text TEXT",
    ChatConfig: "jaxgpt chat --model {}",
}


@dataclass(frozen=True)
class Trained(Generic[Config]):
    """What a run made; adapters are folded into the weights."""

    config: Config
    parameters: Parameters
    tokenizer: Tokenizer


def load_trained(
    run: RunFolder,
    kind: type[Config],
    checkpoint: Which | None = None,
    dtype: Dtype | None = None,
    base: str | None = None,
) -> Trained[Config]:
    """Read a run of a task that `kind` is the config of.

    Args:
        checkpoint: the one that measured best, the newest, or the mean of the newest (default: the mean if the run was
            to average several, else the best).
        dtype: what the parameters become and what is computed in (default: the run's own).
        base: of a run that trained a part of a pretrained model alone, where that model lies (default: where it did).

    Raises:
        FileNotFoundError: no run, no checkpoint yet, or the model that it began with is gone.
        ValueError: a run of another task, a damaged file, or another base than the run's.
    """
    config = run.saved_config()
    if not isinstance(config, kind):
        use = COMMANDS[type(config)].format(run.path)
        raise ValueError(f"{run.path} is a run of another task, {run.describe()['task']}; what uses it is: {use}")
    parameters = _read_trained(config, run, checkpoint)
    own: RunConfig = config
    if isinstance(own, GPTRunConfig):
        if initial.needs_base(own):
            start = load_base(run, base).parameters
            parameters = combine(parameters, initial.separated(own, jax.random.key(own.seed), start)[1])
        parameters = fold(parameters, own.adapt)
    if dtype is not None:
        model: Any = dataclasses.replace(config.model, parameter_dtype=dtype, compute_dtype=dtype)
        config = dataclasses.replace(config, model=model)
        parameters = jax.tree.map(lambda leaf: leaf.astype(dtype), parameters)
    return Trained(config, parameters, load_tokenizer(run.tokenizer))


def _read_trained(config: RunConfig, run: RunFolder, checkpoint: Which | None) -> Parameters:
    """The parameters that a run trained, from one of its checkpoints or several."""
    metric, highest = config.selection
    checkpoints = Checkpoints(run.checkpoints, regular=config.saves_at, metric=metric, highest=highest, read_only=True)
    if checkpoints.latest_step is None:
        raise FileNotFoundError(f"{run.path} has no checkpoint yet")
    shapes: Parameters
    if isinstance(config, GPTRunConfig):
        shapes = jax.eval_shape(lambda: initial.separated(config, jax.random.key(0), None)[0])
    else:
        assert isinstance(config.model, TransformerConfig)
        shapes = jax.eval_shape(functools.partial(transformer.init_parameters, config.model), jax.random.key(0))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    checkpoint = checkpoint or ("average" if config.average > 1 else "best")
    if checkpoint == "average":
        return checkpoints.restore_average(config.average, shapes, device)[0]
    step = checkpoints.latest_step if checkpoint == "last" else checkpoints.best_step
    assert step is not None
    return checkpoints.restore(step, {"parameters": shapes}, device)[0]["parameters"]


def load_base(run: RunFolder, path: str | None = None) -> Pretrained:
    """The model that a run began with, which must be the very one.

    Raises:
        FileNotFoundError: it is gone.
        ValueError: what lies there is another.
    """
    config, wanted = run.saved_config(), run.describe().get("base")
    assert isinstance(config, GPTRunConfig) and config.init_from is not None
    where = path or config.init_from
    try:
        base = load_pretrained(where)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{run.path} holds what was trained of {config.init_from}, and not the rest: {error}; give --base PATH"
        ) from error
    found = fingerprint(base.parameters)
    if found != wanted:
        raise ValueError(
            f"{run.path} was trained on another model than {where}: the base has the fingerprint {str(wanted)[:12]}, "
            f"and that one {found[:12]}"
        )
    return base


def fingerprint(parameters: Parameters) -> str:
    """A digest of a model's parameters, their names and shapes."""
    whole = hashlib.sha256()
    for name, leaf in sorted(by_path(parameters).items()):
        array = np.ascontiguousarray(leaf)
        whole.update(f"{name} {array.shape} {array.dtype} ".encode())
        whole.update(array.reshape(-1).view(np.uint8).data)
    return whole.hexdigest()


def load_pretrained(
    path: str | os.PathLike[str],
    checkpoint: Which | None = None,
    revision: str | None = None,
    dtype: Dtype | None = None,
    base: str | None = None,
) -> Pretrained:
    """Load a GPT: a run folder, a Hugging Face folder, or a name on its hub. See `api.load`."""
    folder = find_model(os.fspath(path), revision)
    if (folder / adapters.CONFIG).is_file():
        return _load_adapted(folder, dtype, base)
    if not RunFolder(folder).exists():
        raise FileNotFoundError(f"{folder} is neither a run nor a model: it has no config.json")
    described = read_json(folder / "config.json")
    if "model_type" not in described and "format" not in described:
        raise ValueError(f"{folder / 'config.json'} names no model_type, as a model's would, and is not a run's either")
    if "model_type" in described:
        return load_published(folder, described, dtype or "float32")
    run = RunFolder(folder)
    kind: type[GPTRunConfig] = ChatConfig if isinstance(run.saved_config(), ChatConfig) else TrainConfig
    trained = load_trained(run, kind, checkpoint, dtype, base)
    return Pretrained(trained.config.model, trained.parameters, trained.tokenizer, (trained.tokenizer.separator,))


def _load_adapted(folder: Path, dtype: Dtype | None, base: str | None) -> Pretrained:
    """A model with the adapter of a folder folded in."""
    adapt, leaves, named, wanted = adapters.read_adapter(folder)
    found = load_pretrained(base or named, dtype=dtype)
    digest = fingerprint(found.parameters)
    if wanted is not None and dtype is None and digest != wanted:
        raise ValueError(
            f"the adapter in {folder} is for another model than {base or named}: its base has the fingerprint "
            f"{wanted[:12]}, and that one {digest[:12]}"
        )
    shapes = by_path(initial.adapter_shapes(found.config, adapt))
    for name, leaf in leaves.items():
        if name not in shapes or leaf.shape != shapes[name].shape:
            raise ValueError(f"the adapter in {folder} does not fit {base or named}: {name} is {leaf.shape} in it")
    if missing := sorted(shapes.keys() - leaves.keys()):
        raise ValueError(f"the adapter in {folder} is not whole: it has no {missing[0]}")
    adapter = flax.traverse_util.unflatten_dict({name: jnp.asarray(leaf) for name, leaf in leaves.items()}, sep="/")
    return dataclasses.replace(found, parameters=fold({**found.parameters, ADAPTER: adapter}, adapt))


def load_adapter(run: RunFolder, checkpoint: Which | None = None) -> tuple[AdaptConfig, Parameters, str, str]:
    """The adapter that a run trained: its settings, its leaves, where its base lies, and that one's fingerprint.

    Raises:
        FileNotFoundError, ValueError: no such run, or one that trained no adapter.
    """
    config = run.saved_config()
    if isinstance(config, FinetuneConfig):
        raise ValueError(f"{run.path} has a head and tokens of its own, which an adapter alone would be without")
    if not isinstance(config, (TrainConfig, ChatConfig)) or config.adapt.method != "lora":
        raise ValueError(f"{run.path} has no adapter of its own: it was not trained with --adapt.method lora")
    assert config.init_from is not None
    trained = _read_trained(config, run, checkpoint)
    return config.adapt, trained[ADAPTER], config.init_from, run.describe()["base"]
