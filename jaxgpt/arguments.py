"""Flags to dataclasses: the whole grammar of the command line, in either spelling, with errors of one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator
from typing import Any, TypeVar, get_origin, get_type_hints

from jaxgpt.config import require, suggestion

T = TypeVar("T")


def parse(
    kind: type[T],
    arguments: list[str],
    prog: str,
    default: T | None = None,
    positional: str | None = None,
    taken: tuple[str, ...] = (),
) -> T:
    """Turn flags into a dataclass. A bare `--quiet` means `--quiet True`, a bare `--resume` means `--resume latest`.

    Of a flag given twice the last counts; one that takes several values gets them all. Words that belong to no flag are
    the values of the flag `positional`, if there is one. `taken` are flags that the caller has read, for suggestions.

    Raises:
        ValueError: an unknown flag (the nearest is named) or a value that does not fit, in one sentence.
        SystemExit: `--help` was asked for and printed.
    """
    import tyro

    settings = _settings(kind)
    given: dict[str, list[str]] = {}
    groups = _grouped(arguments, positional)
    if positional is not None:
        groups = [part for group in groups for part in _freed(*group, settings, positional)]
    for flag, values in groups:
        if flag not in (*settings, "--help"):
            raise ValueError(f"there is no setting {flag}{suggestion(flag, [*settings, *taken])}")
        if get_origin(settings.get(flag)) is tuple:
            require(bool(values), f"{flag} needs a value")
            given.setdefault(flag, []).extend(values)
        elif settings.get(flag) is bool:
            given[flag] = [value.capitalize() for value in values] or ["True"]
        else:
            given[flag] = values or (["latest"] if flag == "--resume" else [])
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            options: dict[str, Any] = {} if default is None else {"default": default}
            spelled = [word for flag, values in given.items() for word in (flag, *values)]
            return tyro.cli(kind, prog=prog, args=spelled, config=(tyro.conf.FlagConversionOff,), **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(_first_sentence(errors.getvalue())) from None


def value_of(flag: str, arguments: list[str]) -> str | None:
    """The last value of a flag among arguments that are still to be parsed; None if it has none."""
    found = [values[-1] for name, values in _grouped(arguments, None) if name == flag and values]
    return found[-1] if found else None


def flags_in(arguments: list[str]) -> list[str]:
    """The flags among arguments, without their values."""
    return [flag for flag, _ in _grouped(arguments, None)]


def _freed(flag: str, values: list[str], settings: dict[str, Any], positional: str) -> Iterator[tuple[str, list[str]]]:
    """A flag with the values it can have, and the words after them as those of `positional`."""
    count = len(values)
    if settings.get(flag) is bool:
        count = int(bool(values) and values[0].lower() in ("true", "false"))
    elif get_origin(settings.get(flag)) is not tuple:
        count = min(1, count)
    yield flag, values[:count]
    if values[count:]:
        yield positional, values[count:]


def _grouped(arguments: list[str], positional: str | None) -> list[tuple[str, list[str]]]:
    """Each flag with the values after it, in either spelling: `--name value ...` or `--name=value`."""
    groups: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument == "-h":
            groups.append(("--help", []))
        elif argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            groups.append((flag, [value] if equals else []))
        elif groups:
            groups[-1][1].append(argument)
        elif positional is not None:
            groups.append((positional, [argument]))
        else:
            raise ValueError(f"{argument} stands where a setting (--name value) should")
    return groups


def _settings(kind: type, prefix: str = "--") -> dict[str, Any]:
    """The flags of a dataclass, those of the dataclasses in it included, and the type of each."""
    flags: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        flag = prefix + name.replace("_", "-")
        nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        flags |= _settings(hint, flag + ".") if nested else {flag: hint}
    return flags


def _first_sentence(box: str) -> str:
    """The message of a tyro error, out of the box that is drawn around it."""
    # Where the terminal has no such characters, tyro draws spaces and hyphens, and the title is a line of its own.
    drawn = "│" in box
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    rules = [number for number, line in enumerate(lines) if re.fullmatch("[─-]+", line)] + [len(lines)] * 2
    message = lines[: rules[0]] if drawn else lines[rules[0] + 1 : rules[1]]
    text = re.sub(r"^Error parsing \w+(\.\w+)*: ", "", " ".join(message))  # a dataclass has refused: its words suffice
    text = re.sub(r"invalid literal for int\(\) with base 10: ", "a whole number is needed, not ", text)
    text = re.sub(r"could not convert string to float: ", "a number is needed, not ", text)
    return text.removeprefix("Error parsing ") or "the arguments could not be read"
