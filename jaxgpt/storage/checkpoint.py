"""Checkpoints: Orbax, asynchronous and atomic, with a checksum for every leaf. The only module that knows Orbax."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from jaxgpt.hosts import ALONE, Hosts
from jaxgpt.storage.aside import Aside
from jaxgpt.storage.integrity import (
    DamagedCheckpointError,
    UnknownFormatError,
    check_fit,
    check_seal,
    root_cause,
    sealed,
    unreadable_metrics,
)
from jaxgpt.storage.leaves import by_path, checksums

Trees = dict[str, Any]


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
        good: bool = False,
        hosts: Hosts = ALONE,
    ) -> None:
        """Open or create `folder`, where the `keep` newest stay (see `newest`).

        Args:
            regular: whether a step's checkpoint is one that a run without interruptions has too.
            metric: of what `save` is told, the figure that decides which checkpoint is the best.
            highest: whether the highest is the best, not the lowest.
            read_only: do not clean up what a running or killed writer left half done.
            good: set checkpoints that cannot be read aside (see `left_out`) rather than refuse them.
            hosts: those that read and write together; all call the same methods in the same order.

        Raises:
            DamagedCheckpointError: the metrics of a checkpoint cannot be read, so that the best is not known.
        """
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda m: m[metric], reverse=not highest, n=1, keep_checkpoints_without_metrics=False
        )
        self.folder, self._regular, self._read_only = folder.absolute(), regular, read_only
        self._metric, self._highest, self._hosts = metric, highest, hosts
        self._aside = Aside(self.folder, hosts)
        self._pending: Any = None
        self.left_out: list[str] = []
        if not read_only:
            hosts.together(self._aside.put_back)
        damaged = hosts.of_first(unreadable_metrics(self.folder, metric))
        readable = bool(damaged) and bool(self._aside.others(*damaged))
        for step in damaged:
            path = self.folder / str(step)
            error = DamagedCheckpointError(f"the checkpoint {path} cannot be read: its metrics/metrics is damaged")
            if not good or not readable:
                raise DamagedCheckpointError(f"{error}{self._way_out(step)}")
            self._set_aside(step, error)
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=policies.AnyPreservationPolicy([_Newest(keep, regular), best]),
            cleanup_tmp_directories=not read_only,
        )

    def save(self, step: int, trees: Trees, *, metrics: dict[str, float] | None, extra: dict[str, Any]) -> None:
        """Start saving `trees` as `step`; their arrays may be donated as soon as this returns.

        A checkpoint N of that step that is there already is N.replaced until it is, and put back if it is not.

        Args:
            trees: named pytrees of arrays, each of which can be restored without the others.
            metrics: what was measured at this step, the figure that decides which checkpoint is the best among it.
            extra: JSON values that `restore` gives back.

        Raises:
            OSError: this save or the one before could not be written; what was committed before is untouched.
        """
        if step in self.steps:
            self._aside.put_by(step)
            self._checkpointer.reload()
        custom = sealed({"checksums": checksums(trees), "extra": extra, "metrics": metrics or {}})
        try:
            self._pending = self._checkpointer.save_checkpointables_async(
                step, trees, metrics=metrics, custom_metadata=custom, force=True
            )
        except Exception as error:
            self._failed()
            raise self._write_error(step, error) from error
        self._step = step

    def wait(self) -> None:
        """Return once the save under way is committed.

        Raises:
            OSError: it could not be written.
        """
        self._end_save(timeout=None)

    def check(self) -> None:
        """Return at once; notice if the save under way has ended.

        Raises:
            OSError: it could not be written.
        """
        with contextlib.suppress(TimeoutError):
            self._end_save(timeout=0.0)

    def _end_save(self, timeout: float | None) -> None:
        if self._pending is None:
            return
        try:
            self._pending.result(timeout)
        except Exception as error:
            if timeout is not None and isinstance(error, TimeoutError):
                raise  # most likely it is under way; that of a failed save is noticed when it is waited for
            self._pending = None
            self._failed()
            raise self._write_error(self._step, error) from error
        self._pending = None
        self._aside.forget(self._step)

    def _failed(self) -> None:
        """What a save that failed was to replace is there again."""
        with contextlib.suppress(Exception):
            self._aside.put_back()
            self._checkpointer.reload()  # it has counted the step as saved since the save began

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
            DamagedCheckpointError: it cannot be read, does not fit `shapes`, or something in it is not what was saved.
            UnknownFormatError: another version of jaxgpt wrote it.
        """
        try:
            return self._restore(step, shapes, shardings)
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(f"{error}{self._way_out(step)}") from error

    def _restore(self, step: int, shapes: Trees, shardings: Any) -> tuple[Trees, dict[str, Any]]:
        targets = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            shapes,
            jax.tree.broadcast(shardings, shapes),
        )

        def described() -> dict[str, Any]:
            metadata = self._checkpointer.checkpointables_metadata(step)
            custom = check_seal(metadata.custom_metadata)
            measured = next(c.metrics for c in self._checkpointer.checkpoints if c.step == step) or {}
            if custom.get("metrics", measured) != measured:
                raise DamagedCheckpointError("its metrics are not what was saved")
            check_fit(by_path(shapes), by_path(metadata.metadata), custom["checksums"], set(shapes))
            return custom

        def compared() -> None:
            for name, checksum in checksums(trees).items():
                if custom["checksums"].get(name) != checksum:
                    raise DamagedCheckpointError(f"{name} does not have the checksum it was saved with")

        try:  # what one host cannot read is read on none, or they would go on with different checkpoints
            custom = self._hosts.together(described)
            trees = self._hosts.together(lambda: self._checkpointer.load_checkpointables(step, targets))
            self._hosts.together(compared)
        except Exception as error:
            why = f"a file in it is damaged ({root_cause(error)})"
            kind: type[ValueError] = DamagedCheckpointError
            if isinstance(error, (UnknownFormatError, DamagedCheckpointError)):
                why, kind = str(error), type(error)
            raise kind(f"the checkpoint {self.folder / str(step)} cannot be read: {why}") from error
        return trees, custom["extra"]

    def restore_good(self, shapes: Trees, shardings: Any) -> tuple[int, Trees, dict[str, Any]]:
        """Read the newest checkpoint that is whole; return its step and what `restore` returns.

        Newer ones are set aside: `left_out` says which and why. A folder N.damaged is what was the checkpoint N, until
        the run has saved that step again. At least one checkpoint exists.

        Raises:
            DamagedCheckpointError: none is whole; all stay as they are.
            UnknownFormatError: another version of jaxgpt wrote one of them.
        """
        damaged: dict[int, DamagedCheckpointError] = {}
        for step in reversed(self.steps):
            try:
                trees, extra = self._restore(step, shapes, shardings)
            except DamagedCheckpointError as error:
                damaged[step] = error
                continue
            for newer, why in damaged.items():
                self._set_aside(newer, why)
            self._checkpointer.reload()
            return step, trees, extra
        raise DamagedCheckpointError(f"no checkpoint in {self.folder} is whole; {next(iter(damaged.values()))}")

    def _set_aside(self, step: int, error: Exception) -> None:
        self.left_out.append(f"left out, and kept as {self._aside.set_aside(step)}: {error}")

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
        others = self._aside.others(step)
        if not others:
            return ""
        if self._read_only:
            return f"; without that folder, the checkpoint of step {max(others)} is taken"
        return f"; --resume latest-good goes back to the newest that is whole, of step {max(others)} or before"

    def _write_error(self, step: int, error: Exception) -> OSError:
        return OSError(f"the checkpoint of step {step} could not be written to {self.folder}: {root_cause(error)}")


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
