"""How near judgements come to labels: accuracy, F1, Matthews, the correlations, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Int64


def confusion_matrix(
    labels: Int[np.ndarray, " n"], chosen: Int[np.ndarray, " n"], classes: int
) -> Int64[np.ndarray, "C C"]:
    """How often each class (row) was taken for each (column)."""
    return np.bincount(labels * classes + chosen, minlength=classes * classes).reshape(classes, classes)


def classification_scores(confusion: Int64[np.ndarray, "C C"]) -> dict[str, float]:
    """Accuracy, F1 and Matthews' correlation.

    F1 is that of the second class where there are two, which is the positive one in most data sets, and the mean over
    the classes that were labelled or judged where there are more. Matthews' coefficient is its form for any number of
    classes (Gorodkin 2004).
    """
    right, said, there = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    total = confusion.sum()
    f1 = 2.0 * right / np.maximum(said + there, 1)
    covariance = right.sum() * total - said @ there
    spread = np.sqrt(float(total**2 - said @ said) * float(total**2 - there @ there))
    return {
        "accuracy": float(right.sum() / max(1, total)),
        "f1": float(f1[1] if len(f1) == 2 else f1[said + there > 0].mean()),
        "matthews": float(covariance / spread) if spread else 0.0,
    }


def pearson(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """Pearson's correlation; 0 where one side does not vary."""
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm else 0.0


def spearman(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """Spearman's correlation: Pearson's of the ranks, equal values sharing the mean of theirs."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2.0)[place]


def confusion_table(confusion: Int64[np.ndarray, "C C"], names: Sequence[str]) -> str:
    """The matrix as text: a row for each class there was, a column for each that was said."""
    cells = [["", *names], *([name, *map(str, row)] for name, row in zip(names, confusion, strict=True))]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(["labelled (down), judged (across)", *lines]) + "\n"


def draw_confusion(confusion: Int64[np.ndarray, "C C"], names: Sequence[str], path: Path) -> None:
    """Draw the matrix into a PNG file, each row coloured by its shares."""
    # Matplotlib takes half a second to import; most users of this module never draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = 2.2 + 0.6 * len(names)
    figure = Figure(figsize=(side + 0.3, side), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    places = range(len(names))
    axes.set_xticks(places, names, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(places, names, parse_math=False)
    axes.set(xlabel="judged", ylabel="labelled")
    for row in places:
        for column in places:
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{confusion[row, column]:,}", ha="center", va="center", color=color)
    FigureCanvasAgg(figure).print_png(str(path))
