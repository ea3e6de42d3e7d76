"""Models in the format of `transformers`: a folder read, and one written."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import Dtype, GPTConfig
from jaxgpt.data.special_tokens import SPECIALS, without_special_tokens
from jaxgpt.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer
from jaxgpt.models import gpt
from jaxgpt.models.blocks import Parameters
from jaxgpt.models.heads import shrink_vocabulary
from jaxgpt.storage.huggingface import classifier_from_hf, config_from_hf
from jaxgpt.storage.leaves import by_path
from jaxgpt.storage.runs import write_atomically
from jaxgpt.storage.weights import fitting_config, open_weights, read_json, read_parameters, write_weights


@dataclass(frozen=True)
class Pretrained:
    """A GPT to use or to begin with."""

    config: GPTConfig
    parameters: Parameters
    tokenizer: Tokenizer
    stop_tokens: tuple[int, ...]
    """ids that end a text"""


def load_published(folder: Path, values: dict[str, Any], dtype: Dtype) -> Pretrained:
    """Load a GPT; of a classifier of ours the GPT alone, as it was before special tokens were added to it.

    Args:
        values: what its config.json holds.

    Raises:
        FileNotFoundError, ValueError: see `api.load`.
    """
    found = load_whole(folder, values, dtype)
    if classifier_from_hf(values, str(folder / "config.json")) is None:
        return found
    assert found.config.vocab_size is not None
    size = found.config.vocab_size - SPECIALS
    return dataclasses.replace(
        found,
        config=dataclasses.replace(found.config, vocab_size=size),
        parameters=shrink_vocabulary(found.parameters, size),
        tokenizer=without_special_tokens(found.tokenizer),
    )


def load_whole(folder: Path, values: dict[str, Any], dtype: Dtype) -> Pretrained:
    """Load a GPT with all tokens that the folder has. Arguments and errors as in `load_published`."""
    config = config_from_hf(values, where=str(folder / "config.json"))
    config = dataclasses.replace(config, parameter_dtype=dtype, compute_dtype=dtype)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > (config.vocab_size or 0):
        raise ValueError(
            f"the tokenizer in {folder} has ids up to {tokenizer.vocab_size - 1}, and the embedding only "
            f"{config.vocab_size} rows"
        )
    tensors = open_weights(folder)
    config = fitting_config(tensors, config)
    whole = jax.eval_shape(functools.partial(gpt.init_parameters, config), jax.random.key(0))
    shapes = {name: leaf.shape for name, leaf in by_path(whole).items()}
    place = functools.partial(jax.device_put, device=jax.local_devices()[0])
    leaves = read_parameters(tensors, config, shapes, jnp.dtype(dtype), place)
    parameters = flax.traverse_util.unflatten_dict(leaves, sep="/")
    return Pretrained(config, parameters, tokenizer, _stop_tokens(folder, values, tokenizer))


def _stop_tokens(folder: Path, values: dict[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    """The end-of-text tokens that the folder names for generation; else the tokenizer's."""
    generation = folder / "generation_config.json"
    named = read_json(generation).get("eos_token_id") if generation.is_file() else None
    named = values.get("eos_token_id") if named is None else named
    if named is None:
        named = [] if tokenizer.end_of_text is None else tokenizer.end_of_text
    stops = named if isinstance(named, list) else [named]
    size = values.get("vocab_size", tokenizer.vocab_size)
    if not all(isinstance(token, int) and 0 <= token < size for token in stops):
        raise ValueError(f"eos_token_id in {folder} is {named!r}; it must be an id of the {size} tokens, or several")
    return tuple(stops)


def write_published(
    folder: Path, tensors: Mapping[str, np.ndarray], tokenizer: str, files: Mapping[str, dict[str, Any]]
) -> None:
    """Write a model's folder, which must be free.

    Args:
        tensors: by their names in the file.
        tokenizer: what tokenizer.json is to hold.
        files: config.json and the others, by name.

    Raises:
        FileExistsError: the folder exists and is not empty.
    """
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, tensors)
    write_atomically(folder / "tokenizer.json", tokenizer)
    for name, values in files.items():
        write_atomically(folder / name, json.dumps(values, indent=2) + "\n")


def check_free(folder: Path) -> None:
    """Raise `FileExistsError` if something lies in the folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; give another --out")


def tokenizer_config(tokenizer: Tokenizer, length: int, **changes: Any) -> dict[str, Any]:
    """What tokenizer_config.json holds for sequences of at most `length` tokens, with `changes`."""
    named = {} if tokenizer.end_of_text is None else dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    general = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length}
    return general | named | {"clean_up_tokenization_spaces": False} | changes
