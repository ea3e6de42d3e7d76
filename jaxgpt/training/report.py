"""What a person sees: a progress bar on a terminal, plain lines in a pipe, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxgpt.storage.runs import RunFolder

SECONDS_BETWEEN_LINES = 10.0


class Reporter:
    """The quiet form, and the interface of the others."""

    def say(self, text: str) -> None:
        """One line of information."""

    def begin(self, steps: int, unit: str = "tokens") -> None:
        """Training starts and will go to position `steps`; `unit` is what is counted in a second."""

    def step(self, step: int, loss: float, rate: float, position: float) -> None:
        """A step has ended; `position` of the steps in `begin` are done, at `rate` units a second."""

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """The held-out split was measured."""

    def finish(self) -> None:
        """Training has ended, in whatever way; may be called twice."""

    def stream(self, pieces: Iterable[str]) -> str:
        """Show text as it is made; return the whole of it."""
        return "".join(pieces)


class PlainReporter(Reporter):
    """Lines for a pipe or a file: the first steps, then one every few seconds."""

    def __init__(self) -> None:
        self._steps, self._unit = 1, ""
        self._next_line = 0.0

    def say(self, text: str) -> None:
        print(text, flush=True)

    def begin(self, steps: int, unit: str = "tokens") -> None:
        self._steps, self._unit = steps, unit

    def step(self, step: int, loss: float, rate: float, position: float) -> None:
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + SECONDS_BETWEEN_LINES
            done = min(1.0, position / self._steps)
            self.say(f"step {step:,}  loss {loss:.4f}  {rate:,.0f} {self._unit}/s  {done:.0%}")

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.say(f"step {step:,}  {describe_evaluation(metrics)}")

    def stream(self, pieces: Iterable[str]) -> str:
        written = []
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
            written.append(piece)
        sys.stdout.write("\n")
        return "".join(written)


class TerminalReporter(PlainReporter):
    """A progress bar with loss, tokens a second and the time left."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        super().__init__()
        self._progress: Any = Progress(
            TextColumn("step {task.fields[step]:,}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )

    def say(self, text: str) -> None:
        # The progress bar owns the lines below the cursor while it runs; markup is off, as the text is anything.
        self._progress.console.print(text, markup=False, highlight=False)

    def begin(self, steps: int, unit: str = "tokens") -> None:
        self._unit = unit
        self._task = self._progress.add_task("train", total=steps, step=0, status="compiling")
        self._progress.start()

    def step(self, step: int, loss: float, rate: float, position: float) -> None:
        status = f"loss {loss:.4f} {rate:,.0f} {self._unit}/s"
        self._progress.update(self._task, completed=position, step=step, status=status)

    def finish(self) -> None:
        self._progress.stop()


def describe_evaluation(metrics: Mapping[str, float]) -> str:
    """`held-out loss 1.8857  perplexity 6.591  bits_per_byte 2.721`, for people."""
    names = {"eval/loss": "held-out loss"}
    return "  ".join(f"{names.get(name, name.removeprefix('eval/'))} {value:.4f}" for name, value in metrics.items())


def make_reporter(quiet: bool) -> Reporter:
    """The form that fits standard output."""
    if quiet:
        return Reporter()
    return TerminalReporter() if sys.stdout.isatty() else PlainReporter()


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
