"""The command line: bad input is one line and exit code 2, flags come in both spellings, help is complete."""

import io
import json
import sys
import threading

import pytest

from jaxgpt.arguments import parse
from jaxgpt.cli import main
from jaxgpt.cli.text import GenerateOptions, _standard_input
from jaxgpt.config import TrainConfig
from jaxgpt.recipes import RECIPES, recipe

SMALL = {"model.layers": 1, "model.heads": 1, "model.width": 8, "model.context": 8, "model.unroll": 1}
SMALL |= {"data.tokenizer": "byte", "data.batch-size": 4, "steps": 2, "sample-tokens": 4, "parallel.strategy": "single"}
TINY = [f"--{key}={value}" for key, value in SMALL.items()]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # the program sets its own
    monkeypatch.chdir(tmp_path)


def train_config(*flags):
    return parse(TrainConfig, list(flags), prog="jaxgpt train", default=recipe("default"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no verb trian; did you mean train?"),
        (["generat", "--model", "x"], "did you mean generate?"),
        (["train", "shakespear-char"], "no recipe shakespear-char; did you mean shakespeare-char?"),
        (["train", "--modl.layers", "2"], "--modl.layers; did you mean --model.layers?"),
        (["train", "--model.layer=2"], "--model.layer; did you mean --model.layers?"),
        (["train", "--step", "3"], "--step; did you mean --steps?"),
        (["generate", "--model", "x", "--max-tokens", "3"], "did you mean --max-new-tokens?"),
        (["plan", "gpt2", "--topolgy", "v5e:4x4"], "--topolgy; did you mean --topology?"),
        (["chat", "--model", "nowhere", "--weights", "int8"], "there is no folder nowhere"),
        (["train", "--steps", "many"], "many"),
        (["train", "--steps", "1.5"], "1.5"),
        (["train", "--steps"], "--steps"),
        (["train", "--quiet", "maybe"], "aybe"),
        (["train", "--parallel.strategy", "pmapp"], "pmapp"),
        (["train", "--steps", "0"], "steps is 0; it must be at least 1"),
        (["train", "--model.heads", "5"], "model.heads is 5, which does not divide model.width"),
        (["train", "--model.dropout", "1"], "model.dropout is 1.0; it must be in [0, 1)"),
        (["train", "--data.sequence-length", "99999"], "longer than the model's context of 128 tokens"),
        (["train", "--data.path", "nowhere.txt"], "no file or folder nowhere.txt"),
        (["train", "gpt2", "extra"], "extra"),
        (
            ["train", "--init-from", "nowhere", "--model.layers=2"],
            "--model.layers is given, and the base, the model of",
        ),
        (
            ["train", "finetune", "--model.dropout", "0", "--model.bias", "--init-from", "nowhere"],
            "--model.bias is given",
        ),
        (["train", "chat", "--init-from", "nowhere", "--model.context", "9"], "--model.context is given, and the base"),
        (["inspect", "chat", "--init-from", "nowhere", "--model.width", "12"], "--model.width is given, and the base"),
        (["generate"], "--model"),
        (["generate", "--model", "nowhere", "--prompt", "a"], "there is no folder nowhere"),
        (["generate", "--model", "./nowhere", "--prompt", "a"], "there is no folder ./nowhere"),
        (["generate", "--model", "x", "--temperature", "-1"], "temperature is -1.0; it must be at least 0"),
        (["generate", "--model", "x", "--top-p", "0"], "top-p is 0.0; it must be in (0, 1]"),
        (["generate", "--model", "x", "--top-p", "1.5"], "top-p is 1.5; it must be in (0, 1]"),
        (["generate", "--model", "x", "--beams", "3", "--top-k", "4"], "top-k has no meaning with beams 3"),
        (["generate", "--model", "x", "--beams", "2", "--samples", "3"], "samples is 3, more than beams 2"),
        (["export", "--model", "x"], "--out is needed"),
        (["evaluate", "--model", "x"], "--data is needed"),
        (["evaluate", "--model", "x", "--data", "y", "--stride", "0"], "stride is 0; it must be at least 1"),
        (["verify", "--model", "x", "--reference", "tf"], "tf"),
        (["generate", "--model", "nowhere", "--top-k", "0"], "top-k is 0"),
        (["generate", "--model", "nowhere", "--max-new-tokens", "0"], "max-new-tokens is 0; it must be at least 1"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, arguments, message):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and len(err.splitlines()) == 1 and err.startswith("jaxgpt: ")
    assert not out and not list(tmp_path.glob("runs"))


def test_an_unexpected_failure_is_another_exit_code(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", object())  # has no bytes to read
    assert main(["train", "--data.path", "-", "--quiet"]) == 1
    _, err = capsys.readouterr()
    assert err.startswith("jaxgpt: AttributeError: ") and len(err.splitlines()) == 1
    assert main(["train", "--data.path", "-", "--quiet", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_run_that_fails_is_exit_code_1(capsys, tmp_path):
    (tmp_path / "text.txt").write_text("abcd " * 200)
    flags = "--data.path text.txt --out r --optimizer.learning-rate 1e30 --optimizer.warmup-steps 0 --steps 19 --quiet"
    assert main(["train", *TINY, *flags.split()]) == 1
    _, err = capsys.readouterr()
    assert "at step" in err and len(err.splitlines()) == 1


def test_flags_come_in_both_spellings():
    spellings = [("--steps", "7"), ("--steps=7",)]
    assert [train_config(*flags).steps for flags in spellings] == [7, 7]
    assert train_config("--model.bias=True").model.bias and train_config("--model.bias", "True").model.bias
    assert not train_config("--model.tied-head", "False").model.tied_head
    assert train_config("--data.path", "a.txt", "b.txt", "--steps", "3").data.path == ("a.txt", "b.txt")
    assert train_config("--optimizer.clip-norm", "None").optimizer.clip_norm is None
    assert train_config("--optimizer.learning-rate=3e-4").optimizer.learning_rate == 3e-4
    assert train_config("--data.path", "-").data.path == ("-",)


def test_a_bare_flag_is_yes():
    assert train_config("--quiet").quiet and train_config("--quiet", "--steps", "3").quiet
    assert not train_config("--quiet", "False").quiet and not train_config("--quiet=False").quiet
    assert train_config("--resume").resume == "latest" and train_config("--resume", "--quiet").quiet
    assert train_config("--resume", "never").resume == "never"
    assert train_config("--tensorboard", "--quiet", "--model.remat").model.remat
    assert parse(GenerateOptions, ["--model", "m", "--json"], prog="jaxgpt generate").json


def test_what_is_not_given_stays_the_recipes():
    assert train_config() == recipe("default")
    changed = parse(TrainConfig, ["--seed", "5"], prog="jaxgpt train", default=recipe("gpt2"))
    assert changed.seed == 5 and changed.model == recipe("gpt2").model


def test_help_lists_verbs_and_recipes(capsys):
    assert main(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("jaxgpt ")
    assert main([]) == 2
    capsys.readouterr()
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in RECIPES)
    assert all(flag in out for flag in ("--steps", "--data.batch-size", "--parallel.strategy", "--max-seconds"))
    assert main(["generate", "--help"]) == 0
    assert "--max-new-tokens" in capsys.readouterr().out


def test_what_a_run_decides_beside_its_base_is_taken(capsys):
    own = "--model.dropout=0.1 --model.embedding-dropout=0 --model.attention-dropout=0 --model.attention=blocked "
    own += "--model.remat --model.unroll=1 --model.compute-dtype=bfloat16 --model.parameter-dtype=float32"
    for name in ("default", "finetune", "chat"):
        assert main(["train", name, "--init-from", "./nowhere", *own.split()]) == 2
        assert capsys.readouterr().err == "jaxgpt: there is no folder ./nowhere\n", "which is looked for after all that"


def test_a_budget_without_a_step_is_said(capsys, tmp_path):
    (tmp_path / "text.txt").write_text("abcd " * 200)
    flags = [*TINY, "--data.path", "text.txt", "--out", "run", "--quiet"]
    assert main(["train", *flags, "--max-seconds", "0.001"]) == 2
    _, err = capsys.readouterr()
    assert err.startswith("jaxgpt: no step was made in max-seconds 0.001: the first evaluation, and as much for")
    assert len(err.splitlines()) == 1
    assert main(["train", *flags, "--max-seconds", "600", "--resume"]) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2


def test_train_then_generate(capsys, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("abcd " * 200)
    assert main(["train", *TINY, "--data.path", "text.txt", "--out", "run"]) == 0
    out, _ = capsys.readouterr()
    assert "parameters" in out and "held-out loss" in out and "run" in out
    assert main(["train", *TINY, "--data.path", "text.txt", "--out", "run"]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert main(["train", "gpt2", "--out", "run", "--resume"]) == 2
    assert "trained with the recipe default, not gpt2" in capsys.readouterr().err
    assert main(["train", "--out", "run", "--resume", "--seed", "9"]) == 2
    assert "was trained with seed 1337, not 9" in capsys.readouterr().err
    assert main(["train", "--out", "run", "--resume", "--steps", "3", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["train", "--out", "run"]) == 2
    assert "holds another run" in capsys.readouterr().err

    common = ["generate", "--model", "run", "--max-new-tokens", "4", "--seed", "3"]
    assert main([*common, "--prompt", "ab", "c", "--json"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [set(first), first["prompt"], second["prompt"]] == [
        {"prompt", "text", "tokens", "logprobs", "finish_reason"},
        "ab",
        "c",
    ]
    assert first["finish_reason"] in ("stop", "length") and all(isinstance(token, int) for token in first["tokens"])
    assert main([*common, "--prompt", "ab"]) == 0
    assert capsys.readouterr().out == "ab" + first["text"] + "\n"
    assert main([*common, "--prompt", "ab", "--stop-tokens", *map(str, range(257))]) == 0
    assert capsys.readouterr().out == "ab\n", "the prompt is printed also where nothing follows"
    assert main([*common, "--prompt", "ab", "c", "--samples", "2"]) == 0
    assert capsys.readouterr().out.count("---\n") == 3
    assert main([*common, "--prompt", "abcdefgh"]) == 2
    assert "4 more than the context of 8" in capsys.readouterr().err


def test_a_prompt_that_is_not_utf8_is_named(monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO(b"def \xff"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", typed)
    with pytest.raises(ValueError, match="standard input is not UTF-8: byte 0xff"):
        _standard_input()
