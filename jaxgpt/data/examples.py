"""Labelled examples: texts and a label each, from TSV, CSV or JSON lines, or made by rule."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxgpt.config import ExamplesConfig, TuningTask
from jaxgpt.data.corpus import decode_lines, json_records
from jaxgpt.data.reviews import reviews

# What the columns of a text, or of a pair of texts, are called in the data sets there are.
ONE_TEXT = (("text",), ("sentence",), ("review",))
TWO_TEXTS = (
    ("text_a", "text_b"), ("premise", "hypothesis"), ("sentence1", "sentence2"), ("sentence_A", "sentence_B"),
    ("question1", "question2"),
)  # fmt: skip
CONTEXTS = (("context",), ("question",), ("text",))
DELIMITERS = {".tsv": "\t", ".csv": ","}


@dataclass(frozen=True)
class Example:
    """What is to be judged, and the judgement."""

    texts: tuple[str, ...]
    """one text; two of a pair; or a context and the answers to choose from"""
    label: str
    """as it stands in the file"""
    where: str = ""
    """the file and the line it stands in"""


@dataclass(frozen=True)
class ExampleSets:
    """Examples to train on and examples held out, and what identifies them."""

    train: list[Example]
    held_out: list[Example]
    fingerprint: str


def open_examples(config: ExamplesConfig, task: TuningTask) -> ExampleSets:
    """Read the examples of `config.path` and `config.validation`; with none, those made by rule (see `data.reviews`).

    Without `validation`, a share `held_out` of the examples is held out: those of the smallest digests of their texts,
    so that equal texts are always on the same side.

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError: a column that is not there, or a malformed line, named; or no example at all.
    """
    if not config.path:
        if task != "classification":
            raise ValueError(f"--data.path is needed: what is made by rule is for the task classification, not {task}")
        made = reviews()
        train, held_out = ([Example((text,), label) for text, label in part] for part in made)
    else:
        train = [example for path in config.path for example in read_examples(path, "data.path", config, task)]
        if config.validation:
            held_out = [e for path in config.validation for e in read_examples(path, "data.validation", config, task)]
        else:
            train, held_out = _split(train, config.held_out)
    whole = hashlib.sha256(json.dumps([[(e.texts, e.label) for e in part] for part in (train, held_out)]).encode())
    return ExampleSets(train, held_out, whole.hexdigest())


def read_examples(name: str, option: str, config: ExamplesConfig, task: TuningTask) -> list[Example]:
    """Read the examples of one file. Raises as `open_examples` does."""
    path = Path(name)
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"{option}: there is no file {path}")
    if path.suffix == ".jsonl":
        examples = [_of_record(record, where, config, task) for record, where in json_records(path)]
    else:
        examples = list(_of_table(path, config, task))
    if not examples:
        raise ValueError(f"{option}: {path} holds no example")
    return examples


def _of_record(record: dict[str, Any], where: str, config: ExamplesConfig, task: TuningTask) -> Example:
    texts = _chosen(tuple(record), config, task, where)
    options = config.options if task == "multiple-choice" else ()
    if len(options) == 1:
        listed = _field(record, options[0], where)
        if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
            raise ValueError(f"{where}: the field {options[0]!r} is not a list of texts")
        values = [*(_text(record, field, where) for field in texts), *listed]
    else:
        values = [_text(record, field, where) for field in (*texts, *options)]
    label = _field(record, config.label, where)
    if isinstance(label, (list, dict)) or label is None:
        raise ValueError(f"{where}: the field {config.label!r} is neither text nor a number")
    return _example(values, label if isinstance(label, str) else json.dumps(label), where, task)


def _field(record: dict[str, Any], field: str, where: str) -> Any:
    if field not in record:
        raise ValueError(f"{where}, has no field {field!r}; it has {', '.join(map(repr, record)) or 'none'}")
    return record[field]


def _text(record: dict[str, Any], field: str, where: str) -> str:
    value = _field(record, field, where)
    if not isinstance(value, str):
        raise ValueError(f"{where}: the field {field!r} is not text")
    return value


def _of_table(path: Path, config: ExamplesConfig, task: TuningTask) -> Iterator[Example]:
    """The rows of a table whose first line names the columns, if one of them has the name of the label's."""
    header: list[str] | None = None
    places: list[int] = []
    for number, columns in enumerate(_rows(path), 1):
        where = f"{path}, line {number}"
        if number == 1 and config.label in columns:
            header = columns
            names = _chosen(tuple(header), config, task, where)
            options = config.options if task == "multiple-choice" else ()
            places = [_place(header, name, where) for name in (*names, *options, config.label)]
            continue
        if header is None:
            if number == 1 and (config.label != ExamplesConfig.label or config.text):
                raise ValueError(f"{path} has no column {config.label!r}; its first line has {_listed(columns)}")
            least = 2 if task == "classification" else 4 if task == "multiple-choice" else 3
            most = None if task == "multiple-choice" else least
            if len(columns) < least or (most is not None and len(columns) > most):
                raise ValueError(
                    f"{where}, has {len(columns)} columns and no header names them; a line of the task {task} has "
                    f"{least}{'' if most else ' or more'}: {'a text' if least == 2 else 'its texts'}, then the label"
                )
            places = list(range(len(columns)))
        elif len(columns) != len(header):
            raise ValueError(f"{where}, has {len(columns)} columns, and the header {len(header)}")
        yield _example([columns[place] for place in places[:-1]], columns[places[-1]], where, task)


def _rows(path: Path) -> Iterator[list[str]]:
    delimiter = DELIMITERS.get(path.suffix)
    if delimiter is None and path.suffix != ".txt":
        raise ValueError(f"{path} is neither .tsv (or .txt with tabs), .csv nor .jsonl")
    with path.open("rb") as file:
        lines = decode_lines(file, str(path))
        if delimiter == ",":
            try:
                yield from csv.reader(line + "\n" for line in lines)
            except csv.Error as error:
                raise ValueError(f"{path} is not CSV: {error}") from error
        else:
            yield from (line.split("\t") for line in lines if line)


def _chosen(names: tuple[str, ...], config: ExamplesConfig, task: TuningTask, where: str) -> tuple[str, ...]:
    """The columns of the texts: those named, or the first known ones there are."""
    if config.text:
        wanted = 2 if task in ("entailment", "similarity") else 1
        if len(config.text) != wanted:
            raise ValueError(f"data.text names {len(config.text)} columns; the task {task} takes {wanted}")
        return config.text
    known = {"classification": ONE_TEXT, "multiple-choice": CONTEXTS}.get(task, TWO_TEXTS)
    found = next((columns for columns in known if set(columns) <= set(names)), None)
    if found is None:
        raise ValueError(f"{where}: which columns hold the text? It has {_listed(names)}; name them by --data.text")
    return found


def _place(header: Sequence[str], name: str, where: str) -> int:
    if name not in header:
        raise ValueError(f"{where}, has no column {name!r}; it has {_listed(header)}")
    return header.index(name)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name[:40]) for name in names)


def _example(texts: Sequence[str], label: str, where: str, task: TuningTask) -> Example:
    if not label.strip():
        raise ValueError(f"{where}: its label is empty")
    for text in texts:
        if not text.strip():
            raise ValueError(f"{where}: {'a text' if len(texts) > 1 else 'its text'} is empty")
    if task == "multiple-choice" and len(texts) < 3:
        raise ValueError(f"{where}: there are {len(texts) - 1} answers; a choice is between two at least")
    return Example(tuple(text.strip() for text in texts), label.strip(), where)


def _split(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    digests = [hashlib.sha256(json.dumps(example.texts).encode()).digest() for example in examples]
    distinct = sorted(set(digests))
    held_out = set(distinct[: min(max(1, round(share * len(distinct))), len(distinct) - 1)])
    if not held_out:
        raise ValueError("the data has one text, so none can be held out; give data.validation")
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example, digest in zip(examples, digests, strict=True):
        parts[digest in held_out].append(example)
    return parts


def class_names(config_labels: Sequence[str], train: Sequence[Example], held_out: Sequence[Example]) -> tuple[str, ...]:
    """The classes, in order: those given, or those of the training examples, sorted (as numbers if they are).

    Raises:
        ValueError: one class only, or an example with a label of none; its line is named.
    """
    found = tuple(config_labels) or tuple(sorted({example.label for example in train}, key=_in_order))
    if len(found) < 2:
        raise ValueError(f"the training examples have one label only, {found[0]!r}; there must be two classes at least")
    for part, name in ((train, "labels"), (held_out, "training set")):
        for example in part:
            if example.label not in found:
                raise ValueError(
                    f"{example.where}: the label {example.label!r} is not in the {name}; {_choices(found)}"
                )
    return found


def _choices(labels: Sequence[str]) -> str:
    shown = ", ".join(map(repr, labels[:10]))
    return f"there are {shown}{' ...' if len(labels) > 10 else ''}"


def _in_order(label: str) -> tuple[float, str]:
    try:
        return float(label), label
    except ValueError:
        return float("inf"), label


def score_range(config_labels: Sequence[str], train: Sequence[Example]) -> tuple[str, ...]:
    """The lowest and the highest score of the training examples, as texts.

    Raises:
        ValueError: a label that is no number (its line is named), or no two different scores.
    """
    scores = [score_of(example) for example in train]
    low, high = (float(config_labels[0]), float(config_labels[1])) if config_labels else (min(scores), max(scores))
    if not low < high:
        raise ValueError(f"the training examples have one score only, {low:g}; there must be two at least")
    return repr(low), repr(high)


def score_of(example: Example) -> float:
    """The label of an example as a number.

    Raises:
        ValueError: it is none.
    """
    try:
        score = float(example.label)
    except ValueError as error:
        raise ValueError(f"{example.where}: the label {example.label!r} is no number, as regression needs") from error
    if score - score != 0:  # infinite, or not a number
        raise ValueError(f"{example.where}: the label {example.label!r} is no finite number")
    return score


def choice_of(example: Example) -> int:
    """The label of a multiple-choice example: the place of the right answer, from 0, or that answer itself.

    Raises:
        ValueError: it is neither.
    """
    answers = example.texts[1:]
    if example.label in answers:
        return answers.index(example.label)
    if example.label.isdigit() and int(example.label) < len(answers):
        return int(example.label)
    raise ValueError(
        f"{example.where}: the label {example.label!r} is neither one of its {len(answers)} answers nor the place of "
        f"one, 0 to {len(answers) - 1}"
    )
