"""Every reader of files: how valid ones are made, how they are read, and what is a finding (see fuzz.py)."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from mutations import mutate, with_checksum

from jaxgpt import recipes
from jaxgpt.cli import shown
from jaxgpt.config import (
    BAD_INPUT,
    AdaptConfig,
    ConversationsConfig,
    DataConfig,
    ExamplesConfig,
    GPTConfig,
    PairsConfig,
    TuningTask,
    to_dict,
)
from jaxgpt.data import shards
from jaxgpt.data.conversations import open_conversations
from jaxgpt.data.examples import class_names, open_examples, score_range
from jaxgpt.data.pairs import open_pairs
from jaxgpt.data.prepared import prepare_folder
from jaxgpt.data.tokenizer import byte_tokenizer, load_tokenizer, train_bpe
from jaxgpt.models.gpt import init_parameters
from jaxgpt.models.lora import init_adapter
from jaxgpt.storage.adapters import read_adapter, write_adapter
from jaxgpt.storage.checkpoint import Checkpoints
from jaxgpt.storage.huggingface import config_from_hf, config_to_hf
from jaxgpt.storage.leaves import by_path
from jaxgpt.storage.runs import RunFolder
from jaxgpt.storage.weights import export_tensors, open_weights, read_json, write_weights
from jaxgpt.tasks.trained import load_pretrained

LONGEST = 600  # characters of the line that a user sees
SMALL = GPTConfig(vocab_size=257, context=8, layers=2, heads=2, width=4)
TEXTS = ["to be or not to be", "that is the question é漢🙂\n", "0123456789" * 5, " \t ", "whether 'tis nobler"]


@dataclass(frozen=True)
class Reader:
    """How valid files are made in a folder, and how they are read."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    exact: bool = False
    """whether what is read must be what was written: it has checksums"""
    repair: bool = False
    """whether the checksum of a changed manifest is made to fit"""
    pattern: str = "*"
    """which files are changed"""


def _write_lines(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


def _make_text(folder: Path) -> None:
    _write_lines(folder / "a.jsonl", [{"text": text, "n": 1} for text in TEXTS])
    (folder / "b.txt").write_text(TEXTS[1], "utf-8")


def _data(folder: Path, path: Path, **options: Any) -> DataConfig:
    return DataConfig(path=(str(path),), tokenizer="byte", held_out=0.3, cache=str(folder / "cache"), **options)


def _streams(data: shards.TokenizedText) -> Any:
    train, held_out = (stream.read(0, len(stream)).tobytes() for stream in (data.train, data.held_out))
    return train, held_out, data.fingerprint, data.tokenizer.fingerprint, data.train.documents, data.held_out.bytes


def _read_text(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as cache:
        files = (str(folder / "a.jsonl"), str(folder / "b.txt"))
        shards.prepare(DataConfig(path=files, tokenizer="character", held_out=0.3, cache=cache))


def _make_tokens(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        _make_text(Path(place))
        shards.prepare(_data(Path(place), Path(place, "a.jsonl")))
        (made,) = Path(place, "cache").iterdir()
        for path in made.iterdir():
            path.rename(folder / path.name)


def _make_prepared(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        _make_text(Path(place))
        prepare_folder(_data(folder, Path(place, "a.jsonl")), folder, map, shard_bytes=60)


def _read_prepared(folder: Path) -> Any:
    return _streams(shards.prepare(shards.adopted(DataConfig(path=(str(folder),)))))


class StoppedError(Exception):
    """Ends a preparation before its end."""


def _make_unfinished(folder: Path) -> None:
    _make_text(folder)

    def stops(function: Callable[[Any], Any], works: list[Any]) -> Any:
        for number, work in enumerate(works):
            if function.__name__ == "tokenise" and number == 2:
                raise StoppedError
            yield function(work)

    try:
        prepare_folder(_data(folder, folder / "a.jsonl"), folder / "out", stops, shard_bytes=60)
    except StoppedError:
        return


def _read_unfinished(folder: Path) -> Any:
    prepare_folder(_data(folder, folder / "a.jsonl"), folder / "out", map, shard_bytes=60)
    return _read_prepared(folder / "out")[:2]


def _make_tokenizer(folder: Path) -> None:
    train_bpe(TEXTS * 5, 290).save(folder / "tokenizer.json")


def _make_vocabulary(folder: Path) -> None:
    _make_tokenizer(folder)
    described = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(described["model"]["vocab"]))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in described["model"]["merges"])
    )
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 290}))


def _use_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for text in (*TEXTS, "a" * 60 + "!"):
        ids = tokenizer.encode(text)
        tokenizer.decode(ids)
        "".join(tokenizer.stream(ids[:20]))
        tokenizer.encode(text + "<|endoftext|>", special_tokens=True)
        for token in {*ids[:5], 0, tokenizer.vocab_size - 1}:
            tokenizer.name(token)
    if not all(0 <= token < tokenizer.vocab_size for token in tokenizer.encode(TEXTS[0])):
        raise AssertionError("an id beyond the vocabulary")


def _leaves() -> dict[str, np.ndarray]:
    return by_path(init_parameters(SMALL, jax.random.key(0)))


def _make_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config_to_hf(SMALL, 256)))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 256}))
    byte_tokenizer().save(folder / "tokenizer.json")
    write_weights(folder, export_tensors(SMALL, _leaves()))


def _make_sharded(folder: Path) -> None:
    tensors = export_tensors(SMALL, _leaves())
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        write_weights(folder, {name: tensors[name] for name in names})
        (folder / "model.safetensors").rename(folder / f"model-{number}.safetensors")
        weight_map = dict.fromkeys(names, f"model-{number}.safetensors")
        (folder / f"{number}.map").write_text(json.dumps(weight_map))
    merged = {k: v for path in sorted(folder.glob("*.map")) for k, v in json.loads(path.read_text()).items()}
    for path in folder.glob("*.map"):
        path.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": merged}))


def _read_sharded(folder: Path) -> None:
    for tensor in open_weights(folder).values():
        tensor.read()


def _make_adapter(folder: Path) -> None:
    adapt = AdaptConfig("lora", rank=2)
    write_adapter(folder, adapt, by_path(init_adapter(SMALL, adapt, jax.random.key(0))), "gpt2", "0" * 64)


def _make_run(folder: Path) -> None:
    run = RunFolder(folder)
    described = {
        "task": "language-modelling",
        "recipe": "default",
        "data": "0" * 32,
        "config": to_dict(recipes.recipe("default")),
    }
    run.describe_as(described)
    for step in range(6):
        run.log({"step": step, "train/loss": 2.5 / (step + 1), "tokens_per_second": 1e5})
    run.log({"step": 5, "eval/loss": 2.0, "seconds": 1})


def _read_run(folder: Path) -> None:
    run = RunFolder(folder)
    run.saved_config()
    run.history()
    run.rewind(3)
    run.draw_curves()


def _make_checkpoint(folder: Path) -> None:
    checkpoints = Checkpoints(folder)
    trees = {
        "parameters": {"a": np.ones((2, 3), np.float32), "b": np.arange(40, dtype=np.int32)},
        "optimizer": {"c": np.ones(3, np.float32)},
    }
    checkpoints.save(3, trees, metrics={"eval/loss": 1.0}, extra={"seconds": 1.5})
    checkpoints.close()


def _read_checkpoint(folder: Path) -> Any:
    checkpoints = Checkpoints(folder, read_only=True)
    if checkpoints.best_step is None:
        raise FileNotFoundError("no checkpoint")
    shapes = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(40, np.int32)}
    structs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), {"parameters": shapes})
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    trees, _ = checkpoints.restore(checkpoints.best_step, structs, device)
    return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(trees)]


def _make_pairs(folder: Path) -> None:
    pairs = [(text.strip() or "x", text[::-1].strip() or "y") for text in TEXTS]
    (folder / "a.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in pairs), "utf-8")
    _write_lines(folder / "b.jsonl", [{"source": a, "target": b} for a, b in pairs])
    for side in (0, 1):
        (folder / f"c.{side}").write_text("".join(pair[side] + "\n" for pair in pairs), "utf-8")


def _read_pairs(folder: Path) -> None:
    errors = []
    for paths in (("a.tsv",), ("b.jsonl",), ("c.0", "c.1")):
        try:
            open_pairs(PairsConfig(path=tuple(str(folder / name) for name in paths), held_out=0.3))
        except BAD_INPUT as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _make_examples(folder: Path) -> None:
    rows = [(text.strip() or "x", str(number % 2)) for number, text in enumerate(TEXTS)]
    for name, comma in (("a.tsv", "\t"), ("b.csv", ",")):
        (folder / name).write_text("text" + comma + "label\n" + "".join(f"{a}{comma}{b}\n" for a, b in rows), "utf-8")
    _write_lines(folder / "c.jsonl", [{"text": a, "label": b} for a, b in rows])
    choices = [{"context": a, "answers": ["yes", "no"], "label": b} for a, b in rows]
    _write_lines(folder / "d.jsonl", choices)


def _read_examples(folder: Path) -> None:
    errors: list[Exception] = []
    tasks: list[tuple[str, TuningTask]] = [("a.tsv", "classification"), ("b.csv", "classification")]
    tasks += [("c.jsonl", "classification"), ("d.jsonl", "multiple-choice")]
    for name, task in tasks:
        path = (str(folder / name),)
        options = ("answers",) if task == "multiple-choice" else ()
        try:
            sets = open_examples(ExamplesConfig(path=path, validation=path, options=options), task)
            class_names((), sets.train, sets.held_out)
            score_range((), sets.train)
        except BAD_INPUT as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _make_conversations(folder: Path) -> None:
    said = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "o"},
    ]
    records = [
        {"messages": said},
        {"prompt": "a", "response": "b", "input": "c", "system": "s"},
        {"messages": said[1:]},
    ]
    records += [{"prompt": "p", "instances": [{"input": "", "response": "o"}]}]
    _write_lines(folder / "a.jsonl", records)


def _read_conversations(folder: Path) -> None:
    open_conversations(ConversationsConfig(path=(str(folder / "a.jsonl"),), held_out=0.3))


READERS = {
    "text": Reader(_make_text, _read_text),
    "tokens": Reader(_make_tokens, lambda f: _streams(shards.read_tokens(f, "x")), exact=True),
    "tokens, index repaired": Reader(
        _make_tokens, lambda f: _streams(shards.read_tokens(f, "x")), repair=True, pattern="index.json"
    ),
    "prepared": Reader(_make_prepared, _read_prepared, exact=True),
    "prepared, manifest repaired": Reader(_make_prepared, _read_prepared, repair=True, pattern="prepared.json"),
    "unfinished": Reader(_make_unfinished, _read_unfinished, exact=True, pattern="out/**/*"),
    "tokenizer": Reader(_make_tokenizer, _use_tokenizer),
    "vocabulary": Reader(_make_vocabulary, _use_tokenizer),
    "safetensors": Reader(_make_sharded, _read_sharded),
    "model": Reader(_make_model, load_pretrained),
    "adapter": Reader(_make_adapter, read_adapter),
    "config": Reader(_make_model, lambda f: config_from_hf(read_json(f / "config.json"), "config.json"), pattern="c*"),
    "run": Reader(_make_run, _read_run),
    "checkpoint": Reader(_make_checkpoint, _read_checkpoint, exact=True, pattern="**/*"),
    "pairs": Reader(_make_pairs, _read_pairs),
    "examples": Reader(_make_examples, _read_examples),
    "conversations": Reader(_make_conversations, _read_conversations),
}


class Target:
    """One reader and its valid files, which each attempt changes anew, always in the same place."""

    def __init__(self, name: str) -> None:
        self.reader, self._place = READERS[name], tempfile.TemporaryDirectory()
        place = Path(self._place.name, "files")
        place.mkdir()
        self.reader.make(place)
        found = sorted(path for path in place.rglob("*") if path.is_file())
        self._files = {str(path.relative_to(place)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}
        fitting = set(place.glob(self.reader.pattern))
        self._changeable = [str(path.relative_to(place)) for path in found if path in fitting]
        self._folder = place
        self._expected, error = self._read({})
        if error is not None:
            raise AssertionError(f"{name}: valid files are refused: {error!r}") from error

    def attempt_numbered(self, number: int) -> tuple[str | None, str]:
        """Change a file, or take it away, and read. Returns a finding, if it is one, and what happened."""
        rng = random.Random(number)
        name = rng.choice(self._changeable)
        content: bytes | None = mutate(self._files[name][0], rng, name)
        if self.reader.repair:
            content = with_checksum(content)
        return self._attempt(name, None if rng.random() < 0.02 else content)

    def attempt_with(self, content: bytes) -> tuple[str | None, str]:
        """Put something else in the place of the first file, and read. Returns as `attempt_numbered`."""
        return self._attempt(self._changeable[0], content)

    def _attempt(self, name: str, content: bytes | None) -> tuple[str | None, str]:
        return self.judge(*self._read({name: content}), name)

    def _read(self, changed: dict[str, bytes | None]) -> tuple[Any, BaseException | None]:
        shutil.rmtree(self._folder)
        self._folder.mkdir()
        for name, (content, modified) in self._files.items():
            own = changed.get(name, content)
            if own is None:
                continue
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(own)
            os.utime(path, ns=(modified, modified))
        try:
            return self.reader.read(self._folder), None
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            return None, error

    def judge(self, value: Any, error: BaseException | None, name: str) -> tuple[str | None, str]:
        """Whether what was read, or the error, is a finding, and what happened."""
        if error is None:
            if self.reader.exact and value != self._expected:
                return f"{name}: something else was read than was written", "read"
            return None, "read"
        line = shown(error).replace(str(self._folder), "") if isinstance(error, Exception) else repr(error)
        kind = f"{name}: {type(error).__name__}: {line[:300]}"
        if not isinstance(error, BAD_INPUT) or type(error).__module__.startswith(("csv", "_csv")):
            return kind, "crashed"
        said = str(error).replace(str(self._folder), "").strip()
        return (None, "refused") if len(said) > 10 and len(line) <= LONGEST else (f"no sentence: {kind}", "refused")
