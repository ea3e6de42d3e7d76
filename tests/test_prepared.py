"""`jaxgpt prepare`: the tokens are those of the text, whoever makes them in whatever order, however often it stops."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
from program import ROOT, environment
from test_parts import write_corpus
from test_shards import contents

from jaxgpt import recipes
from jaxgpt.cli import main
from jaxgpt.config import DataConfig
from jaxgpt.data import clusters, shards
from jaxgpt.data.corpus import PREPARED, UNFINISHED
from jaxgpt.data.prepared import prepare_folder
from jaxgpt.data.tokenizer import byte_tokenizer, train_bpe
from jaxgpt.data.workers import in_processes
from jaxgpt.tasks import lm


def here(function, values):
    """The plainest of all mappers."""
    return map(function, values)


def config(files, **options):
    return DataConfig(
        path=tuple(map(str, files)), **{"tokenizer": "byte", "vocab_size": 270, "held_out": 0.3} | options
    )


def write_texts(folder, count=40, seed=0):
    rng = random.Random(seed)
    lines = [
        json.dumps({"text": f"{n} " + "".join(rng.choices("abé \n", k=rng.randrange(1, 80)))}) for n in range(count)
    ]
    path = folder / "texts.jsonl"
    path.write_text("\n".join(lines), "utf-8")
    return path


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["byte", "character", "bpe", "given"])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_tokens_are_those_of_the_text(tmp_path, seed, kind):
    if kind == "given":
        train_bpe(["an abacus in abaca"], 280).save(tmp_path / "tokenizer.json")
    data = config([*write_corpus(tmp_path, seed), write_texts(tmp_path)], cache=str(tmp_path / "cache"))
    data = dataclasses.replace(data, tokenizer=str(tmp_path / "tokenizer.json") if kind == "given" else kind)
    direct = shards.prepare(data)
    for size in (50, 300, 10**6):
        folder = tmp_path / f"out-{size}"
        prepare_folder(data, folder, here, shard_bytes=size)
        assert size == 10**6 or len(list(folder.glob("train-*.npy"))) > 1
        found = shards.prepare(shards.adopted(DataConfig(path=(str(folder),))))
        assert found.fingerprint == direct.fingerprint
        assert found.tokenizer.fingerprint == direct.tokenizer.fingerprint
        for ours, theirs in ((found.train, direct.train), (found.held_out, direct.held_out)):
            assert np.array_equal(contents(ours), contents(theirs))
            assert (len(ours), ours.documents, ours.bytes) == (len(theirs), theirs.documents, theirs.bytes)


def test_a_single_text_is_split_at_its_end(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    data = config([tmp_path / "a.txt"], cache=str(tmp_path / "cache"))
    prepare_folder(data, tmp_path / "out", here)
    found = shards.prepare(shards.adopted(DataConfig(path=(str(tmp_path / "out"),))))
    assert bytes(contents(found.train).tolist()) == b"0123456789" * 7
    assert bytes(contents(found.held_out).tolist()) == b"0123456789" * 3
    assert found.fingerprint == shards.prepare(data).fingerprint


class StoppedError(Exception):
    """What a signal, a full disk or a lost machine is to the program."""


@pytest.mark.parametrize("seed", range(3))
def test_a_start_does_what_is_missing_and_nothing_twice(tmp_path, seed):
    rng = random.Random(seed)
    data = config([write_texts(tmp_path)], tokenizer="bpe")
    prepare_folder(data, tmp_path / "unbroken", here, shard_bytes=200)
    folder, done = tmp_path / "broken", []

    def stops(function, values):
        left = rng.randrange(6)
        for value in rng.sample(values, len(values)):
            if not left:
                raise StoppedError
            left -= 1
            done.append((function.__name__, value.number))
            yield function(value)

    starts = 1
    while not (folder / PREPARED).exists():
        with contextlib.suppress(StoppedError):
            prepare_folder(data, folder, stops, shard_bytes=200)
        starts += 1
    assert starts > 3
    assert len(done) == len(set(done))
    assert files_of(folder) == files_of(tmp_path / "unbroken")


@pytest.mark.parametrize("name", ["records-00001", "shard-00001.json", "train-00001.npy"])
def test_what_is_damaged_or_gone_is_done_again(tmp_path, name):
    data, folder = config([write_texts(tmp_path)]), tmp_path / "out"
    prepare_folder(data, tmp_path / "unbroken", here, shard_bytes=400)

    def until_the_end(function, values):
        yield from map(function, values)
        if function.__name__ == "tokenise":
            raise StoppedError

    with pytest.raises(StoppedError):
        prepare_folder(data, folder, until_the_end, shard_bytes=400)
    (path,) = folder.rglob(name)
    whole = path.read_bytes()
    for damaged in (whole[:-1], b"", whole[:40] + b"\xff" + whole[41:], None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(StoppedError):
            prepare_folder(data, folder, until_the_end, shard_bytes=400)
        assert path.read_bytes() == whole
    prepare_folder(data, folder, here, shard_bytes=400)
    assert files_of(folder) == files_of(tmp_path / "unbroken")


def test_killed_at_any_moment_by_the_command_line(tmp_path):
    data = write_texts(tmp_path, 400)
    flags = f"{data} --tokenizer byte --shard-bytes 1000"
    command = [sys.executable, "-m", "jaxgpt", "prepare", *flags.split(), "--out", str(tmp_path / "broken")]
    surroundings = environment(tmp_path / "cache") | {"PYTHONPATH": str(ROOT)}
    for pattern, number in ((f"{UNFINISHED}/records-*", signal.SIGKILL), ("train-*.npy", signal.SIGTERM)):
        process = subprocess.Popen([*command, "--workers", "2"], env=surroundings, stdout=subprocess.PIPE, text=True)
        while not any((tmp_path / "broken").glob(pattern)):
            assert process.poll() is None
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == (75 if number == signal.SIGTERM else -number)
        assert "same command goes on" in out or number == signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "broken").glob("*.npy")}
    subprocess.run([*command, "--workers", "1"], env=surroundings, check=True, stdout=subprocess.DEVNULL)
    prepare_folder(config([data], held_out=0.1, vocab_size=4096), tmp_path / "unbroken", here, shard_bytes=1000)
    assert files_of(tmp_path / "broken") == files_of(tmp_path / "unbroken")
    assert sum(path.stat().st_mtime_ns == when for path, when in before.items()) >= len(before) - 2


def test_training_reads_the_folder_and_not_the_text(tmp_path, capsys):
    path, folder = write_texts(tmp_path, 200), tmp_path / "out"
    data = config([path], tokenizer="bpe", cache=str(tmp_path / "cache"))
    recipe = recipes.recipe("shakespeare-char-cpu")
    run = ["inspect", "shakespeare-char-cpu", "--rows", "12"]  # its own tokenizer is another
    assert (
        main([*run, *f"--data.path {path} --data.tokenizer bpe --data.vocab-size 270 --data.held-out 0.3".split()]) == 0
    )
    of_text = capsys.readouterr().out.partition("fields:")[2]
    prepare_folder(data, folder, here, shard_bytes=2000)
    path.unlink()
    assert main([*run, "--data.path", str(folder)]) == 0
    assert of_text and capsys.readouterr().out.partition("fields:")[2] == of_text
    prepared = lm.prepare(dataclasses.replace(recipe, data=shards.adopted(config([folder]))), print)
    assert prepared.data_fingerprint == json.loads((folder / PREPARED).read_text())["fingerprint"]
    assert (prepared.config.data.tokenizer, prepared.config.data.held_out) == ("bpe", 0.3)


def refused(capsys, line):
    assert main(line.split()) == 2
    (message,) = capsys.readouterr().err.splitlines()
    return message


def test_settings_that_contradict_a_folder_are_refused_by_name(tmp_path, capsys):
    folder = tmp_path / "out"
    prepare_folder(config([write_texts(tmp_path)]), folder, here)
    for flag, value in (("tokenizer", "bpe"), ("held-out", "0.2"), ("text-field", "body"), ("vocab-size", "300")):
        message = refused(capsys, f"inspect default --data.path {folder} --data.{flag} {value}")
        assert f"data.{flag} is {value}, but {folder} was prepared with" in message
    other = train_bpe(["abc"], 260)
    with pytest.raises(ValueError, match=r"another tokenizer than that of the model of init-from"):
        shards.prepare(DataConfig(path=(str(folder),)), tokenizer=other)
    assert shards.prepare(DataConfig(path=(str(folder),)), tokenizer=byte_tokenizer()).train.documents
    with pytest.raises(ValueError, match="is a folder of tokens made by jaxgpt prepare, and no text"):
        shards.prepare(DataConfig(path=(str(folder), str(tmp_path))))


def test_bad_input_is_one_line(tmp_path, capsys):
    path = write_texts(tmp_path)
    assert "text is missing" in refused(capsys, "prepare --out x")
    assert "--out is needed" in refused(capsys, f"prepare {path}")
    assert "read several times" in refused(capsys, f"prepare - --out {tmp_path / 'x'}")
    assert "no file or folder" in refused(capsys, f"prepare {tmp_path / 'none'} --out {tmp_path / 'x'}")
    assert "holds other files" in refused(capsys, f"prepare {path} --out {tmp_path}")
    assert "is a file" in refused(capsys, f"prepare {path} --out {path}")
    assert "no path" in refused(capsys, f"prepare {path} --out {tmp_path / 'x'} --tokenizer wordpiece")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    message = refused(
        capsys, f"prepare {path} {tmp_path / 'latin.txt'} --out {tmp_path / 'y'} --tokenizer byte --quiet"
    )
    assert "latin.txt is not UTF-8: byte 0xe9 at offset 3" in message
    assert "not prepared to the end" in refused(capsys, f"inspect default --data.path {tmp_path / 'y'}")
    assert not (tmp_path / "x").exists()


def test_a_folder_of_other_text_or_settings_is_left_alone(tmp_path):
    path, folder = write_texts(tmp_path), tmp_path / "out"
    prepare_folder(config([path]), folder, here)
    before, said = files_of(folder), []
    prepare_folder(config([path]), folder, here, say=said.append)
    assert said == [f"{folder} is prepared already"]
    for other in (config([path], held_out=0.2), config([path], tokenizer="bpe"), config([path, path])):
        with pytest.raises(FileExistsError, match="other text, of text that has changed since, or with other settings"):
            prepare_folder(other, folder, here)
    os.utime(path, ns=(1, 1))
    with pytest.raises(FileExistsError, match="has changed since"):
        prepare_folder(config([path]), folder, here)
    assert files_of(folder) == before


def test_text_that_changes_under_its_hands_is_noticed(tmp_path):
    path, folder = write_texts(tmp_path), tmp_path / "out"

    def meddles(function, values):
        yield from map(function, values)
        path.write_text(path.read_text().replace("a", "b"))

    with pytest.raises(ValueError, match=r"texts\.jsonl was changed while it was prepared"):
        prepare_folder(config([path]), folder, meddles)


def test_only_one_works_in_a_folder(tmp_path):
    path, folder = write_texts(tmp_path), tmp_path / "out"

    def meanwhile(function, values):
        with pytest.raises(FileExistsError, match="another jaxgpt prepare is at work"):
            prepare_folder(config([path]), folder, here)
        return map(function, values)

    prepare_folder(config([path]), folder, meanwhile)
    assert (folder / PREPARED).exists()


def test_workers_that_leave_something_out_are_noticed(tmp_path):
    def lazy(function, values):
        return map(function, [work for work in values if function.__name__ == "record" or work.number != 2])

    with pytest.raises(OSError, match="part 2 are not where its worker should have written them"):
        prepare_folder(config([write_texts(tmp_path)]), tmp_path / "out", lazy, shard_bytes=400)


@pytest.mark.parametrize("number", [1, 3])
def test_processes_do_the_same(tmp_path, number):
    path = write_texts(tmp_path)
    prepare_folder(config([path]), tmp_path / "a", here, shard_bytes=500)
    prepare_folder(config([path]), tmp_path / "b", in_processes(number), shard_bytes=500)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_ray_does_the_same(tmp_path):
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'ray[data]'")
    path = write_texts(tmp_path)
    prepare_folder(config([path]), tmp_path / "a", here, shard_bytes=500)
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        prepare_folder(config([path]), tmp_path / "b", clusters.on_ray(), shard_bytes=500)
    finally:
        ray.shutdown()
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_beam_does_the_same(tmp_path):
    pytest.importorskip("apache_beam", reason="needs Apache Beam: pip install apache-beam")
    from apache_beam.options.pipeline_options import PipelineOptions

    path = write_texts(tmp_path)
    prepare_folder(config([path]), tmp_path / "a", here, shard_bytes=500)
    local = PipelineOptions(["--runner=FnApiRunner"])
    prepare_folder(config([path]), tmp_path / "b", clusters.on_beam(local), shard_bytes=500)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
