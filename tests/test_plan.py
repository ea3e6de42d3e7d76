"""What a plan says is what happens: bytes of the state, memory of a real step, and that what does not fit is said."""

import dataclasses
import itertools
import json
import math

import jax
import pytest

from jaxgpt import plan as planning
from jaxgpt.cli import main
from jaxgpt.config import DataConfig, GPTConfig, TrainConfig
from jaxgpt.plan import CHIPS, GIB, Chip, chip_of, estimate, fitted, prepared, search
from jaxgpt.recipes import recipe

SMALL = TrainConfig(
    model=GPTConfig(vocab_size=64, context=16, layers=2, heads=2, width=32, bias=False),
    data=DataConfig(batch_size=8),
)
SMALLER = "--model.layers 1 --model.width 32 --model.heads 2 --model.vocab-size 64 --data.batch-size 8"
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def test_state_on_a_device_is_what_it_is_there():
    """Of every kind that is known exactly, by formula and compiled; the compiler's temporaries are more than none."""
    made, notes = planning.plan(SMALL, "local", MESH)
    by_formula = estimate(made.setting, None)
    assert made.source == "compiled" and by_formula.source == "by formula" and not notes
    for kind in ("parameters", "optimizer state", "gradients"):
        assert made.kinds[kind] == by_formula.kinds[kind]
    count = 4 * sum(x.size for x in jax.tree.leaves(planning.state_shapes(SMALL).parameters))
    assert count / 4 < made.kinds["parameters"] < count / 3  # matrices in four parts, norms whole
    assert made.kinds["activations and other temporaries"] > 0
    assert made.collective_bytes > 0
    assert not made.seconds and math.isnan(made.step_seconds) and made.fits  # of an unknown chip nothing is said


def test_one_device_sends_nothing():
    made, _ = planning.plan(SMALL, "local", {"data": 1})
    assert made.collective_bytes == 0 and estimate(made.setting, None).collective_bytes == 0


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x2"])
def test_limits_and_shares(topology):
    """By formula: fewer bytes with fsdp, more work with remat but less memory, and nothing above the peak."""
    chip = chip_of(topology)
    config = recipe("gpt2")
    setting = lambda model, **mesh: fitted(dataclasses.replace(config, model=model), mesh)[0]  # noqa: E731
    plain, cut = estimate(setting(config.model, data=16), chip), estimate(setting(config.model, fsdp=16), chip)
    assert cut.kinds["optimizer state"] < plain.kinds["optimizer state"] / 15
    assert cut.collective_bytes > plain.collective_bytes
    again = estimate(setting(dataclasses.replace(config.model, remat=True), data=16), chip)
    assert again.bytes < plain.bytes and again.seconds["computing"] > plain.seconds["computing"]
    for one in (plain, cut, again):
        assert 0 < one.mfu <= 1 and one.step_seconds == max(one.seconds.values())
        assert one.tokens_per_second * one.step_seconds == pytest.approx(one.setting.config.tokens_per_step)


def test_a_search_finds_only_what_fits_the_fastest_first():
    found = list(search(recipe("gpt2-medium"), "v5e:4x4"))
    assert len(found) > 10 and all(one.fits for one in found)
    speeds = [one.tokens_per_second for one in found]
    assert all(b <= a + 1000 for a, b in itertools.pairwise(speeds))
    assert {one.setting.devices for one in found} == {16}


def test_what_needs_more_than_a_chip_has_does_not_fit(monkeypatch):
    monkeypatch.setitem(CHIPS, "v5e", Chip(197e12, GIB / 2**12, 819e9, 200e9, 2))
    setting, _ = fitted(SMALL, {"data": 4})
    assert not estimate(setting, CHIPS["v5e"]).fits


@pytest.mark.parametrize(
    ("rows", "accumulation", "mesh", "expected"),
    [(480, 5, {"data": 256}, (512, 2)), (480, 5, {"data": 16}, (480, 5)), (8, 3, {"fsdp": 4}, (8, 2))],
)
def test_batches_are_made_to_divide(rows, accumulation, mesh, expected):
    config = dataclasses.replace(
        SMALL,
        data=dataclasses.replace(SMALL.data, batch_size=rows),
        parallel=dataclasses.replace(SMALL.parallel, gradient_accumulation=accumulation),
    )
    setting, notes = fitted(config, mesh)
    assert (setting.config.data.batch_size, setting.config.parallel.gradient_accumulation) == expected
    assert bool(notes) == (expected[0] != rows)
    shares = math.prod(mesh.values())
    assert setting.micro_tokens * shares * expected[1] == setting.config.tokens_per_step


def test_a_vocabulary_that_only_the_data_knows_is_said():
    unknown = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, vocab_size=None))
    config, (note,) = prepared(unknown, "local")
    assert config.model.vocab_size and f"{config.model.vocab_size:,} tokens" in note


def test_the_verb(capsys):
    flags = SMALLER.split()
    assert main(["plan", "shakespeare-char-cpu", "--json", *flags, "--mesh", "data=4,fsdp=2"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1} and said["source"] == "compiled"
    assert said["total_bytes"] == sum(said["bytes"].values())
    assert main(["plan", "shakespeare-char-cpu", *flags]) == 0
    out = capsys.readouterr().out
    assert "together, a device" in out and "compiled" in out and "MFU" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("gpt2 --topology v9:2x2", "topology 'v9:2x2' is not VERSION:SHAPE with a version of v4, v5e, v5p, v6e"),
        ("gpt2 --topology v5e", "topology 'v5e' is not VERSION:SHAPE"),
        ("gpt2 --topology v5e:2x2x2", "topology 'v5e:2x2x2' has 3 dimensions; v5e has 2"),
        ("translate", "translate does not pretrain a GPT"),
        ("gpt3", "there is no recipe gpt3"),
        ("gpt2 --mesh data=9", "has 9 places"),
        ("gpt2 --mesh model=3", "'model=3' is not AXIS=SIZE"),
        ("gpt2 --search", "--search needs a topology whose chips are known"),
        ("gpt2 --search --mesh data=2", "leave out --mesh"),
        ("gpt2 --topologie v5e:2x2", "there is no setting --topologie"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert main(["plan", *arguments.split()]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
