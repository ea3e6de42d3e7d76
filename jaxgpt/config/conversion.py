"""Configs as JSON and as flags, both ways; and how bad values are refused."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable
from typing import Any, Literal, TypeVar

T = TypeVar("T")
# What a person can mend: exit code 2 at the command line. Any other error is a run that failed.
BAD_INPUT = (ValueError, FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


def require(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain JSON values, nested as the dataclasses are."""
    return dataclasses.asdict(config)


def from_dict(kind: type[T], values: Any, where: str = "") -> T:
    """Build `kind` from what `to_dict` returned.

    Raises:
        ValueError: no object, a key that `kind` does not have, or a value of the wrong type; the key is named.
    """
    hints = typing.get_type_hints(kind)
    if not isinstance(values, dict):
        raise ValueError(f"{where.rstrip('.') or 'the config'} holds {values!r}; it must be an object with keys")
    unknown = [key for key in values if key not in hints]
    if unknown:
        raise ValueError(f"unknown key {where}{unknown[0]}{suggestion(unknown[0], hints)}")
    return kind(**{key: _convert(hints[key], value, where + key) for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check one JSON value against one annotation; lists become tuples, objects become dataclasses."""
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where + ".")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if type(None) in arguments:
        return None if value is None else _convert(arguments[0], value, where)  # X | None
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_convert(arguments[0], item, where) for item in value)
        fits = False
    elif origin is Literal:
        fits = value in arguments
    else:
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        fits = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    require(fits, f"{where} is {value!r}, which is not of the type it should have")
    return value


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return `{"data.batch-size": 12, ...}`: every leaf of a config under its command-line name."""
    leaves: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        name, value = prefix + item.name.replace("_", "-"), getattr(config, item.name)
        leaves |= flatten(value, name + ".") if dataclasses.is_dataclass(value) else {name: value}
    return leaves


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the known name nearest to `wrong`, or the list of those there are."""
    names = list(known)
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"
