"""Published weights: safetensors files, checked before they are read, read leaf by leaf, and written."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from jaxgpt.config import GPTConfig, require
from jaxgpt.storage.huggingface import HEAD, SCORE, tensor_names

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PREFIX = "transformer."
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
DTYPES: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# What files hold beside parameters: causal masks that old versions stored, and heads for other tasks.
NO_PARAMETER = re.compile(
    r"(transformer\.)?(h\.\d+\.attn\.(bias|masked_bias)|position_ids)$|(score|classifier|multiple_choice_head|qa_outputs)\."
)

T = TypeVar("T")


class Tensor:
    """One tensor of a file: its shape and dtype, known without reading it."""

    def __init__(self, path: Path, name: str, entry: Mapping[str, Any], data: int, checksum: int | None) -> None:
        self.path, self.name, self.shape = path, name, tuple(entry["shape"])
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is of type {entry['dtype']}; there are {', '.join(DTYPES)}")
        self.dtype = np.dtype(DTYPES[entry["dtype"]])
        self._offset, self._checksum = data + entry["data_offsets"][0], checksum

    def read(self) -> np.ndarray:
        """A view of the file, which takes no memory of its own.

        Raises:
            ValueError: it does not have the checksum that the file says.
        """
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        view = np.memmap(self.path, self.dtype, "r", self._offset, self.shape)
        if self._checksum is not None and zlib.crc32(view.reshape(-1).view(np.uint8).data) != self._checksum:
            raise ValueError(f"{self.path} is damaged: {self.name} does not have the checksum it was saved with")
        return view


def open_weights(folder: Path, score: bool = False) -> dict[str, Tensor]:
    """Find the tensors of a model's folder, by name without any `transformer.` prefix; buffers are left out.

    Args:
        score: find the head of a classifier too, which is otherwise left out as those for other tasks are.

    Raises:
        FileNotFoundError: no weights, or a shard is missing.
        ValueError: pickled weights alone, a damaged file, or an index that leads out of the folder; named.
    """
    tensors: dict[str, Tensor] = {}
    for path in _files(folder):
        for name, tensor in _tensors(path, score).items():
            own = name.removeprefix(PREFIX)
            if own in tensors:
                raise ValueError(f"{tensors[own].path} and {path} both have the tensor {own}")
            tensors[own] = tensor
    return tensors


def _files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickled:
            raise ValueError(
                f"{folder} has only {pickled[0]}, a format that can run any code when it is read; where you trust it, "
                "convert it: load it in transformers and save_pretrained it, which writes model.safetensors"
            )
        raise FileNotFoundError(f"{folder} has no {WEIGHTS} and no {INDEX}")
    index = read_json(folder / INDEX)
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map of tensor names to file names")
    for name in sorted(set(shards.values())):
        if Path(name).name != name or "\\" in name or name in ("", ".", "..") or len(name) > 255:
            raise ValueError(f"{folder / INDEX} names the shard {name!r}, which is not the name of a file beside it")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}, which {INDEX} names")
    return [folder / name for name in sorted(set(shards.values()))]


def _tensors(path: Path, score: bool) -> dict[str, Tensor]:
    """The tensors of one file, once the library has found its header sound."""
    _check_hub_digest(path)
    try:
        with safetensors.safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        described = header.pop("__metadata__", None) or {}
        checksums = json.loads(described.get("crc32", "{}"))
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    require(isinstance(checksums, dict), f"{path} has no checksums where its header should have them")
    return {
        name: Tensor(path, name, entry, 8 + size, checksums.get(name))
        for name, entry in header.items()
        if not NO_PARAMETER.match(name) or (score and name == SCORE)
    }


def _check_hub_digest(path: Path) -> None:
    """In the hub's cache a large file is named after its SHA-256, so that damage can be seen."""
    blob = path.resolve()
    if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", blob.name):
        with blob.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != blob.name:
                raise ValueError(f"{path} is damaged: it is not what its digest says; delete {blob} and load it again")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or no object.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return values


def fitting_config(tensors: Mapping[str, Tensor], config: GPTConfig) -> GPTConfig:
    """`config` with biases where it has none and the file has some that are not zero: someone has trained them."""
    if config.bias:
        return config
    biased = dataclasses.replace(config, bias=True)
    extra = set(_flat(tensor_names(biased))) - set(_flat(tensor_names(config)))
    return biased if any(tensors[name].read().any() for name in extra & tensors.keys()) else config


def _flat(names: Mapping[str, str | tuple[str, ...]]) -> Iterator[str]:
    for name in names.values():
        yield from (name,) if isinstance(name, str) else name


def read_parameters(
    tensors: Mapping[str, Tensor],
    config: GPTConfig,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    place: Callable[[np.ndarray], T],
) -> dict[str, T]:
    """Read our leaves out of published tensors, one at a time.

    All names and shapes are checked before anything is read. Besides what `place` keeps, there is never more than one
    leaf in memory.

    Args:
        shapes: of each of our leaves, by path ("blocks/mlp/up/kernel").
        dtype: what the leaves become.
        place: puts a leaf where it belongs, as on a device.

    Raises:
        ValueError: a tensor is missing, has another shape, or would be left out; both shapes are named.
    """
    names = tensor_names(config)
    for leaf, shape in shapes.items():
        for name, wanted in _layers(names[leaf], shape):
            if name not in tensors:
                raise ValueError(f"the weights have no tensor {name}, which the config asks for")
            found = tensors[name]
            if found.shape != wanted:
                raise ValueError(f"{found.path}: {found.name} has the shape {found.shape}, and the config has {wanted}")
    _check_nothing_is_left(tensors, config)
    return {leaf: place(_read(tensors, names[leaf], shape, dtype)) for leaf, shape in shapes.items()}


def _layers(names: str | tuple[str, ...], shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    return [(names, shape)] if isinstance(names, str) else [(name, shape[1:]) for name in names]


def _check_nothing_is_left(tensors: Mapping[str, Tensor], config: GPTConfig) -> None:
    left = set(tensors) - set(_flat(tensor_names(dataclasses.replace(config, bias=True))))
    if config.tied_head and HEAD in left:
        embedding = next(_flat(tensor_names(config)))
        if not np.array_equal(tensors[HEAD].read(), tensors[embedding].read()):
            raise ValueError(f"config.json says that {HEAD} is {embedding}, but the file holds another")
        left.remove(HEAD)
    if left:
        raise ValueError(f"the weights have a tensor {min(left)}, which a model of this config does not")


def _read(
    tensors: Mapping[str, Tensor], names: str | tuple[str, ...], shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    leaf = _aligned(shape, dtype)
    if isinstance(names, str):
        leaf[...] = tensors[names].read()
    else:
        for layer, name in zip(leaf, names, strict=True):
            layer[...] = tensors[name].read()
    return leaf


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that begins where a processor's vectors may: JAX takes it over as it is, instead of copying it."""
    size, alignment = math.prod(shape) * dtype.itemsize, 64
    memory = np.empty(size + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + size].view(dtype).reshape(shape)


def export_tensors(config: GPTConfig, leaves: Mapping[str, Any], *, zero_biases: bool = True) -> dict[str, np.ndarray]:
    """Our leaves as transformers' tensors, by the names its files have; zeros for biases that the model lacks.

    Raises:
        ValueError: the leaves are not those of the model.
    """
    wrong = sorted(leaves.keys() ^ tensor_names(config).keys())
    require(not wrong, f"the leaves are not those of a model of this config: {', '.join(wrong)}")
    tensors: dict[str, np.ndarray] = {}
    for leaf, names in tensor_names(config).items():
        whole = np.asarray(leaves[leaf])
        parts = (whole,) if isinstance(names, str) else whole
        for name, part in zip((names,) if isinstance(names, str) else names, parts, strict=True):
            tensors[name if name == HEAD else PREFIX + name] = np.ascontiguousarray(part)
    if zero_biases and not config.bias:
        for name in _flat(tensor_names(dataclasses.replace(config, bias=True))):
            if name.endswith(".bias"):
                weight = tensors[PREFIX + name.removesuffix("bias") + "weight"]
                tensors[PREFIX + name] = np.zeros(weight.shape[-1], weight.dtype)
    return tensors


def write_weights(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write model.safetensors, whole or not at all, with a CRC-32 of every tensor in its metadata.

    Raises:
        OSError: it could not be written.
    """
    checksums = {name: zlib.crc32(tensor.reshape(-1).view(np.uint8).data) for name, tensor in tensors.items()}
    temporary = folder / f".{WEIGHTS}.{os.getpid()}"
    try:
        metadata = {"format": "pt", "crc32": json.dumps(checksums)}
        temporary.touch()
        mode = temporary.stat().st_mode
        safetensors.numpy.save_file(dict(tensors), temporary, metadata=metadata)
        temporary.chmod(mode)  # the library puts a file in its place that only its owner can read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(folder / WEIGHTS)
    except safetensors.SafetensorError as error:
        raise OSError(f"{folder / WEIGHTS} could not be written: {error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
