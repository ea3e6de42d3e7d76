"""The training loop: the same for every task. Steps, evaluations, checkpoints, and an orderly end."""

from __future__ import annotations

import functools
import itertools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import RunConfig
from jaxgpt.data.batches import Share
from jaxgpt.hosts import Hosts, SharedStop
from jaxgpt.models.partition import combine
from jaxgpt.storage.checkpoint import Checkpoints
from jaxgpt.storage.runs import RunFolder
from jaxgpt.training.optimizer import make_optimizer
from jaxgpt.training.parallel import Layout
from jaxgpt.training.report import Reporter, describe_evaluation
from jaxgpt.training.step import EvaluationSums, Loss, Parameters, TrainState, evaluation_step, training_step

ALONE = Hosts()
FIRST_STEPS = 20  # logged one by one, whatever the interval: a run that starts wrong shows it here


@runtime_checkable
class Task(Protocol):
    """What is learned. The loop knows nothing else about it."""

    loss: Loss
    evaluation_sums: EvaluationSums
    width: int
    """D, the model's width"""
    unit: str
    """what the weights of a batch count, in the plural"""

    def init(self, key: jax.Array) -> tuple[Parameters, Parameters]:
        """Initial parameters: those that are trained, and those that stay as they are (see `models.partition`)."""

    def batches(self, start: int, stop: int, share: Share) -> Iterator[dict[str, np.ndarray]]:
        """Of the global batches of steps `start` to `stop`, each a pure function of (seed, step), this host's share."""

    def evaluation_batches(self, share: Share) -> Iterable[dict[str, np.ndarray]]:
        """The whole held-out split, each target once, in global batches; of each this host's share."""

    def evaluation_metrics(self, sums: Sequence[np.ndarray], parameters: Parameters) -> dict[str, float]:
        """What the sums (float64) mean, and what else the held-out split shows: at least `eval/loss`."""

    def sample(self, parameters: Parameters) -> Iterator[str]:
        """Something the model makes, as pieces of text; none if none is wanted."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `interrupted` means stopped by a signal, saved, and to be resumed."""

    step: int
    evaluation: dict[str, float]
    interrupted: bool


@dataclass
class Stop:
    """Whether somebody asked the run to end: SIGTERM or Ctrl-C ends it after the step under way."""

    requested: bool = False
    _previous: dict[int, Any] = field(default_factory=dict)

    def at(self, step: int) -> None:
        """The step after `step` is about to begin; several hosts decide here (see `hosts.SharedStop`)."""

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self.requested = True
        if sys.stderr.isatty():
            os.write(sys.stderr.fileno(), b"\nstopping after this step; Ctrl-C once more leaves at once\n")


def train(
    task: Task, config: RunConfig, run: RunFolder, layout: Layout, report: Reporter, hosts: Hosts = ALONE
) -> Outcome:
    """Train from the newest checkpoint in `run` (or from the start) to the end of the budget.

    Raises:
        FloatingPointError: loss or gradient is not finite; no state after the last good one was saved.
        OSError: the run folder cannot be written; what was committed before is untouched.
        ValueError: the checkpoint is damaged or does not fit the config; or the time was over before the first step.
    """
    metric, highest = config.selection
    checkpoints = Checkpoints(
        run.checkpoints, keep=config.average, regular=config.saves_at, metric=metric, highest=highest
    )
    try:
        with Stop() if hosts.count == 1 else SharedStop() as stop:
            return _Loop(task, config, run, layout, report, checkpoints, stop, hosts).run()
    finally:
        checkpoints.close()


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
        hosts: Hosts,
    ) -> None:
        self.task, self.config, self.run_folder, self.report, self.hosts = task, config, run, report, hosts
        self.layout, self.checkpoints, self.stop = layout, checkpoints, stop
        optimizer = make_optimizer(config.optimizer, config.steps, task.width)
        step = training_step(
            loss=task.loss,
            optimizer=optimizer,
            seed=config.seed,
            micro_batches=config.parallel.gradient_accumulation,
        )
        self.step_program = layout.compile(step, scalars=1, donate=True)
        self.evaluation_program = layout.compile(evaluation_step(task.evaluation_sums))
        self.write = metrics_writer(run, config.tensorboard)
        self.initial_state = functools.partial(initial_state, task, optimizer, config.seed)
        self.initial_frozen = lambda: task.init(jax.random.key(config.seed))[1]
        self.evaluation: dict[str, float] = {}
        self.evaluated = -1  # the step `evaluation` was measured at
        self.metric, highest = config.selection
        self.sign = -1.0 if highest else 1.0
        self.best, self.fruitless = math.inf, 0  # the lowest of sign x metric, and evaluations since
        self.evaluation_seconds = math.inf
        self.started = time.monotonic()
        self.last_settled = self.started
        self.unlogged_tokens, self.unlogged_seconds = 0.0, 0.0

    def run(self) -> Outcome:
        config, state = self.config, self._start()
        step = int(state.step)
        if step >= config.steps:
            self.report.say(f"nothing left to do: the run has its {step:,} steps; a greater --steps goes on")
            return Outcome(step, self.evaluation, interrupted=False)
        if self._out_of_patience():
            self.report.say("nothing left to do: the run no longer got better; a greater --patience goes on")
            return Outcome(step, self.evaluation, interrupted=False)
        if not step:
            self._evaluate(state, step)
        pending: tuple[int, dict[str, jax.Array]] | None = None
        self.last_settled = time.monotonic()

        for batch in self.task.batches(step, config.steps, self.layout.share):
            position = self._position(step)
            self.stop.at(step)
            if self.stop.requested or position >= config.steps or self._out_of_patience():
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
        if self._out_of_patience():
            name = self.metric.removeprefix("eval/")
            self.report.say(f"no better held-out {name} in {self.fruitless} evaluations: this is the end")
        elif self.stop.requested and step < config.steps:
            if step not in self.checkpoints.steps:
                self._save(state, step)
            self.checkpoints.wait()
            self.run_folder.draw_curves()
            return Outcome(step, self.evaluation, interrupted=True)
        elif not step:  # by the clock alone
            raise ValueError(
                f"no step was made in max-seconds {config.max_seconds}: the first evaluation, and as much for the last,"
                f" are {self.seconds + self.evaluation_seconds:.1f} seconds; give more, with --resume or another --out"
            )
        self._finish(state, step)
        return Outcome(step, self.evaluation, interrupted=False)

    def _start(self) -> TrainState:
        """The newest checkpoint, or the initial state."""
        latest = self.checkpoints.latest_step
        self.run_folder.rewind(-1 if latest is None else latest)
        if latest is None:
            return self.layout.initial(self.initial_state)
        shapes = jax.eval_shape(lambda: _trees(self.initial_state()))
        trees, extra = self.checkpoints.restore(latest, shapes, self.layout.shardings(shapes))
        self.started -= extra["seconds"]
        self.evaluation, self.evaluated = extra["evaluation"], extra["evaluated"]
        self.best, self.fruitless = extra["best"], extra["fruitless"]
        self.report.say(f"resuming at step {latest:,}")
        step, frozen = self.layout.initial(lambda: (jnp.asarray(latest, jnp.int32), self.initial_frozen()))
        return TrainState(step, trees["parameters"], trees["optimizer"], frozen)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of this run, those before a resume included."""
        return time.monotonic() - self.started

    def _position(self, step: int) -> float:
        """Where in the schedule the run stands: its step, or its share of the time budget if that is further on."""
        if self.config.max_seconds is None:
            return float(step)
        final_evaluation = self.evaluation_seconds if self.evaluation_seconds < math.inf else 0.0
        evaluations = 2 if self.config.average > 1 else 1  # of the last state, and of the mean
        budget = max(self.config.max_seconds - evaluations * final_evaluation, 1e-6)
        return self.hosts.of_first(max(float(step), self.config.steps * self.seconds / budget))

    def _out_of_patience(self) -> bool:
        return self.config.patience is not None and self.fruitless >= self.config.patience

    def _settle(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Read the metrics of a finished step, stop if they are not finite, log them."""
        loss, norm, tokens = (float(metrics[name]) for name in ("loss", "gradient_norm", "tokens"))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
            kept = self.checkpoints.latest_step
            where = "no checkpoint had been saved yet" if kept is None else f"the last good checkpoint is step {kept}"
            raise FloatingPointError(f"{what} at step {step}: stopped; {where}")
        now = time.monotonic()
        self.unlogged_seconds += now - self.last_settled
        self.unlogged_tokens += tokens
        self.last_settled = now
        self.report.step(step, loss, self.unlogged_tokens / self.unlogged_seconds, self._position(step))
        if step <= FIRST_STEPS or step % self.config.log_interval == 0 or step == self.config.steps:
            rate = self.unlogged_tokens / self.unlogged_seconds
            self.write(
                {"step": step, "train/loss": loss, "gradient_norm": norm, f"{self.task.unit}_per_second": rate}
                | {"seconds": self.seconds}
            )
            self.unlogged_tokens, self.unlogged_seconds = 0.0, 0.0

    def _evaluate_and_save(self, state: TrainState, step: int) -> None:
        if step % self.config.eval_interval == 0:
            self._evaluate(state, step)
        self._save(state, step)
        self.last_settled = time.monotonic()

    def _evaluate(self, state: TrainState, step: int) -> None:
        """Measure the whole held-out split, and log it."""
        start = time.monotonic()
        self.evaluation, self.evaluated = self._measure(state.model), step
        measured = self.sign * self.evaluation[self.metric]
        self.best, self.fruitless = min(self.best, measured), 0 if measured < self.best else self.fruitless + 1
        self.evaluation_seconds = min(self.evaluation_seconds, time.monotonic() - start)
        self.write({"step": step} | self.evaluation | {"seconds": self.seconds})
        self.report.evaluation(step, self.evaluation)
        self.run_folder.draw_curves()

    def _measure(self, parameters: Parameters) -> dict[str, float]:
        program, place = self.evaluation_program, self.layout.place
        # Read one by one: with all of them under way at once, simulated devices can wait for each other for ever.
        totals: list[np.ndarray] = []
        for batch in self.task.evaluation_batches(self.layout.share):
            sums = [np.asarray(part, np.float64) for part in jax.device_get(program(parameters, place(batch)))]
            totals = [np.asarray(x + part) for x, part in zip(totals, sums, strict=True)] if totals else sums
        return self.hosts.of_first(self.task.evaluation_metrics(totals, parameters))  # what they decode may differ

    def _save(self, state: TrainState, step: int) -> None:
        metrics = {self.metric: self.evaluation[self.metric]} if self.evaluated == step else None
        extra = {"seconds": self.seconds, "evaluation": self.evaluation, "evaluated": self.evaluated}
        extra |= {"best": self.best, "fruitless": self.fruitless}
        self.checkpoints.save(step, _trees(state), metrics=metrics, extra=extra)

    def _finish(self, state: TrainState, step: int) -> None:
        """Evaluate, save, show a sample."""
        if self.evaluated != step:
            self._evaluate(state, step)
        if step not in self.checkpoints.steps:
            self._save(state, step)
        parameters = self._average(state, step) if self.config.average > 1 else state.model
        self.report.finish()
        pieces = self.task.sample(parameters)
        first = next(pieces, None)
        if first is not None:
            self.report.say("\na sample:")
            self.run_folder.add_sample(step, self.report.stream(itertools.chain([first], pieces)))
        self.checkpoints.wait()

    def _average(self, state: TrainState, step: int) -> Parameters:
        """The mean of the newest checkpoints' parameters, measured and logged as `average/...`."""
        shapes = jax.eval_shape(lambda: self.initial_state().parameters)
        mean, count = self.checkpoints.restore_average(self.config.average, shapes, self.layout.shardings(shapes))
        parameters = combine(mean, state.frozen)
        measured = self._measure(parameters)
        named = {name.replace("eval/", "average/"): value for name, value in measured.items()}
        self.write({"step": step, "average/checkpoints": count} | named)
        self.report.say(f"mean of the last {count} checkpoints  {describe_evaluation(measured)}")
        return parameters


def initial_state(task: Task, optimizer: Any, seed: int) -> TrainState:
    """Step 0: parameters from the seed, the optimiser's empty state."""
    parameters, frozen = task.init(jax.random.key(seed))
    # Compiled as one program: leaf by leaf takes ten times as long.
    return TrainState(jnp.zeros((), jnp.int32), parameters, jax.jit(optimizer.init)(parameters), frozen)


def _trees(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds; parameters apart, so that a model can be loaded without its optimiser."""
    return {"parameters": state.parameters, "optimizer": state.optimizer_state}


def metrics_writer(run: RunFolder, tensorboard: bool) -> Callable[[dict[str, Any]], None]:
    """Where metrics go: metrics.jsonl always, TensorBoard events on request.

    Raises:
        ValueError: TensorBoard was asked for and tensorboardX is not installed.
    """
    if not (tensorboard and run.writes):
        return run.log
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard needs the extra: pip install 'jaxgpt[tensorboard]'") from error
    events = SummaryWriter(str(run.path / "tensorboard"))

    def write(values: dict[str, Any]) -> None:
        run.log(values)
        for name, value in values.items():
            if name != "step":
                events.add_scalar(name, value, values["step"])
        events.flush()

    return write
