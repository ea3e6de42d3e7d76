"""Damaged and hostile files for every reader: `python tests/fuzz.py --seconds 120`.

Valid files are made, changed (see mutations.py) and read. A reader gives what was written, or one clear sentence as a
ValueError or its kin: anything else is a finding, as are a wrong result where there are checksums, a hang, a lot of
memory, and the end of the process. Findings are printed with the number that makes them again (`--seed`).
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import jax
import numpy as np
from mutations import mutate, with_checksum

from jaxgpt import recipes
from jaxgpt.cli import BAD_INPUT
from jaxgpt.config import (
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
from jaxgpt.storage.checkpoint import Checkpoints, DamagedCheckpointError, by_path
from jaxgpt.storage.huggingface import config_from_hf, config_to_hf
from jaxgpt.storage.runs import RunFolder
from jaxgpt.storage.weights import export_tensors, open_weights, read_json, write_weights
from jaxgpt.tasks.trained import load_pretrained

SECONDS = 30  # an attempt that takes longer hangs
MEGABYTES = 700  # that an attempt may add to the process's memory
LONGEST = 600  # characters of a sentence beside the paths in it
EXACT_TYPES = (*BAD_INPUT, DamagedCheckpointError)
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
    described = {"task": "lm", "recipe": "default", "data": "0" * 32, "config": to_dict(recipes.recipe("default"))}
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
    trees = {"parameters": {"a": np.arange(6.0).reshape(2, 3), "b": np.arange(40)}, "optimizer": {"c": np.ones(3)}}
    checkpoints.save(3, trees, metrics={"eval/loss": 1.0}, extra={"seconds": 1.5})
    checkpoints.close()


def _read_checkpoint(folder: Path) -> Any:
    checkpoints = Checkpoints(folder, read_only=True)
    if checkpoints.best_step is None:
        raise FileNotFoundError("no checkpoint")
    shapes = {"a": np.zeros((2, 3)), "b": np.zeros(40, int)}
    structs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), {"parameters": shapes})
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with jax.enable_x64(True):
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
        options = ("answers",) if task == "multiple-choice" else ()
        try:
            sets = open_examples(ExamplesConfig(path=(str(folder / name),), held_out=0.3, options=options), task)
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
    """One reader and its valid files, which each attempt changes anew."""

    def __init__(self, name: str) -> None:
        self.reader = READERS[name]
        with tempfile.TemporaryDirectory() as place:
            self.reader.make(Path(place))
            found = sorted(path for path in Path(place).rglob("*") if path.is_file())
            self._files = {str(path.relative_to(place)): (path.read_bytes(), path.stat()) for path in found}
            fitting = set(Path(place).glob(self.reader.pattern))
            self._changeable = [str(path.relative_to(place)) for path in found if path in fitting]
        self._expected = self._read({})[0]

    def attempt(self, rng: random.Random) -> tuple[str | None, str]:
        """Change a file and read. Returns a finding, if it is one, and what happened."""
        name = rng.choice(self._changeable)
        content = mutate(self._files[name][0], rng, name)
        if self.reader.repair:
            content = with_checksum(content)
        if rng.random() < 0.02:
            return self._judge(*self._read({name: None}), name)
        return self._judge(*self._read({name: content}), name)

    def _read(self, changed: dict[str, bytes | None]) -> tuple[Any, BaseException | None, str]:
        import os

        with tempfile.TemporaryDirectory() as place:
            for name, (content, status) in self._files.items():
                own = changed.get(name, content)
                if own is None:
                    continue
                path = Path(place, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(own)
                os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
            try:
                return self.reader.read(Path(place)), None, place
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                return None, error, place

    def _judge(self, value: Any, error: BaseException | None, place: str, name: str) -> tuple[str | None, str]:
        if error is None:
            if self.reader.exact and value != self._expected:
                return f"{name}: something else was read than was written", "read"
            return None, "read"
        message = str(error).replace(place, "")
        kind = f"{name}: {type(error).__name__}: {message[:300]}"
        if type(error) not in EXACT_TYPES:
            return kind, "crashed"
        if "\n" in message.strip() or not message.strip() or len(message) > LONGEST:
            return f"no sentence: {kind}", "refused"
        return None, "refused"


def _child(names: list[str], first: int, seconds: float, state: Path) -> int:
    """Attempts until the time is over; what is under way stands in `state`."""
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    targets = {name: Target(name) for name in names}
    end, number = time.monotonic() + seconds, first
    while time.monotonic() < end:
        name = names[number % len(names)]
        state.write_text(f"{name} --seed {number}")
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        finding, outcome = targets[name].attempt(random.Random(number))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        if grown > MEGABYTES:
            finding = finding or f"took {grown:,.0f} MB"
        counts[f"{name}: {outcome}"] += 1
        if finding and finding[:60] not in seen:
            seen.add(finding[:60])
            print(f"FOUND --seed {number} {name}: {finding}", flush=True)
        counts["findings"] += finding is not None
        number += 1
    faulthandler.cancel_dump_traceback_later()
    print(f"COUNTS {json.dumps(counts)} {number}", flush=True)
    return 0


def main() -> int:
    """Children do the work, because a reader may take its process with it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0, help="of the first attempt")
    parser.add_argument("--reader", choices=READERS, action="append", help="only this one (default: all)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.reader or list(READERS)
    if options.child:
        return _child(list(READERS) if options.reader is None else names, options.seed, options.seconds, options.child)
    end, seed, found = time.monotonic() + options.seconds, options.seed, 0
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        state = Path(place, "state")
        while (left := end - time.monotonic()) > 1:
            command = [sys.executable, __file__, "--child", str(state), "--seed", str(seed), "--seconds", str(left)]
            command += [word for name in options.reader or () for word in ("--reader", name)]
            done = subprocess.run(command, capture_output=True, text=True)
            for line in done.stdout.splitlines():
                if line.startswith("FOUND"):
                    print(line, flush=True)
                    found += 1
                elif line.startswith("COUNTS"):
                    counts.update(json.loads(line.removeprefix("COUNTS ").rpartition(" ")[0]))
            if done.returncode:
                print(f"FOUND the process ended with {done.returncode} at {state.read_text()}\n{done.stderr[-1500:]}")
                found += 1
                seed = int(state.read_text().rpartition(" ")[2])
            seed += 1
    for name in names:
        parts = ", ".join(f"{counts[f'{name}: {how}']:,} {how}" for how in ("refused", "read", "crashed"))
        print(f"{name:30}{parts}")
    attempts = sum(count for name, count in counts.items() if name != "findings")
    print(f"{attempts:,} attempts, {found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
