"""The training loop: the same for every task. Steps, evaluations, checkpoints, and an orderly end."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import RunConfig
from jaxgpt.hosts import ALONE, Hosts, SharedStop
from jaxgpt.models.partition import combine
from jaxgpt.storage.checkpoint import Checkpoints
from jaxgpt.storage.runs import RunFolder
from jaxgpt.training.held_out import HeldOut
from jaxgpt.training.optimizer import make_optimizer
from jaxgpt.training.parallel import Layout, compiling
from jaxgpt.training.report import Reporter, describe_evaluation, metrics_writer
from jaxgpt.training.skipping import Skipped, no_steps, reason
from jaxgpt.training.step import Parameters, TrainState, training_step
from jaxgpt.training.stop import Stop
from jaxgpt.training.task import Task
from jaxgpt.training.watchdog import Watchdog

FIRST_STEPS = 20  # logged one by one, whatever the interval: a run that starts wrong shows it here


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `interrupted` means stopped by a signal, saved, and to be resumed."""

    step: int
    evaluation: dict[str, float]
    interrupted: bool


def train(
    task: Task, config: RunConfig, run: RunFolder, layout: Layout, report: Reporter, hosts: Hosts = ALONE
) -> Outcome:
    """Train from the newest checkpoint in `run` (or from the start) to the end of the budget.

    Raises:
        FloatingPointError: too many steps in a row were left out; none of their states was saved.
        OSError: the run folder cannot be written; what was committed before is untouched.
        ValueError: the checkpoint is damaged or does not fit the config; or the time was over before the first step.
    """
    metric, highest = config.selection
    checkpoints = Checkpoints(
        run.checkpoints,
        keep=max(config.keep, config.average),
        regular=config.saves_at,
        metric=metric,
        highest=highest,
        good=config.resume == "latest-good",
        hosts=hosts,
    )
    watchdog = Watchdog(config.watchdog_seconds)
    stopping = Stop() if hosts.count == 1 else SharedStop()
    with contextlib.closing(checkpoints), contextlib.closing(watchdog), stopping as stop:
        return _Loop(task, config, run, layout, report, checkpoints, stop, watchdog, hosts).run()


class _Loop:
    """The variables of one run of `train`; everything numerical is in the pure step."""

    def __init__(
        self,
        task: Task,
        config: RunConfig,
        run: RunFolder,
        layout: Layout,
        report: Reporter,
        checkpoints: Checkpoints,
        stop: Stop | SharedStop,
        watchdog: Watchdog,
        hosts: Hosts,
    ) -> None:
        self.task, self.config, self.run_folder, self.report, self.hosts = task, config, run, report, hosts
        self.layout, self.checkpoints, self.stop, self.watchdog = layout, checkpoints, stop, watchdog
        optimizer = make_optimizer(config.optimizer, config.steps, task.width)
        step = training_step(
            loss=task.loss,
            optimizer=optimizer,
            seed=config.seed,
            micro_batches=config.parallel.gradient_accumulation,
            spikes=config.optimizer.skip_spikes,
        )
        self.step_program = layout.compile(step, scalars=1, donate=True)
        self.held_out = HeldOut(task, config, layout, watchdog, hosts)
        self.write = metrics_writer(run, config.tensorboard)
        self.initial_state = functools.partial(
            initial_state, task, optimizer, config.seed, config.optimizer.skip_spikes
        )
        self.skipped = Skipped(config.optimizer.max_skipped)
        self.initial_frozen = lambda: task.init(jax.random.key(config.seed))[1]
        self.started = time.monotonic()
        self.last_settled = self.started
        self.unlogged_tokens, self.unlogged_seconds = 0.0, 0.0

    def run(self) -> Outcome:
        config, state = self.config, self._start()
        step = int(state.step)
        if nothing := self._nothing_left(step):
            self.report.say(f"nothing left to do: {nothing}")
            return Outcome(step, self.held_out.figures, interrupted=False)
        if step < config.steps and step % config.eval_interval == 0 and self.held_out.step != step:
            self._evaluate_first(state, step)
        pending: tuple[int, dict[str, jax.Array]] | None = None
        self._under_way(step)
        self.last_settled = time.monotonic()

        for batch in self.task.batches(step, config.steps, self.layout.share):
            position = self._position(step)
            if self.stop.ask() or position >= config.steps or self.held_out.out_of_patience:
                break
            state, metrics = self.step_program(state, self.layout.place(batch), np.float32(position))
            step += 1
            if pending is not None:
                self._settle(*pending)  # read the step before while this one runs: one step in flight, never more
            pending = (step, metrics)
            if step < config.steps and config.saves_at(step):
                self._settle(*pending)
                pending = None
                self._evaluate_and_save(state, step)

        if pending is not None:
            self._settle(*pending)
        if self.held_out.out_of_patience:
            held_out = self.held_out
            self.report.say(f"no better held-out {held_out.name} in {held_out.fruitless} evaluations: this is the end")
        elif self.stop.requested and step < config.steps:
            return self._interrupted(state, step)
        elif not step:  # by the clock alone
            raise ValueError(
                f"no step was made in max-seconds {config.max_seconds}: the first evaluation, and as much for the last,"
                f" are {self.seconds + self.held_out.seconds:.1f} seconds; give more, with --resume or another --out"
            )
        return self._finish(state, step)

    def _nothing_left(self, step: int) -> str | None:
        """Why a run that has come to this step does not go on; None: it does."""
        if step > self.config.steps or step == self.config.steps == self.held_out.step:
            return f"the run has its {step:,} steps; a greater --steps goes on"
        return "the run no longer got better; a greater --patience goes on" if self.held_out.out_of_patience else None

    def _evaluate_first(self, state: TrainState, step: int) -> None:
        """Measure what the run begins with, or where a signal ended an evaluation; compile the step meanwhile.

        Not where a run ends by the clock: two things at once are a measure of neither.
        """
        if self.config.max_seconds is not None:
            self._evaluate(state, step)
        else:
            (batch,) = self.task.batches(step, step + 1, self.layout.share)
            with compiling(self.step_program, state, self.layout.place(batch), np.float32(0)):
                self._evaluate(state, step)
                self.watchdog.doing(f"compiling step {step + 1}")
        if step and self.held_out.step == step:
            self._save(state, step)

    def _interrupted(self, state: TrainState, step: int) -> Outcome:
        """Save what there is, if that is not done, and leave."""
        self.watchdog.rest()  # to be committed may take longer than a step
        if step not in self.checkpoints.steps:
            self._save(state, step)
        self.checkpoints.wait()
        self.run_folder.draw_curves()
        return Outcome(step, self.held_out.figures, interrupted=True)

    def _start(self) -> TrainState:
        """The newest checkpoint, or the newest that is whole; or the initial state."""
        latest = self.checkpoints.latest_step
        if latest is None:
            if self.run_folder.history():
                self.report.say("there is no checkpoint to go on from: the run begins anew")
            self.run_folder.rewind(-1)
            return self.layout.initial(self.initial_state)
        shapes = jax.eval_shape(lambda: _trees(self.initial_state()))
        if self.config.resume == "latest-good":
            latest, trees, extra = self.checkpoints.restore_good(shapes, self.layout.shardings(shapes))
        else:
            trees, extra = self.checkpoints.restore(latest, shapes, self.layout.shardings(shapes))
        for line in self.checkpoints.left_out:
            self.report.say(line)
        self.run_folder.rewind(latest)
        self.started -= extra["seconds"]
        self.held_out.remember(extra)
        self.skipped.total, self.skipped.in_a_row = extra.get("skipped", (0, 0))
        self.report.say(f"resuming at step {latest:,}")
        step, frozen = self.layout.initial(lambda: (jnp.asarray(latest, jnp.int32), self.initial_frozen()))
        return TrainState(step, trees["parameters"], trees["optimizer"], frozen, trees.get("recent", ()))

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of this run, those before a resume included."""
        return time.monotonic() - self.started

    def _position(self, step: int) -> float:
        """Where in the schedule the run stands: its step, or its share of the time budget if that is further on."""
        if self.config.max_seconds is None:
            return float(step)
        final_evaluation = self.held_out.seconds if self.held_out.seconds < math.inf else 0.0
        evaluations = 2 if self.config.average > 1 else 1  # of the last state, and of the mean
        budget = max(self.config.max_seconds - evaluations * final_evaluation, 1e-6)
        return self.hosts.of_first(max(float(step), self.config.steps * self.seconds / budget))

    def _under_way(self, step: int) -> None:
        """Tell the watchdog that the step after `step` is all that there is to wait for."""
        self.watchdog.doing(f"step {step + 1} (jaxgpt inspect {self.run_folder.path} --batch {step} shows its data)")

    def _settle(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Read the metrics of a finished step, log them; stop if too many in a row were skipped, or a save failed."""
        loss, norm, tokens = (float(metrics[name]) for name in ("loss", "gradient_norm", "tokens"))
        skipped = bool(metrics["skipped"])
        self._under_way(step)
        self.checkpoints.check()
        self.skipped.count(skipped)
        now = time.monotonic()
        self.unlogged_seconds += now - self.last_settled
        self.unlogged_tokens += tokens
        self.last_settled = now
        rate = self.unlogged_tokens / self.unlogged_seconds
        self.report.step(step, loss, rate, self._position(step))
        figures = {"train/loss": loss, "gradient_norm": norm}
        if skipped:
            figures = {name: value for name, value in figures.items() if math.isfinite(value)}
            self.write({"step": step, "skipped": self.skipped.total} | figures | {"seconds": self.seconds})
            self._skip(step, reason(loss, norm))
        elif step <= FIRST_STEPS or step % self.config.log_interval == 0 or step == self.config.steps:
            self.write({"step": step} | figures | {f"{self.task.unit}_per_second": rate, "seconds": self.seconds})
            self.unlogged_tokens, self.unlogged_seconds = 0.0, 0.0

    def _skip(self, step: int, why: str) -> None:
        """Say that a step was left out, once for several in a row, and end the run at the last that may be."""
        if self.skipped.in_a_row == 1:
            self.report.say(f"step {step:,} is left out: {why}")
        if self.skipped.in_a_row >= self.skipped.limit:
            raise self._lost(step, why)

    def _lost(self, step: int, why: str) -> FloatingPointError:
        """Why the run ends here, and what is left of it."""
        before = step - self.skipped.in_a_row  # a signal in the row saves too
        kept = max((saved for saved in self.checkpoints.steps if saved <= before), default=None)
        where = "no checkpoint had been saved yet" if kept is None else f"the last good checkpoint is step {kept}"
        return FloatingPointError(
            f"{why} at step {step}, the last of {self.skipped.in_a_row} in a row that were left out: stopped; {where}"
        )

    def _evaluate_and_save(self, state: TrainState, step: int) -> None:
        if step % self.config.eval_interval == 0:
            self._evaluate(state, step)
        if not self.skipped.in_a_row:  # else the state may be what is wrong, and take a good one's place
            self.watchdog.doing(f"saving step {step}")
            self._save(state, step)
        self._under_way(step)
        self.last_settled = time.monotonic()

    def _evaluate(self, state: TrainState, step: int) -> None:
        """Measure the held-out split, and log it; nothing if a signal comes before that is done."""
        if not self.held_out.evaluate(state.model, step, self.stop):
            return
        self.write({"step": step} | self.held_out.figures | {"seconds": self.seconds})
        self.report.evaluation(step, self.held_out.figures)
        if step:  # of one point there is nothing to see, and Matplotlib takes a while to import
            self.run_folder.draw_curves()

    def _save(self, state: TrainState, step: int) -> None:
        measured = self.held_out.selecting(step)
        metrics = {self.held_out.metric: measured} if math.isfinite(measured) else None
        extra = {"seconds": self.seconds, "skipped": [self.skipped.total, self.skipped.in_a_row]}
        extra |= self.held_out.memory()
        self.checkpoints.save(step, _trees(state), metrics=metrics, extra=extra)

    def _finish(self, state: TrainState, step: int) -> Outcome:
        """Evaluate, save, show a sample."""
        self.watchdog.rest()
        measured = self.held_out.step == step
        if not measured:
            self._evaluate(state, step)
            if self.held_out.step != step:
                return self._interrupted(state, step)
        figure = self.held_out.selecting(step)
        if self.skipped.in_a_row and not math.isfinite(figure):
            raise self._lost(step, f"the held-out {self.held_out.name} is {figure}")
        if not measured or step not in self.checkpoints.steps:
            self._save(state, step)
        parameters = self._average(state, step) if self.config.average > 1 else state.model
        self.report.finish()
        pieces = self.task.sample(parameters)
        first = next(pieces, None)
        if first is not None:
            self.report.say("\na sample:")
            self.run_folder.add_sample(step, self.report.stream(itertools.chain([first], pieces)))
        self.checkpoints.wait()
        return Outcome(step, self.held_out.figures, interrupted=False)

    def _average(self, state: TrainState, step: int) -> Parameters:
        """The mean of the newest checkpoints' parameters, measured and logged as `average/...`."""
        shapes = jax.eval_shape(lambda: self.initial_state().parameters)
        mean, count = self.checkpoints.restore_average(self.config.average, shapes, self.layout.shardings(shapes))
        parameters = combine(mean, state.frozen)
        measured = self.held_out.measure(parameters, "the evaluation of the mean")
        assert measured is not None
        named = {name.replace("eval/", "average/"): value for name, value in measured.items()}
        self.write({"step": step, "average/checkpoints": count} | named)
        self.report.say(f"mean of the last {count} checkpoints  {describe_evaluation(measured)}")
        return parameters


def initial_state(task: Task, optimizer: Any, seed: int, spikes: float | None = None) -> TrainState:
    """Step 0: parameters from the seed, the optimiser's empty state."""
    parameters, frozen = task.init(jax.random.key(seed))
    # Compiled as one program: leaf by leaf takes ten times as long.
    optimizer_state = jax.jit(optimizer.init)(parameters)
    return TrainState(jnp.zeros((), jnp.int32), parameters, optimizer_state, frozen, no_steps(spikes))


def _trees(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds; parameters apart, so that a model can be loaded without its optimiser."""
    recent = {"recent": state.recent} if state.recent else {}
    return {"parameters": state.parameters, "optimizer": state.optimizer_state} | recent
