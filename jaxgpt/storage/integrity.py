"""Whether a checkpoint is whole, and the one that is wanted: its metadata, its metrics, its shapes."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
SEAL = "seal"


class DamagedCheckpointError(ValueError):
    """A checkpoint that cannot be read, or whose contents are not what was saved."""


class UnknownFormatError(ValueError):
    """A checkpoint that is whole, for all that can be said, and written by another version."""


def sealed(metadata: dict[str, Any]) -> dict[str, Any]:
    """JSON values with the format and, under `SEAL`, a CRC-32 of all of them."""
    metadata = {"format": FORMAT} | metadata
    return metadata | {SEAL: _digest(metadata)}


def check_seal(metadata: Any) -> dict[str, Any]:
    """Return what `sealed` was given; of checkpoints that were written before there was a seal, as it is.

    Raises:
        DamagedCheckpointError: it is not what was sealed.
        UnknownFormatError: it is, by a version that writes another format.
    """
    if not isinstance(metadata, dict) or "format" not in metadata:
        raise DamagedCheckpointError("its _CHECKPOINT_METADATA is missing, empty or damaged")
    content = {name: value for name, value in metadata.items() if name != SEAL}
    if metadata.get(SEAL, _digest(content)) != _digest(content):
        raise DamagedCheckpointError("its _CHECKPOINT_METADATA is damaged")
    if content["format"] != FORMAT:
        raise UnknownFormatError(
            f"it is of format {content['format']}, and this version of jaxgpt reads format {FORMAT}: "
            "take the version that wrote it, or a newer one"
        )
    return content


def _digest(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def unreadable_metrics(folder: Path, metric: str) -> list[int]:
    """Steps of the checkpoints in `folder` whose `metric` cannot be read, or is no number.

    Orbax reads all of them to know the best, and does not say which one it could not.
    """
    return [
        int(file.parts[-3])
        for file in folder.glob("*/metrics/metrics")
        if file.parts[-3].isdecimal() and not _is_readable(file, metric)
    ]


def _is_readable(file: Path, metric: str) -> bool:
    try:
        value = json.loads(file.read_text("utf-8"))[metric]
        return isinstance(value, (int, float)) and math.isfinite(value)
    except (ValueError, KeyError, TypeError, OSError):
        return False


def check_fit(wanted: Mapping[str, Any], found: Mapping[str, Any], names: Collection[str], trees: set[str]) -> None:
    """Compare what a checkpoint describes with what a model needs.

    Args:
        wanted: the model's leaves (arrays or shapes) by their paths.
        found: those that the checkpoint describes.
        names: the paths of all that were saved.
        trees: first parts of the paths that are wanted.

    Raises:
        DamagedCheckpointError: a leaf is in one of the two alone, or differs in its shape; the first is named.
    """
    for name in sorted(wanted.keys() ^ {name for name in names if name.partition("/")[0] in trees}):
        raise DamagedCheckpointError(
            f"it has {'no' if name in wanted else 'a'} {name}, and the model has {'one' if name in wanted else 'none'}"
        )
    for name, leaf in wanted.items():
        saved = found.get(name, leaf)
        if (saved.shape, saved.dtype) != (leaf.shape, leaf.dtype):
            raise DamagedCheckpointError(
                f"{name} is {saved.dtype} {saved.shape} in it, and {leaf.dtype} {leaf.shape} in the model"
            )


def root_cause(error: BaseException) -> str:
    """First line of the innermost error: Orbax wraps what went wrong in handler errors that do not say it."""
    while (inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = inner
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return first.partition(" [tensorstore_spec")[0]  # a page of settings that nobody here has set
