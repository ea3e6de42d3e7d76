"""The benchmarks run as a user runs them, and what they print hangs together."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from program import ROOT, environment

SMALL = ["shakespeare-char-cpu", "--batch-size", "4", "--sequence-length", "8", "--steps", "2", "--rounds", "2"]


def benchmark(cache, *arguments, devices=1, code=0):
    command = [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), *arguments]
    env = environment(cache, devices) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.parametrize(("strategy", "devices"), [("single", 1), ("pmap", 2), ("mesh", 2)])
def test_train_step_measures_any_strategy(tmp_path, strategy, devices):
    done = benchmark(tmp_path, *SMALL, "--strategy", strategy, "--json", devices=devices)
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["strategy"], result["devices"], result["tokens_per_step"]) == (strategy, devices, 32)
    assert result["tokens_per_second"] == pytest.approx(32 / result["seconds_per_step"]["median"], rel=0.5)
    flops = result["mfu"] * result["peak_flops"] / result["tokens_per_second"]
    assert flops == pytest.approx(6 * (4 * 12 * 128**2 + 66 * 128) + 12 * 4 * 8 * 128)
    assert result["compile_seconds"] > 0 and result["peak_memory_bytes"] >= result["state_bytes"]
    assert {"date", "processor", "versions"} <= result["environment"].keys()


def test_train_step_puts_pytorch_beside_it(tmp_path):
    pytest.importorskip("transformers", reason="needs torch and transformers, which only the comparison installs")
    done = benchmark(tmp_path, *SMALL, "--vs", "torch", "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["peer"] == "torch"
    assert result["ratio"] == pytest.approx(result["ours"]["median"] / result["theirs"]["median"])
    assert result["ours"]["min"] <= result["ours"]["median"] <= result["ours"]["max"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shakespear"], "did you mean shakespeare-char?"),
        ([*SMALL, "--strategy", "pmap", "--gradient-accumulation", "3"], "does not divide"),
        ([*SMALL, "--step", "3"], "did you mean --steps?"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, message):
    err = benchmark(tmp_path, *arguments, code=2).stderr
    assert message in err and len(err.splitlines()) == 1
