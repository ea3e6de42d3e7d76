"""An adapter in a folder of its own, in the format of PEFT: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from jaxgpt.config import AdaptConfig, LoraTarget, require
from jaxgpt.storage.runs import write_atomically
from jaxgpt.storage.weights import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Our matrices -> transformers' names in a block.
TARGETS: dict[LoraTarget, str] = {"qkv": "attn.c_attn", "out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
MODULES = {f"{'attention' if name in ('qkv', 'out') else 'mlp'}/{name}": module for name, module in TARGETS.items()}
# What PEFT can do besides, which would make another product of the same tensors.
OTHERWISE = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
LEAVES = {"lora_a": "lora_A", "lora_b": "lora_B"}


def write_adapter(folder: Path, adapt: AdaptConfig, leaves: Mapping[str, Any], base: str, fingerprint: str) -> None:
    """Write an adapter for `peft.PeftModel.from_pretrained`.

    Args:
        leaves: by path below the adapter, such as "blocks/attention/qkv/lora_a" (L, in, r).
        base: the model it belongs to, a path or a name.
        fingerprint: of that model's parameters, so that another is not taken for it.
    """
    tensors = {}
    for path, leaf in leaves.items():
        _, part, name, side = path.split("/")
        for layer, matrix in enumerate(np.asarray(leaf)):
            module = f"base_model.model.transformer.h.{layer}.{MODULES[f'{part}/{name}']}"
            tensors[f"{module}.{LEAVES[side]}.weight"] = np.ascontiguousarray(matrix.T)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapt.rank,
        "lora_alpha": adapt.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": True,
        # By their whole ends, because two of them are called c_proj.
        "target_modules": [TARGETS[target] for target in adapt.targets],
    }
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", "base": fingerprint})
    write_atomically(folder / CONFIG, json.dumps(described, indent=2) + "\n")


def read_adapter(folder: Path) -> tuple[AdaptConfig, dict[str, np.ndarray], str, str | None]:
    """Read an adapter of a GPT-2, ours or PEFT's own.

    Returns:
        Its settings, its leaves by path, the model it names as its base, and that one's fingerprint if it says so.

    Raises:
        ValueError: another kind of adapter, a damaged file, or a tensor that is not where it should be; named.
    """
    described = read_json(folder / CONFIG)
    kind, rank, alpha = (described.get(name) for name in ("peft_type", "r", "lora_alpha"))
    require(kind == "LORA", f"{folder / CONFIG} describes an adapter of type {kind!r}; there is LORA")
    for name in OTHERWISE:
        require(not described.get(name), f"{folder / CONFIG} has {name} {described.get(name)}, which is not here")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)):
        raise ValueError(f"{folder / CONFIG} has no r and lora_alpha that are numbers")
    try:
        tensors = safetensors.numpy.load_file(folder / WEIGHTS)
        with safetensors.safe_open(folder / WEIGHTS, framework="np") as file:
            fingerprint = (file.metadata() or {}).get("base")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is not a whole safetensors file: {error}") from error
    layers: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in tensors.items():
        place = re.fullmatch(r"base_model\.model\.transformer\.h\.(\d+)\.([\w.]+)\.(lora_[AB])\.weight", name)
        ours = [path for path, module in MODULES.items() if place and module == place[2]]
        require(bool(ours), f"{folder / WEIGHTS} has a tensor {name}, which no adapter of a GPT-2 here has")
        assert place is not None
        layers.setdefault(f"blocks/{ours[0]}/{place[3].lower()}", {})[int(place[1])] = tensor.T
    leaves = {path: np.stack([by_layer[n] for n in sorted(by_layer)]) for path, by_layer in layers.items()}
    targets = tuple(target for target, module in TARGETS.items() if any(_module(path) == module for path in leaves))
    base = described.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ValueError(f"{folder / CONFIG} names no base_model_name_or_path")
    return AdaptConfig("lora", rank=rank, alpha=float(alpha), targets=targets), leaves, base, fingerprint


def _module(path: str) -> str:
    return MODULES["/".join(path.split("/")[1:3])]
