"""Token shards: what is read is what was tokenised, work is done once, and damage never goes unnoticed."""

import json
import math
import os
import random
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.config import DataConfig
from jaxgpt.data import encoding, shards
from jaxgpt.data.shards import TokenStream, prepare
from jaxgpt.data.tokenizer import byte_tokenizer, train_bpe


def documents(seed: int, count: int = 30) -> list[str]:
    rng = random.Random(seed)
    return [f"{i} " + "".join(rng.choices("abc é漢\n", k=rng.randrange(1, 200))) for i in range(count)]


def config(folder: Path, texts: list[str], cache: Path, **options) -> DataConfig:
    """Write the texts as files, in this order."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04d}.txt").write_bytes(text.encode())
    return DataConfig(path=(str(folder),), cache=str(cache), **{"tokenizer": "byte", "vocab_size": 300} | options)


def contents(stream: TokenStream) -> np.ndarray:
    return stream.read(0, len(stream))


def between(ids: np.ndarray, separator: int) -> Iterator[list[int]]:
    for part in np.split(ids, np.flatnonzero(ids == separator)):
        yield [token for token in part.tolist() if token != separator]


@pytest.mark.parametrize("kind", ["byte", "character", "bpe"])
def test_the_splits_are_the_text(tmp_path, kind):
    texts = documents(0)
    data = prepare(config(tmp_path / "text", texts, tmp_path / "cache", tokenizer=kind))
    found = []
    for stream in (data.train, data.held_out):
        pieces = [data.tokenizer.decode(ids) for ids in between(contents(stream), data.tokenizer.end_of_text)]
        assert stream.documents == len(pieces)  # end-of-text between documents, none after the last
        assert stream.bytes == sum(len(piece.encode()) for piece in pieces)
        found += pieces
    assert sorted(found) == sorted(texts)
    assert data.held_out.bytes >= 0.1 * sum(len(text.encode()) for text in texts)


def test_a_single_text_is_split_at_its_end(tmp_path):
    text = "".join(random.Random(1).choices("abcdef", k=1000))
    data = prepare(config(tmp_path / "text", [text], tmp_path / "cache"))
    assert bytes(contents(data.train).tolist()).decode() == text[:900]
    assert bytes(contents(data.held_out).tolist()).decode() == text[900:]


def test_a_bpe_learns_from_the_training_split_alone(tmp_path):
    text = "abab" * 400 + "zyzyzyzy" * 20  # the end is held out
    data = prepare(config(tmp_path / "text", [text], tmp_path / "cache", tokenizer="bpe"))
    train = text[: math.floor(len(text) * 0.9)]
    assert data.tokenizer.fingerprint == train_bpe([train], 300).fingerprint
    assert data.tokenizer.fingerprint != train_bpe([text], 300).fingerprint


def test_the_character_vocabulary_is_of_the_whole_text(tmp_path):
    data = prepare(config(tmp_path / "text", ["abc" * 100 + "z"], tmp_path / "cache", tokenizer="character"))
    assert data.tokenizer.encode("abcz") == [0, 1, 2, 3]


def test_a_given_tokenizer_is_used(tmp_path):
    given = train_bpe(documents(2), 290)
    given.save(tmp_path / "tokenizer.json")
    texts = documents(3)
    data = prepare(config(tmp_path / "text", texts, tmp_path / "cache", tokenizer=str(tmp_path)))
    assert data.tokenizer.fingerprint == given.fingerprint
    assert given.decode(contents(data.train).tolist()) in "".join(texts) or data.train.documents > 1


def test_a_tokenizer_that_is_neither_a_name_nor_a_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer: char is none of byte, character, bpe, and no path"):
        prepare(config(tmp_path / "text", documents(3), tmp_path / "cache", tokenizer="char"))


@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
def test_reading_across_shards(tmp_path, monkeypatch, size):
    monkeypatch.setattr(shards, "SHARD_TOKENS", size)
    data = prepare(config(tmp_path / "text", documents(4, 6), tmp_path / "cache"))
    whole, rng = contents(data.train), random.Random(5)
    assert len(data.train.shards) == -(-len(whole) // size)
    assert all(len(shard) <= size for shard in data.train.shards)
    for _ in range(50):
        start, stop = sorted(rng.choices(range(len(whole) + 1), k=2))
        assert np.array_equal(data.train.read(start, stop), whole[start:stop])


def test_how_the_text_is_cut_into_shards_and_batches_changes_nothing(tmp_path, monkeypatch):
    texts = documents(6)
    whole = contents(prepare(config(tmp_path / "text", texts, tmp_path / "a")).train)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 50)
    monkeypatch.setattr(encoding, "DOCUMENTS_AT_ONCE", 3)
    assert np.array_equal(contents(prepare(config(tmp_path / "text", texts, tmp_path / "b")).train), whole)


def test_the_dtype_holds_the_vocabulary(tmp_path):
    narrow = prepare(config(tmp_path / "text", ["ab" * 100], tmp_path / "cache"))
    assert {shard.dtype for shard in narrow.train.shards} == {np.dtype(np.uint16)}
    many = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
    wide = prepare(config(tmp_path / "many", [many], tmp_path / "cache", tokenizer="character"))
    assert {shard.dtype for shard in wide.train.shards} == {np.dtype(np.uint32)}
    assert wide.tokenizer.decode(contents(wide.train).tolist()) == many[:63_000]


def test_the_shards_are_mapped_not_loaded(tmp_path):
    data = prepare(config(tmp_path / "text", documents(7), tmp_path / "cache"))
    assert all(isinstance(shard, np.memmap) and not shard.flags.writeable for shard in data.train.shards)


def test_unchanged_text_is_tokenised_once_wherever_it_lies(tmp_path):
    said: list[str] = []
    texts, cache = documents(8), tmp_path / "cache"
    first = prepare(config(tmp_path / "a", texts, cache, tokenizer="bpe"), said.append)
    assert 1 <= len(said) <= 2
    said.clear()
    written = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.rglob("*")}
    second = prepare(config(tmp_path / "b", texts, cache, tokenizer="bpe"), said.append)
    assert said == []
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.rglob("*")} == written
    assert second.fingerprint == first.fingerprint
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert np.array_equal(contents(second.train), contents(first.train))
    assert len(list(cache.iterdir())) == 1


def test_what_changes_the_tokens_changes_the_fingerprint(tmp_path):
    texts, cache = documents(9), tmp_path / "cache"
    options = [{}, {"tokenizer": "character"}, {"tokenizer": "character", "unknown": "token"}]
    options += [{"tokenizer": "bpe"}, {"tokenizer": "bpe", "vocab_size": 310}, {"held_out": 0.3}]
    prints = [prepare(config(tmp_path / "a", texts, cache, **given)).fingerprint for given in options]
    prints.append(prepare(config(tmp_path / "b", [*texts, "more"], cache)).fingerprint)
    assert len(set(prints)) == len(prints)


def test_another_process_may_finish_first(tmp_path):
    texts, cache = documents(10), tmp_path / "cache"
    expected = contents(prepare(config(tmp_path / "text", texts, tmp_path / "elsewhere")).train)

    def other_process(line: str) -> None:  # the last line is said just before the folder moves to its place
        if not cache_holds_something():
            shutil.copytree(tmp_path / "elsewhere", cache, dirs_exist_ok=True)

    def cache_holds_something() -> bool:
        return any(not path.name.startswith(".") for path in cache.iterdir())

    data = prepare(config(tmp_path / "text", texts, cache), other_process)
    assert np.array_equal(contents(data.train), expected)
    assert len(list(cache.iterdir())) == 1


def test_a_failure_leaves_nothing_behind(tmp_path):
    byte_tokenizer().save(tmp_path / "tokenizer.json")

    def full_disk(line: str) -> None:
        raise OSError(28, os.strerror(28))

    with pytest.raises(OSError, match="No space left"):
        prepare(config(tmp_path / "text", documents(11), tmp_path / "cache"), full_disk)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_character_that_a_given_tokenizer_lacks_leaves_nothing_behind(tmp_path):
    small = prepare(config(tmp_path / "a", ["abc" * 50], tmp_path / "other", tokenizer="character")).tokenizer
    small.save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"U\+007A"):
        prepare(config(tmp_path / "b", ["abcz" * 50], tmp_path / "cache", tokenizer=str(tmp_path)))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_flipped_bit_anywhere_in_a_shard_is_noticed(tmp_path):
    given = config(tmp_path / "text", ["some text " * 40], tmp_path / "cache")
    before = contents(prepare(given).train).copy()
    (shard,) = tmp_path.glob("cache/*/train-*.npy")
    whole, rng = shard.read_bytes(), random.Random(12)
    for position in {*range(128), *rng.sample(range(128, len(whole)), 60)}:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        shard.write_bytes(damaged)
        try:
            after = prepare(given)
        except ValueError as error:
            assert shard.name in str(error)  # noqa: PT017
            assert "delete" in str(error)  # noqa: PT017
        else:  # a bit of the header that means nothing
            assert position < 128
            assert np.array_equal(contents(after.train), before)


def test_a_flipped_bit_anywhere_in_the_index_is_noticed(tmp_path):
    given = config(tmp_path / "text", documents(14, 4), tmp_path / "cache")
    before = prepare(given)
    (path,) = tmp_path.glob("cache/*/index.json")
    whole, rng = path.read_bytes(), random.Random(15)
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            after = prepare(given)
        except ValueError as error:
            assert "index.json" in str(error)  # noqa: PT017
        else:  # a space that is a tab now
            assert (after.train.documents, after.train.bytes) == (before.train.documents, before.train.bytes)
            assert np.array_equal(contents(after.train), contents(before.train))
            assert whole[position : position + 1].isspace()


def damage_index(change):
    """Change the index as somebody would who knows about its checksum."""

    def damage(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        del index["crc32"]
        change(index)
        index["crc32"] = zlib.crc32(json.dumps(index).encode())
        (folder / "index.json").write_text(json.dumps(index))

    return damage


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "index.json").unlink(), "index.json"),
        (lambda folder: (folder / "index.json").write_bytes(b""), "index.json"),
        (lambda folder: (folder / "index.json").write_bytes(b"\xff"), "index.json"),
        (lambda folder: (folder / "index.json").write_text("[]"), "index.json"),
        (lambda folder: (folder / "index.json").write_text("[" * 100_000), "index.json"),
        (damage_index(lambda index: index.update(format=99)), "format 99"),
        (damage_index(lambda index: index["train"].pop("shards")), "index.json"),
        (damage_index(lambda index: index["train"].update(shards=[])), "index.json"),
        (damage_index(lambda index: index["train"]["shards"][0].update(file="../x.npy")), "outside the folder"),
        (damage_index(lambda index: index["train"]["shards"][0].update(tokens=3)), "train-00000.npy"),
        (damage_index(lambda index: index.update(vocab_size=5)), "train-00000.npy"),
        (lambda folder: (folder / "train-00000.npy").unlink(), "train-00000.npy"),
        (lambda folder: (folder / "train-00000.npy").write_bytes(b""), "train-00000.npy"),
        (lambda folder: (folder / "train-00000.npy").write_bytes(b"PK\x03\x04 an archive"), "train-00000.npy"),
        (lambda folder: np.save(folder / "train-00000.npy", np.array([{}])), "train-00000.npy"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer at"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"{}"), "tokenizer.json"),
        (lambda folder: train_bpe(["abab"], 258).save(folder / "tokenizer.json"), "tokenizer.json"),
    ],
)
def test_damage_is_named_and_how_to_get_rid_of_it(tmp_path, damage, named):
    given = config(tmp_path / "text", documents(13), tmp_path / "cache")
    prepare(given)
    (folder,) = (tmp_path / "cache").iterdir()
    damage(folder)
    with pytest.raises(ValueError, match="delete") as raised:
        prepare(given)
    assert named in str(raised.value)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)
    shutil.rmtree(folder)
    prepare(given)


def test_tinyshakespeare_is_split_as_nanogpt_splits_it(shared_data, tmp_path):
    path = shared_data / "tinyshakespeare.txt"
    data = prepare(DataConfig(path=(str(path),), tokenizer="character", cache=str(tmp_path)))
    assert (len(data.train), len(data.held_out), data.tokenizer.vocab_size) == (1003854, 111540, 66)
    text = path.read_bytes().decode()
    assert data.tokenizer.decode(contents(data.train)[:1000].tolist()) == text[:1000]
    assert data.tokenizer.decode(contents(data.held_out)[-1000:].tolist()) == text[-1000:]
