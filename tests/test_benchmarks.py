"""The benchmarks run as a user runs them, and what they print hangs together."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys

import pytest
from program import ROOT, environment

TINY = ["--size", "tiny", "--vocab-size", "300", "--batch", "3", "--prompt-tokens", "8", "--new-tokens", "12"]
SMALL = ["shakespeare-char-cpu", "--batch-size", "4", "--sequence-length", "8", "--steps", "2", "--rounds", "2"]

PAIRS = ["--size", "tiny", "--vocab-size", "300", "--rounds", "2"]
PAIRS += ["--batch-size", "4", "--length", "6", "--steps", "2", "--sentences", "3", "--new-tokens", "5", "--seed", "1"]


def benchmark(cache, *arguments, script="train_step.py", devices=1, code=0):
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    env = environment(cache, devices) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture
def refusal(monkeypatch, capsys):
    """A function of (script, arguments): the one line that a benchmark says before it ends with exit code 2."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def of(script, arguments):
        assert importlib.import_module(script).main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return of


@pytest.mark.parametrize(("strategy", "devices"), [("single", 1), ("pmap", 2), ("mesh", 2)])
def test_train_step_measures_any_strategy(tmp_path, strategy, devices):
    done = benchmark(tmp_path, *SMALL, "--strategy", strategy, "--parts", "--json", devices=devices)
    result = json.loads(done.stdout.splitlines()[-1])
    parts = result["breakdown"]["parts"]
    assert set(parts) == {"attention", "mlp", "head", "optimizer", "data", "rest"}
    assert all(row["seconds"] > 0 for name, row in parts.items() if name != "rest")
    assert (result["strategy"], result["devices"], result["tokens_per_step"]) == (strategy, devices, 32)
    (ours,) = result["results"].values()
    rate, step = ours["tokens_per_second"], ours["seconds_per_step"]
    assert 0 < rate["min"] <= rate["median"] <= rate["max"] and rate["max"] == pytest.approx(32 / step["min"])
    flops = result["mfu"] * result["peak_flops"] / rate["median"]
    assert flops == pytest.approx(6 * (4 * 12 * 128**2 + 66 * 128) + 12 * 4 * 8 * 128)
    assert result["compile_seconds"] > 0 and ours["peak_memory_bytes"] >= result["state_bytes"]
    assert {"date", "processor", "versions"} <= result["environment"].keys()


def test_saving_measures_what_a_checkpoint_costs(tmp_path):
    flags = ["--batch-size", "4", "--sequence-length", "8", "--saves", "2", "--json"]
    result = json.loads(benchmark(tmp_path, *flags, script="saving.py").stdout.splitlines()[-1])
    cost = result["seconds_waited"]["median"] + result["seconds_slower"]["median"]
    assert result["share"] == pytest.approx(cost / (100 * result["seconds_per_step"]["median"]))
    assert result["checkpoint_bytes"] > 1e6 and result["seconds_waited"]["min"] > 0


def test_plan_memory_compares_what_is_planned_with_what_is_taken(tmp_path):
    flags = ["--recipes", "shakespeare-char-cpu", "--batch-size", "4", "--json"]
    result = json.loads(benchmark(tmp_path, *flags, script="plan_memory.py").stdout.splitlines()[-1])
    (row,) = result["results"].values()
    assert min(row["planned"], row["measured"], row["by_formula"]) > row["state_bytes"] > 4 * row["parameters"]
    assert row["error"] == pytest.approx(row["planned"] / row["measured"] - 1)


def test_train_step_puts_pytorch_beside_it(tmp_path):
    pytest.importorskip("transformers", reason="needs torch and transformers, which only the comparison installs")
    done = benchmark(tmp_path, *SMALL, "--vs", "torch", "plain", "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    losses = result["first_losses"]
    assert losses == pytest.approx(dict.fromkeys(("ours", "torch", "plain"), losses["ours"]), rel=1e-5)
    ours = result["results"].pop("ours")["tokens_per_second"]
    for peer in result["results"].values():
        theirs, ratio = peer["tokens_per_second"], peer["ratio"]
        assert ours["min"] / theirs["max"] <= ratio["min"] * 1.001 <= ratio["median"] * 1.001 <= ratio["max"] * 1.002
        assert ratio["max"] <= ours["max"] / theirs["min"] * 1.001
        assert peer["peak_memory_bytes"] >= result["state_bytes"] * 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shakespeare-cha"], "did you mean shakespeare-char?"),
        ([*SMALL, "--strategy", "pmap", "--gradient-accumulation", "3"], "does not divide"),
        ([*SMALL, "--step", "3"], "did you mean --steps?"),
        ([*SMALL, "--compile"], "it needs --vs"),
        (["shakespeare-fast", "--vs", "plain"], "model.positions"),
    ],
)
def test_bad_input_is_one_line(refusal, arguments, message):
    assert message in refusal("train_step", arguments)


def test_bad_input_ends_the_process_with_2(tmp_path):
    assert benchmark(tmp_path, "shakespeare-cha", code=2).stderr.startswith("train_step.py: ")


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """What generate.py prints beside all the peers that are installed."""
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason=f"needs {package}, which only the comparison installs")
    peers = ["hf", *(["ctranslate2"] if importlib.util.find_spec("ctranslate2") else [])]
    options = [*TINY, "--rounds", "2", "--lookup", "2", "--vs", *peers, "--json"]
    done = benchmark(tmp_path_factory.mktemp("cache"), *options, script="generate.py")
    return json.loads(done.stdout.splitlines()[-1])


def test_generate_measures_ours(generated):
    assert generated["benchmark"] == "generate" and generated["options"]["new_tokens"] == 12
    assert {"date", "processor", "versions"} <= generated["environment"].keys()
    (measured,) = generated["batches"]
    assert measured["batch"] == 3 and measured["distinct_tokens_per_text"] > 3, "else agreement shows nothing"
    ours = measured["results"]["ours"]
    for name, row in measured["results"].items():
        for spread in (row["tokens_per_second"], row["first_token_seconds"]):
            assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        if name != "ours":
            greatest = ours["tokens_per_second"]["max"] / row["tokens_per_second"]["min"]
            assert 0 < row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"] <= greatest * 1.001


@pytest.mark.parametrize("name", ["ours, lookup 2", "hf", "ctranslate2 float32"])
def test_generate_makes_the_same_tokens_as_a_peer(generated, name):
    if name.startswith("ctranslate2"):
        pytest.importorskip("ctranslate2", reason="needs ctranslate2, which only the comparison installs")
    results = generated["batches"][0]["results"]
    assert results[name]["agreement"] == {"equal_tokens": 1.0, "equal_texts": 3, "first_difference": None}
    assert "ctranslate2 int8" in results or "ctranslate2 float32" not in results


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "tny"], "did you mean tiny?"),
        (["--size", "tiny"], "128 tokens do not fit the context of 64"),
        ([*TINY, "--batch", "0"], "each must be at least 1"),
        ([*TINY, "--vs", "torch"], "invalid choice 'torch'"),
    ],
)
def test_bad_input_to_generate_is_one_line(refusal, arguments, message):
    assert message in refusal("generate", arguments)


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed, and so not missing")
@pytest.mark.parametrize("peer", ["hf", "ctranslate2"])
def test_generate_says_what_a_peer_needs(tmp_path, peer):
    err = benchmark(tmp_path, *TINY, "--vs", peer, script="generate.py", code=2).stderr
    assert f"--vs {peer} needs" in err and "pip install" in err and len(err.splitlines()) == 1


@pytest.fixture(scope="module")
def translated(tmp_path_factory):
    """What translate.py prints beside PyTorch."""
    pytest.importorskip("transformers", reason="needs torch and transformers, which only the comparison installs")
    cache = tmp_path_factory.mktemp("cache")
    done = benchmark(cache, *PAIRS, "--beams", "1", "3", "--vs", "torch", "--json", script="translate.py")
    return json.loads(done.stdout.splitlines()[-1])


def test_translate_trains_the_same_model_as_pytorch(translated):
    assert translated["benchmark"] == "translate" and translated["options"]["size"] == "tiny"
    assert {"date", "processor", "versions"} <= translated["environment"].keys()
    trained = translated["training"]
    losses, results = trained["losses"], trained["results"]
    assert losses["ours"] == pytest.approx(losses["torch"], rel=1e-4) and losses["ours"][-1] < losses["ours"][0]
    of_blocks = 4 * (2 * (4 * 128 * 129 + 128 * 256 * 2 + 256 + 128) + 4 * 128 * 129 + 5 * 2 * 128)
    assert trained["parameters"] == 300 * 128 + of_blocks
    assert results.keys() == {"ours", "torch"}
    for row in results.values():
        rate = row["target_tokens_per_second"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
    rate = {name: row["target_tokens_per_second"] for name, row in results.items()}
    ratio = results["torch"]["ratio"]
    least, greatest = rate["ours"]["min"] / rate["torch"]["max"], rate["ours"]["max"] / rate["torch"]["min"]
    assert 0.999 * least <= ratio["min"] <= ratio["median"] <= ratio["max"] <= greatest * 1.001


def test_translate_makes_the_same_tokens_as_marian(translated):
    assert [decoded["beams"] for decoded in translated["decoding"]] == [1, 3]
    for decoded in translated["decoding"]:
        assert decoded["distinct_tokens_per_text"] > 1.5, "else agreement shows nothing"
        agreed = decoded["results"]["transformers"]["agreement"]
        assert agreed == {"equal_tokens": 1.0, "equal_texts": 3, "first_difference": None}
        assert decoded["results"]["ours"]["sentences_per_second"]["min"] > 0


def test_translate_measures_one_part_alone(tmp_path):
    done = benchmark(tmp_path, *PAIRS, "--parts", "train", "--dropout", "0.1", "--json", script="translate.py")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["training"]["results"].keys() == {"ours"} and "decoding" not in result


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "bse"], "did you mean base?"),
        (["--new-tokens", "300"], "300 tokens do not fit the context of 256"),
        ([*PAIRS, "--beams", "0"], "each must be at least 1"),
        ([*PAIRS, "--compile", "--vs", "none"], "needs --vs torch"),
    ],
)
def test_bad_input_to_translate_is_one_line(refusal, arguments, message):
    assert message in refusal("translate", arguments)


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed, and so not missing")
def test_translate_says_what_a_peer_needs(tmp_path):
    err = benchmark(tmp_path, *PAIRS, "--vs", "torch", script="translate.py", code=2).stderr
    assert "--vs torch needs" in err and "pip install" in err and len(err.splitlines()) == 1


def test_attention_is_measured_beside_pytorch(tmp_path):
    pytest.importorskip("torch", reason="needs torch, which only the comparison installs")
    options = ["--lengths", "5", "130", "--heads", "2", "--head-width", "8", "--rounds", "2", "--vs", "torch", "--json"]
    done = benchmark(tmp_path, *options, script="attention.py")
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert [result["length"] for result in results] == [5, 130]
    for result in results:
        rate = result["results"]["ours"]["calls_per_second"]
        assert rate["min"] <= rate["median"] <= rate["max"] and result["results"]["torch"]["ratio"]["median"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "0"], "each must be at least 1"),
        (["--heads", "0"], "heads is 0; it must be at least 1"),
        (["--vs", "torch", "--dtype", "bfloat16"], "beside torch the dtype is float32, not bfloat16"),
    ],
)
def test_bad_input_to_attention_is_one_line(refusal, arguments, message):
    assert message in refusal("attention", arguments)


def test_scaling_puts_several_devices_beside_one(tmp_path):
    small = ["--batch-size", "4", "--sequence-length", "8", "--steps", "1", "--rounds", "1"]
    done = benchmark(tmp_path, "--devices", "2", "--strategies", "pmap", *small, "--json", script="scaling.py")
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert set(results) == {"single x 1", "pmap x 2"}
    assert all(row["tokens_per_second"]["median"] > 0 for row in results.values())


def test_the_suite_keeps_what_each_benchmark_measured_and_draws_it(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "results"
    done = benchmark(tmp_path, "--only", "attention", "--peers", "False", "--out", str(out), script="run.py")
    assert "== attention: python benchmarks/attention.py" in done.stdout and "1 of 1 measured" in done.stdout
    assert {path.name for path in out.iterdir()} == {"environment.json", "attention.json", "attention.png"}
    assert [one["length"] for one in json.loads((out / "attention.json").read_text())["results"]] == [
        128,
        256,
        512,
        1024,
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "atention"], "there is no benchmark atention; did you mean attention?"),
        (["--only", "zzz"], "there is no benchmark zzz; there are train_step, attention, "),
        (["--form", "long"], "long"),
    ],
)
def test_bad_input_to_the_suite_is_one_line(refusal, arguments, message):
    assert message in refusal("run", arguments)
