"""The held-out split: what it says of a run, the best that it said, and how long it takes to ask."""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import numpy as np

from jaxgpt.config import RunConfig
from jaxgpt.hosts import Hosts, SharedStop
from jaxgpt.training.parallel import Layout
from jaxgpt.training.step import Parameters, evaluation_step
from jaxgpt.training.stop import Stop
from jaxgpt.training.task import Task
from jaxgpt.training.watchdog import Watchdog


class HeldOut:
    """Measures the whole split, and remembers the last figures and the best of the one that selects."""

    def __init__(self, task: Task, config: RunConfig, layout: Layout, watchdog: Watchdog, hosts: Hosts) -> None:
        self._task, self._layout, self._watchdog, self._hosts = task, layout, watchdog, hosts
        self._program = layout.compile(evaluation_step(task.evaluation_sums))
        self._patience = config.patience
        self.metric, highest = config.selection
        self._sign = -1.0 if highest else 1.0
        self._best = math.inf  # the lowest of sign x metric
        self.fruitless = 0  # evaluations since
        self.figures: dict[str, float] = {}
        self.step = -1  # that they were measured at
        self.seconds = math.inf  # an evaluation takes, at least

    @property
    def out_of_patience(self) -> bool:
        """Whether too many evaluations in a row were no better than the best."""
        return self._patience is not None and self.fruitless >= self._patience

    @property
    def name(self) -> str:
        """What selects, for people: `loss`."""
        return self.metric.removeprefix("eval/")

    def selecting(self, step: int) -> float:
        """The figure that selects, of the state at this step; NaN: none was measured there."""
        return self.figures.get(self.metric, math.nan) if self.step == step else math.nan

    def evaluate(self, parameters: Parameters, step: int, stop: Stop | SharedStop) -> bool:
        """Measure the state at this step; False, and nothing changes, if a signal comes before that is done."""
        start = time.monotonic()
        figures = self.measure(parameters, f"the evaluation after step {step}", stop)
        if figures is None:
            return False
        self.figures, self.step = figures, step
        measured = self._sign * figures[self.metric]
        self._best, self.fruitless = min(self._best, measured), 0 if measured < self._best else self.fruitless + 1
        self.seconds = min(self.seconds, time.monotonic() - start)
        return True

    def measure(
        self, parameters: Parameters, what: str, stop: Stop | SharedStop | None = None
    ) -> dict[str, float] | None:
        """The figures of these parameters, `eval/...`; None if a signal came before. `what` is for the watchdog."""
        # Read one by one: with all of them under way at once, simulated devices can wait for each other for ever.
        totals: list[np.ndarray] = []
        for number, batch in enumerate(self._task.evaluation_batches(self._layout.share)):
            if stop is not None and stop.ask():
                return None
            self._watchdog.doing(f"batch {number} of {what}")
            read = jax.device_get(self._program(parameters, self._layout.place(batch)))
            sums = [np.asarray(part, np.float64) for part in read]
            totals = [np.asarray(x + part) for x, part in zip(totals, sums, strict=True)] if totals else sums
        self._watchdog.rest()  # what a task makes of them takes its time
        return self._hosts.of_first(self._task.evaluation_metrics(totals, parameters))  # what they decode may differ

    def memory(self) -> dict[str, Any]:
        """What a checkpoint keeps of this, for `remember`."""
        return {
            "evaluation": self.figures,
            "evaluated": self.step,
            "best": self._best,
            "fruitless": self.fruitless,
            "evaluation_seconds": self.seconds,
        }

    def remember(self, memory: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.figures, self.step = memory["evaluation"], memory["evaluated"]
        self._best, self.fruitless = memory["best"], memory["fruitless"]
        self.seconds = memory.get("evaluation_seconds", math.inf)
