"""A run is a folder: config.json, metrics.jsonl, curves.png, samples.txt, tokenizer.json, checkpoints/."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxgpt.config import TASKS, RunConfig, from_dict

FORMAT = 1


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run. Every file is written whole or appended line by line, never half."""

    path: Path
    writes: bool = True
    """whether this process writes them: of several that train together one does"""

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> RunFolder:
        """The run that lies at `path`.

        Raises:
            FileNotFoundError: none does.
        """
        run = cls(Path(path))
        if not run.exists():
            raise FileNotFoundError(f"{run.path} is not a run folder: it has no config.json")
        return run

    @property
    def config(self) -> Path:
        """The resolved config and what identifies the data (JSON)."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: `step`, `train/loss`, `eval/loss`, `tokens_per_second` (of a head examples), ..."""
        return self.path / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        """The losses over the steps, drawn."""
        return self.path / "curves.png"

    @property
    def samples(self) -> Path:
        """Text the model wrote, with the step it wrote it at."""
        return self.path / "samples.txt"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer the model was trained with."""
        return self.path / "tokenizer.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, one folder a step."""
        return self.path / "checkpoints"

    def exists(self) -> bool:
        """Whether a run lies here."""
        return self.config.is_file()

    def check_free(self) -> None:
        """Raise `FileExistsError` if the folder holds a run already, or other files."""
        if self.exists():
            raise FileExistsError(
                f"{self.path} holds another run; give another --out, or --resume to go on with that one"
            )
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise FileExistsError(f"{self.path} exists and is not a run; give another --out")

    def create(self) -> None:
        """Make the folder of a new run (see `check_free`)."""
        if self.writes:
            self.check_free()
            self.path.mkdir(parents=True, exist_ok=True)

    def describe_as(self, description: dict[str, Any]) -> None:
        """Write config.json: from then on the folder is a run."""
        if self.writes:
            write_atomically(self.config, json.dumps({"format": FORMAT} | description, indent=2) + "\n")

    def describe(self) -> dict[str, Any]:
        """Read config.json.

        Raises:
            FileNotFoundError: no run lies here.
            ValueError: config.json is not JSON, or of another format.
        """
        RunFolder.at(self.path)
        try:
            description = json.loads(self.config.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.config} is not valid JSON: {error}") from error
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            raise ValueError(f"{self.config} is not of format {FORMAT}, the one this version reads")
        return description

    def saved_config(self) -> RunConfig:
        """The config of the run, of the kind of its task.

        Raises:
            FileNotFoundError: no run lies here.
            ValueError: config.json names no task that is known, or holds no config of it.
        """
        description = self.describe()
        task = description.get("task")
        if task not in TASKS:
            raise ValueError(f"{self.config} names the task {task!r}; there are {', '.join(TASKS)}")
        return from_dict(TASKS[task], description.get("config"))

    def log(self, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if not self.writes:
            return
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl; a last line that a killed run left unfinished is left out.

        Raises:
            ValueError: a line that is not UTF-8, not JSON, no object, or one without a step; its number is named.
        """
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_bytes().splitlines()
        records = []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                if number < len(lines):
                    raise ValueError(f"{self.metrics}, line {number}, is not valid JSON: {error}") from error
                continue
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise ValueError(f"{self.metrics}, line {number}, is not an object with a step")
            records.append(record)
        return records

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`: a resumed run writes those lines again."""
        if not self.writes:
            return
        kept = [record for record in self.history() if record["step"] <= step]
        write_atomically(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))

    def add_sample(self, step: int, text: str) -> None:
        """Append a sample to samples.txt."""
        if not self.writes:
            return
        with self.samples.open("a", encoding="utf-8") as file:
            file.write(f"--- step {step} ---\n{text}\n\n")

    def draw_curves(self) -> None:
        """Draw training and held-out loss over the steps into curves.png."""
        if not self.writes:
            return
        # Matplotlib takes half a second to import; most users of this module never draw.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        records = self.history()
        figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        train, objective, held_out = (
            _series(records, f"{name}") for name in ("train/loss", "eval/objective", "eval/loss")
        )
        axes.plot(*train, color="tab:blue", alpha=0.35, linewidth=1, label="training batch")
        lines = [(held_out, "tab:orange", "held-out")]
        if objective[0]:  # what is minimised on the batch is more than the loss that is reported
            lines = [(objective, "tab:orange", "held-out"), (held_out, "tab:green", "held-out, the task alone")]
        for points, color, name in lines:
            if points[0]:
                label = f"{name}, lowest {min(points[1]):.3f}"
                axes.plot(*points, color=color, marker="o", markersize=4, label=label)
        axes.set(xlabel="step", ylabel="loss (nats)", title=self.path.name)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        temporary = self.curves.with_name(".curves.png")
        FigureCanvasAgg(figure).print_png(str(temporary))
        temporary.replace(self.curves)


def _series(records: Iterable[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), float) and math.isfinite(r[name])]
    return [step for step, _ in points], [value for _, value in points]


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def new_run_path(root: Path, name: str) -> Path:
    """The first of `root/name`, `root/name-2`, ... that does not exist yet."""
    path, number = root / name, 2
    while path.exists():
        path, number = root / f"{name}-{number}", number + 1
    return path


def latest_run_path(root: Path, name: str) -> Path | None:
    """The newest of the runs that `new_run_path` named, or None."""
    runs = [p for p in root.glob(f"{name}*") if p.name == name or p.name.removeprefix(f"{name}-").isdigit()]
    runs = [p for p in runs if RunFolder(p).exists()]
    return max(runs, key=lambda p: RunFolder(p).config.stat().st_mtime, default=None)
