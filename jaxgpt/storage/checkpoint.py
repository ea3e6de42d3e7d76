"""Checkpoints: Orbax, asynchronous and atomic, with a checksum for every leaf. The only module that knows Orbax."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxgpt.hosts import whole

FORMAT = 1

Trees = dict[str, Any]


class DamagedCheckpointError(ValueError):
    """A checkpoint that cannot be read, or whose contents are not what was saved."""


class Checkpoints:
    """The checkpoints of one run: the newest ones, and the best one, that with the lowest held-out loss unless told.

    A checkpoint is a folder named after its step. It appears under that name only once it is complete, and it carries
    a CRC-32 of every leaf, because Orbax itself does not notice a flipped bit.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 1,
        regular: Callable[[int], bool] = lambda step: True,
        metric: str = "eval/loss",
        highest: bool = False,
        read_only: bool = False,
    ) -> None:
        """Open or create `folder`, where the `keep` newest stay (see `newest`).

        Args:
            regular: whether a step's checkpoint is one that a run without interruptions has too.
            metric: of what `save` is told, the figure that decides which checkpoint is the best.
            highest: whether the highest is the best, not the lowest.
            read_only: do not clean up what a running or killed writer left half done.
        """
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda m: m[metric], reverse=not highest, n=1, keep_checkpoints_without_metrics=False
        )
        self.folder, self._regular = folder.absolute(), regular
        self._metric, self._highest = metric, highest
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self.folder,
                preservation_policy=policies.AnyPreservationPolicy([_Newest(keep, regular), best]),
                cleanup_tmp_directories=not read_only,
            )
        except ValueError as error:  # it reads the metrics of all of them
            raise DamagedCheckpointError(
                f"a checkpoint in {self.folder} cannot be read: {_root_cause(error)}"
            ) from error
        self._pending: Any = None

    def save(self, step: int, trees: Trees, *, metrics: dict[str, float] | None, extra: dict[str, Any]) -> None:
        """Start saving `trees` as `step`; their arrays may be donated as soon as this returns.

        Args:
            trees: named pytrees of arrays, each of which can be restored without the others.
            metrics: what was measured at this step, the figure that decides which checkpoint is the best among it.
            extra: JSON values that `restore` gives back.

        Raises:
            OSError: this save or the one before could not be written; what was committed before is untouched.
        """
        self.wait()
        custom = {"format": FORMAT, "checksums": checksums(trees), "extra": extra}
        try:
            self._pending = self._checkpointer.save_checkpointables_async(
                step, trees, metrics=metrics, custom_metadata=custom, force=True
            )
        except Exception as error:
            raise self._write_error(step, error) from error
        self._step = step

    def wait(self) -> None:
        """Return once the save under way is committed.

        Raises:
            OSError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:
            raise self._write_error(self._step, error) from error

    def close(self) -> None:
        """Wait for the save under way, then let go of the folder."""
        try:
            self.wait()
        finally:
            # Orbax raises here once more what `wait` has raised already.
            with contextlib.suppress(Exception):
                self._checkpointer.close()

    @property
    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, oldest first."""
        self.wait()
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        return max(self.steps, default=None)

    def newest(self, count: int) -> list[int]:
        """Steps of the `count` newest checkpoints, or of all there are, oldest first.

        Those that were saved at an interruption do not count, unless nothing is newer: so an interrupted run has the
        same ones in the end as an unbroken one.
        """
        return _newest(self.steps, count, self._regular)

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint that measured best; without any, the newest; None if there is none."""
        self.wait()
        measured = [c for c in self._checkpointer.checkpoints if c.metrics and self._metric in c.metrics]
        for checkpoint in measured:
            if not isinstance(checkpoint.metrics[self._metric], (int, float)):
                raise DamagedCheckpointError(f"the checkpoint {self.folder / str(checkpoint.step)} has damaged metrics")
        if measured:
            sign = -1.0 if self._highest else 1.0
            return min(measured, key=lambda c: sign * c.metrics[self._metric]).step
        return self.latest_step

    def restore(self, step: int, shapes: Trees, shardings: Any) -> tuple[Trees, dict[str, Any]]:
        """Read trees of the checkpoint of `step` and check every leaf; return them and the saved `extra`.

        Args:
            shapes: the trees wanted, as shapes and dtypes (`jax.eval_shape`), which the files must match.
            shardings: where each array goes: a tree like `shapes`, or a prefix of it, as one sharding is for all.

        Raises:
            DamagedCheckpointError: it cannot be read, does not fit `shapes`, or a leaf is not what was saved.
        """
        path = self.folder / str(step)
        targets = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            shapes,
            jax.tree.broadcast(shardings, shapes),
        )
        try:
            metadata = self._checkpointer.checkpointables_metadata(step)
            custom = metadata.custom_metadata
            if isinstance(custom, dict) and custom.get("format") == FORMAT:
                _check_fit(shapes, metadata.metadata, custom["checksums"])
                trees, extra = self._checkpointer.load_checkpointables(step, targets), custom["extra"]
        except Exception as error:
            reason = f"the checkpoint {path} cannot be read: {_root_cause(error)}"
            raise DamagedCheckpointError(reason + self._way_out(step)) from error
        if not isinstance(custom, dict) or custom.get("format") != FORMAT:
            raise DamagedCheckpointError(f"the checkpoint {path} is not of format {FORMAT}, the one this version reads")
        for name, checksum in checksums(trees).items():
            if custom["checksums"].get(name) != checksum:
                raise DamagedCheckpointError(
                    f"the checkpoint {path} is damaged: {name} does not have the checksum it was saved with"
                    + self._way_out(step)
                )
        return trees, extra

    def restore_average(self, count: int, shapes: Any, shardings: Any) -> tuple[Any, int]:
        """Read the parameters of the `count` newest checkpoints (see `newest`); return their mean and how many.

        Averaging what a run ends in is worth some noise of its last steps (Vaswani et al. 2017, section 6.1). At least
        one checkpoint exists. Raises as `restore` does.
        """
        steps = self.newest(count)
        total: Any = None
        for step in steps:
            parameters = self.restore(step, {"parameters": shapes}, {"parameters": shardings})[0]["parameters"]
            wide = jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), parameters)
            total = wide if total is None else jax.tree.map(jnp.add, total, wide)
        return jax.tree.map(lambda leaf, shape: (leaf / len(steps)).astype(shape.dtype), total, shapes), len(steps)

    def _way_out(self, step: int) -> str:
        others = [other for other in self.steps if other != step]
        return f"; without that folder, the checkpoint of step {others[-1]} is taken" if others else ""

    def _write_error(self, step: int, error: Exception) -> OSError:
        return OSError(f"the checkpoint of step {step} could not be written to {self.folder}: {_root_cause(error)}")


def _newest(steps: Sequence[int], count: int, regular: Callable[[int], bool]) -> list[int]:
    return [step for step in steps if regular(step) or step == steps[-1]][-count:]


@dataclass(frozen=True)
class _Newest:
    """What `Checkpoints.newest` names is preserved."""

    count: int
    regular: Callable[[int], bool]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = _newest(steps, self.count, self.regular)
        return [step in kept for step in steps]


def _check_fit(wanted: Trees, metadata: Trees, names: Collection[str]) -> None:
    """Raise `ValueError` at the first leaf that is in the checkpoint or in `wanted` alone, or differs in its shape."""
    here, there = by_path(wanted), by_path(metadata)
    for name in sorted(here.keys() ^ {name for name in names if name.partition("/")[0] in wanted}):
        raise ValueError(
            f"it has {'no' if name in here else 'a'} {name}, and the model has {'one' if name in here else 'none'}"
        )
    for name, leaf in here.items():
        saved = there.get(name, leaf)
        if (saved.shape, saved.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(f"{name} is {saved.dtype} {saved.shape} in it, and {leaf.dtype} {leaf.shape} in the model")


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path, as "blocks/mlp/up/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def checksums(tree: Any) -> dict[str, int]:
    """CRC-32 of the bytes of every leaf, by its path in the tree."""
    return {name: zlib.crc32(_bytes_of(whole(leaf))) for name, leaf in by_path(tree).items()}


def _bytes_of(leaf: Any) -> memoryview:
    # Viewed as bytes first: the buffer protocol does not know bfloat16.
    return np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data


def _root_cause(error: BaseException) -> str:
    """First line of the innermost error: Orbax wraps what went wrong in handler errors that do not say it."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
