"""What the training loop knows of a task, and no more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from jaxgpt.data.batches import Share
from jaxgpt.training.step import EvaluationSums, Loss, Parameters


@runtime_checkable
class Task(Protocol):
    """What is learned."""

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
