"""The loop on a task of a few numbers: what it leaves out, when it saves, how it ends; always the same run again."""

import itertools
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.array import ArrayImpl

from jaxgpt.config import OptimizerConfig, ParallelConfig, RunConfig
from jaxgpt.storage.checkpoint import Checkpoints
from jaxgpt.storage.runs import RunFolder
from jaxgpt.training.loop import train
from jaxgpt.training.parallel import choose_layout
from jaxgpt.training.report import Reporter
from jaxgpt.training.watchdog import Watchdog


class Regression:
    """A task: linear regression, with targets of `bad` steps that are not to be learned from.

    SIGTERM comes when the batch of step `signal_at` is made, when the loss is compiled, or within the evaluation of the
    number `signal_evaluation`.
    """

    width, unit = 3, "rows"

    def __init__(self, bad=None, signal_at=None, signal_compiling=False, signal_evaluation=None):
        self.bad, self.signal_at, self.signal_compiling = bad or {}, signal_at, signal_compiling
        self.signal_evaluation, self.evaluations = signal_evaluation, 0

    def init(self, key):
        return {"kernel": jax.random.normal(key, (3, 4))}, {}

    def loss(self, parameters, batch, keys):
        if self.signal_compiling and keys is not None:
            os.kill(os.getpid(), signal.SIGTERM)
        errors = batch["x"] @ parameters["kernel"] - batch["y"]
        return jnp.sum(jnp.square(errors)), jnp.float32(errors.size)

    def evaluation_sums(self, parameters, batch):
        return self.loss(parameters, batch, None)

    def batches(self, start, stop, share):
        for step in range(start, stop):
            if step == self.signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
            x, y = np.random.default_rng(step).normal(size=(2, 8, 4)).astype(np.float32)
            yield {"x": x[:, :3], "y": y + self.bad.get(step + 1, 0.0), "row": np.arange(8, dtype=np.int32)}

    def evaluation_batches(self, share):
        self.evaluations += 1
        for number, batch in enumerate(Regression().batches(1000, 1004, share)):
            if number == 2 and self.evaluations == self.signal_evaluation:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    def evaluation_metrics(self, sums, parameters):
        return {"eval/loss": float(sums[0] / sums[1])}

    def sample(self, parameters):
        return iter(())


class Lines(Reporter):
    """What was said."""

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def run(folder, task, **changes):
    """Train; return how it ended, what was said, and the records."""
    optimizer = OptimizerConfig(learning_rate=0.05, warmup_steps=0, skip_spikes=5.0, max_skipped=3)
    settings = {"steps": 100, "eval_interval": 10, "log_interval": 1, "optimizer": optimizer, "resume": "latest"}
    config, run, lines = RunConfig(**settings | changes), RunFolder(folder), Lines()
    folder.mkdir(exist_ok=True)
    outcome = train(task, config, run, choose_layout(ParallelConfig("single"), 8), lines)
    return outcome, lines.said, run.history()


def ending(folder, task, step=100):
    """Parameters, optimiser state, the window of spikes, and all that was logged but times."""
    names = ("parameters", "optimizer", "recent")
    with_shapes = json.loads((folder / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").read_text())
    saved = with_shapes["custom_metadata"]
    assert {name.partition("/")[0] for name in saved["checksums"]} == set(names)
    timeless = [
        {key: value for key, value in record.items() if not key.endswith(("seconds", "per_second"))}
        for record in RunFolder(folder).history()
    ]
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    steps = (checkpoints.steps, checkpoints.best_step)
    checkpoints.close()
    return saved["checksums"], saved["extra"]["skipped"], timeless, steps


BAD = {3: np.nan, 80: 1e3, 81: 1e3, 93: np.inf}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return *run(folder, Regression(BAD)), ending(folder, Regression)


def test_bad_steps_are_left_out_counted_and_said_once_for_a_row(unbroken):
    outcome, said, records, _ = unbroken
    assert outcome.step == 100 and not outcome.interrupted
    skipped = {record["step"]: record for record in records if "skipped" in record}
    assert {step: record["skipped"] for step, record in skipped.items()} == {3: 1, 80: 2, 81: 3, 93: 4}
    assert "train/loss" not in skipped[3] and skipped[80]["train/loss"] > 1e5
    assert [line.split(" is left out")[0] for line in said if "left out" in line] == ["step 3", "step 80", "step 93"]
    assert outcome.evaluation["eval/loss"] < records[0]["eval/loss"]
    losses = [record["train/loss"] for record in records if "skipped" not in record and "train/loss" in record]
    assert len(losses) == 96 and max(losses) < 30


def test_nothing_is_saved_in_a_row_that_may_never_end(unbroken):
    """At step 80 a checkpoint was due."""
    steps, _ = unbroken[3][3]
    assert 80 not in steps and steps[-2:] == [90, 100]


@pytest.mark.parametrize(
    "harm",
    [
        {"signal_at": 37},
        {"signal_at": 81},
        {"signal_at": 90},
        {"signal_evaluation": 1},
        {"signal_evaluation": 6},
        {"signal_evaluation": 11},
        {"signal_compiling": True},
    ],
    ids=str,
)
def test_a_signal_at_any_time_saves_and_the_run_goes_on_as_if_nothing_had_happened(tmp_path, unbroken, harm):
    """Between steps; in a row of steps left out; while a save is under way; in an evaluation; in the compiler."""
    outcome, _, records = run(tmp_path, Regression(BAD, **harm))
    assert outcome.interrupted
    assert (tmp_path / "checkpoints" / str(outcome.step)).is_dir()
    if "signal_evaluation" in harm:
        assert outcome.step == 10 * (harm["signal_evaluation"] - 1)
        assert max([r["step"] for r in records if "eval/loss" in r], default=-10) == outcome.step - 10
    outcome, _, _ = run(tmp_path, Regression(BAD))
    assert outcome.step == 100 and not outcome.interrupted
    assert ending(tmp_path, Regression) == unbroken[3]


def test_what_a_signal_saved_in_the_row_is_not_called_good(tmp_path):
    bad = dict.fromkeys(range(30, 40), np.nan)
    assert run(tmp_path, Regression(bad, signal_at=31))[0].step == 31
    with pytest.raises(FloatingPointError, match=r"at step 32, .* the last good checkpoint is step 20$"):
        run(tmp_path, Regression(bad))


def test_a_resumed_run_still_knows_how_long_an_evaluation_takes(tmp_path):
    """Or its schedule would go back where it ends by the clock, and it would end too late."""
    run(tmp_path, Regression(signal_at=15))
    saved = json.loads((tmp_path / "checkpoints" / "15" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    seconds = saved["extra"]["evaluation_seconds"]
    assert 0 < seconds < saved["extra"]["seconds"]
    run(tmp_path, Regression(signal_at=17))
    saved = json.loads((tmp_path / "checkpoints" / "17" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert saved["extra"]["evaluation_seconds"] == seconds


def test_too_many_in_a_row_end_the_run_and_the_good_checkpoints_stay(tmp_path):
    bad = dict.fromkeys(range(30, 40), np.nan)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 32, .* 3 in a row .* checkpoint is step 29"):
        run(tmp_path, Regression(bad), checkpoint_interval=1)
    with pytest.raises(FloatingPointError, match="at step 32, "):
        run(tmp_path, Regression(bad), checkpoint_interval=1)  # it is the same run again
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps[-2:] == [28, 29]


def test_a_run_does_not_end_well_in_a_row_that_left_nothing_good(tmp_path):
    class Broken(Regression):
        def evaluation_metrics(self, sums, parameters):
            return {"eval/loss": [1.0, float("nan")][self.evaluations - 1]}

    with pytest.raises(FloatingPointError, match=r"held-out loss is nan at step 10, the last of 2 in a row"):
        run(tmp_path, Broken({9: np.nan, 10: np.nan}), steps=10, eval_interval=100)
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps == []


def test_a_run_whose_checkpoints_are_gone_begins_anew_and_says_so(tmp_path):
    _, said, before = run(tmp_path, Regression(), steps=5)
    assert not said
    shutil.rmtree(tmp_path / "checkpoints")
    _, said, after = run(tmp_path, Regression(), steps=5)
    assert said == ["there is no checkpoint to go on from: the run begins anew"] and len(after) == len(before)


def test_the_watchdog_knows_a_save_and_leaves_the_last_one_its_time(tmp_path, monkeypatch):
    events = []

    class Recorder(Watchdog):
        def doing(self, what):
            events.append(what)

        def rest(self):
            events.append("rest")

    save = Checkpoints.save
    monkeypatch.setattr("jaxgpt.training.loop.Watchdog", Recorder)
    monkeypatch.setattr(Checkpoints, "save", lambda *args, **named: (events.append("save"), save(*args, **named)))
    run(tmp_path, Regression(signal_at=15), checkpoint_interval=10, eval_interval=100)
    assert [before for before, event in itertools.pairwise(events) if event == "save"] == ["saving step 10", "rest"]
    assert events[-1] == "rest" and "step 12 " in "".join(events)


def test_a_step_brings_nothing_to_the_host_but_its_metrics(tmp_path, monkeypatch):
    """JAX's own guard does not see transfers on CPU; what every one of them reads is `_value`."""
    read, value = [], ArrayImpl._value
    monkeypatch.setattr(ArrayImpl, "_value", property(lambda array: (read.append(array.size), value.fget(array))[1]))
    counts = []
    for steps in (10, 20):
        read.clear()
        run(tmp_path / str(steps), Regression(), steps=steps, eval_interval=1000)
        counts.append(len(read))
        assert read.count(1) >= 4 * steps
    assert counts[1] - counts[0] == 4 * 10  # loss, gradient norm, weight, and whether it was left out


def test_a_run_ends_when_its_patience_does(tmp_path):
    class Worse(Regression):
        def evaluation_metrics(self, sums, parameters):
            return {"eval/loss": [2.0, 1.0, 3.0, 1.5, 0.5][self.evaluations - 1]}

    outcome, said, _ = run(tmp_path, Worse(), patience=2)
    assert outcome.step == 30 and said == ["no better held-out loss in 2 evaluations: this is the end"]
    outcome, said, _ = run(tmp_path, Worse(), patience=2)
    assert outcome.step == 30 and "the run no longer got better" in said[-1]


def test_without_spikes_a_checkpoint_holds_nothing_of_them(tmp_path):
    run(tmp_path, Regression(), steps=2, optimizer=OptimizerConfig())
    assert {path.name for path in (tmp_path / "checkpoints" / "2").iterdir() if path.is_dir()} == {
        "metrics",
        "optimizer",
        "parameters",
    }


def test_an_evaluation_that_is_not_finite_is_never_the_best(tmp_path):
    class Broken(Regression):
        def evaluation_metrics(self, sums, parameters):
            return {"eval/loss": [1.0, 0.5, float("nan"), 0.75][min(self.evaluations - 1, 3)]}

    run(tmp_path, Broken(), steps=40)
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).best_step == 10
