"""What a translation looked at, drawn: a heat map of source against target."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def draw_attention(
    weights: Float[np.ndarray, "T S"], source: Sequence[str], target: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Draw attention weights as a PNG: a row for each target token, a column for each source token.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (2.5 + 0.4 * len(source), 1.8 + 0.35 * len(target))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(weights, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(source)), source, rotation=60, ha="left", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(len(target)), target, parse_math=False)
    axes.xaxis.tick_top()
    axes.set(xlabel="source", ylabel="translation")
    figure.colorbar(image, ax=axes, label="attention weight", shrink=0.8)
    with open(path, "wb") as file:
        FigureCanvasAgg(figure).print_png(file)
