"""The whole program, from its command line: the same run on any number of devices and after any fault."""

from __future__ import annotations

import json
import shutil
import signal

import jax
import numpy as np
import pytest
from program import SMALL, metrics, run, start, stop_after, write_text

from jaxgpt.config import TrainConfig, from_dict
from jaxgpt.models.gpt import init_parameters
from jaxgpt.storage.checkpoint import Checkpoints
from jaxgpt.training.optimizer import make_optimizer

DROPOUT = "--model.dropout 0.2 --data.batch-size 8 --eval-interval 1000 --log-interval 1"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache, text):
    """A run of two steps, which was told to print nothing, and printed it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run(f"{SMALL} --data.path {text} --steps 2 --quiet --out {folder}", cache) == ("", "")
    return folder


def final_state(folder, step):
    """Parameters and optimiser state as the last checkpoint holds them."""
    config = from_dict(TrainConfig, json.loads((folder / "config.json").read_text())["config"])

    parameters = jax.eval_shape(lambda: init_parameters(config.model, jax.random.key(0)))
    optimizer = make_optimizer(config.optimizer, config.steps)
    shapes = {"parameters": parameters, "optimizer": jax.eval_shape(optimizer.init, parameters)}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return Checkpoints(folder / "checkpoints", read_only=True).restore(step, shapes, device)[0]


def test_losses_do_not_depend_on_the_number_of_devices(tmp_path, cache, text):
    """20 steps on one device, on eight, and in micro-batches: within 1e-5 relative, dropout on.

    The programs of the first are those of users, with all optimisations, and those of the others plain.
    """
    common = f"{SMALL} {DROPOUT} --data.path {text} --steps 20 --quiet --model.vocab-size 258"
    runs = {
        "one": (1, ""),
        "eight": (8, ""),
        "accumulated": (2, "--parallel.gradient-accumulation 4"),
        "mesh": (8, "--parallel.mesh data=2,fsdp=2,tensor=2"),
    }
    losses = {}
    for name, (devices, flags) in runs.items():
        run(f"{common} --out {tmp_path / name} {flags}", cache, devices, optimised=name == "one")
        losses[name] = list(metrics(tmp_path / name).values())
    assert len(losses["one"]) == 20
    for name, values in losses.items():
        np.testing.assert_allclose(values, losses["one"], rtol=1e-5, err_msg=name)


def test_a_killed_run_resumed_is_the_unbroken_run(tmp_path, cache, text):
    """kill -9 after the checkpoint of step 100, then resume: every bit and every batch as if nothing had happened."""
    common = f"{SMALL} {DROPOUT} --data.path {text} --steps 400 --checkpoint-interval 100 --quiet"
    run(f"{common} --out {tmp_path / 'unbroken'}", cache)
    killed = start(f"{common} --out {tmp_path / 'killed'}", cache)
    assert stop_after(killed, tmp_path / "killed" / "checkpoints" / "100", signal.SIGKILL) == -signal.SIGKILL
    run(f"--out {tmp_path / 'killed'} --resume --quiet", cache)
    for name in ("train/loss", "gradient_norm", "eval/loss"):
        assert metrics(tmp_path / "killed", name) == metrics(tmp_path / "unbroken", name)
    states = [final_state(tmp_path / name, 400) for name in ("killed", "unbroken")]
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_asks_to_be_started_again(tmp_path, cache, text, number):
    process = start(f"{SMALL} {DROPOUT} --data.path {text} --steps 100000 --out {tmp_path / 'run'}", cache)
    assert stop_after(process, tmp_path / "run" / "metrics.jsonl", number) == 75
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    out, _ = run(f"--out {tmp_path / 'run'} --resume --steps {int(saved.name) + 3}", cache)
    assert f"resuming at step {int(saved.name):,}" in out
    assert max(metrics(tmp_path / "run")) == int(saved.name) + 3


def test_a_run_leaves_every_file(tmp_path, cache, text):
    out, _ = run(f"{SMALL} --data.path {text} --steps 30 --eval-interval 10 --out {tmp_path / 'run'}", cache)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "metrics.jsonl", "curves.png", "samples.txt", "tokenizer.json", "checkpoints"}
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "train/loss" in r] == [*range(1, 21), 30]
    assert [r["step"] for r in records if "eval/loss" in r] == [0, 10, 20, 30]
    assert all({"eval/bits_per_byte", "seconds"} <= r.keys() for r in records if "eval/loss" in r)
    assert all({"tokens_per_second", "seconds"} <= r.keys() for r in records if "train/loss" in r)
    evaluations = metrics(tmp_path / "run", "eval/loss")
    assert evaluations[30] < evaluations[0]
    assert "parameters" in out and "held-out loss" in out and str(tmp_path / "run") in out


def test_a_run_ends_by_the_clock_with_its_schedule_at_the_end(tmp_path, cache, text):
    """The rate falls with the share of the time used: the last steps of a short budget are annealed."""
    flags = f"--steps 1000000 --max-seconds 10 --eval-interval 1000000 --out {tmp_path / 'run'} --tensorboard"
    run(f"{SMALL} --data.path {text} {flags}", cache)
    steps = metrics(tmp_path / "run")
    assert 0 < max(steps) < 1_000_000
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    seconds = metrics(tmp_path / "run", "seconds")
    assert max(seconds.values()) < 60


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoint(tmp_path, cache, text):
    flags = "--optimizer.learning-rate 1e18 --optimizer.warmup-steps 0 --optimizer.schedule constant --steps 50"
    _, err = run(f"{SMALL} --data.path {text} {flags} --checkpoint-interval 1 --out {tmp_path / 'run'}", cache, code=1)
    assert "at step" in err and "the last good checkpoint is step" in err and len(err.splitlines()) == 1
    for step in (tmp_path / "run" / "checkpoints").iterdir():
        state = final_state(tmp_path / "run", int(step.name))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["parameters"]))


def test_a_watchdog_ends_a_run_in_which_nothing_ends(tmp_path, cache, text):
    """Compilation takes longer than the time that is given."""
    flags = f"--steps 5 --watchdog-seconds 0.001 --quiet --model.layers 3 --out {tmp_path / 'run'}"
    out, err = run(f"{SMALL} --data.path {text} {flags}", cache, code=1)
    assert out == "" and "nothing was done for 0.001 seconds, in " in err and "most recent call first" in err
    assert f"jaxgpt inspect {tmp_path / 'run'} --batch 0" in err or "batch 0 of the evaluation after step 0" in err


def test_a_damaged_checkpoint_is_refused(tmp_path, cache, trained):
    shutil.copytree(trained, tmp_path / "run")
    for tree, arguments in [
        ("optimizer", f"--out {tmp_path / 'run'} --steps 4 --resume"),
        ("parameters", f"generate --model {tmp_path / 'run'} --prompt a --max-new-tokens 2"),
    ]:
        files = (tmp_path / "run" / "checkpoints" / "2" / tree).rglob("d/*")
        payload = max(files, key=lambda path: path.stat().st_size)
        data = bytearray(payload.read_bytes())
        data[len(data) // 2] ^= 1
        payload.write_bytes(data)
        _, err = run(arguments, cache, code=2)
        assert "checkpoints/2 cannot be read" in err and len(err.splitlines()) == 1


def test_generate_writes_json_a_prompt(cache, trained):
    common = f"generate --model {trained} --max-new-tokens 5 --temperature 0.7 --top-k 9"
    out, _ = run(f"{common} --prompt ab cd --seed 3 --json", cache)
    first, second = (json.loads(line) for line in out.splitlines())
    assert (first["prompt"], second["prompt"]) == ("ab", "cd")
    assert first.keys() == {"prompt", "text", "tokens", "logprobs", "finish_reason"}
    assert len(first["tokens"]) == 5 and first["finish_reason"] == "length"
    plain, _ = run(f"{common} --prompt ab --seed 3", cache)
    assert plain == "ab" + first["text"] + "\n"
