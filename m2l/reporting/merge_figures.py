"""Figures of a merge: the cosines of task vectors, and the curve of a sweep."""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from m2l.reporting import style
from m2l.typing import Json, JsonObject

_PANELS_IN_A_ROW = 6


def cosines(diagnostics: JsonObject, experts: Sequence[str]) -> Figure:
    """Draws the cosine between any two task vectors: of the whole model, and of each layer.

    Args:
        diagnostics: The diagnostics in a merge's manifest.
        experts: The experts' names, in the merge's order.
    """
    panels = {"whole model": diagnostics["cosines"]}
    panels |= {name: group["cosines"] for name, group in diagnostics["groups"].items()}
    columns = min(_PANELS_IN_A_ROW, len(panels))
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(style.RC):
        figure = Figure(figsize=(1.5 * columns + 1.6, 1.6 * rows + 0.6), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for index, (axis, (title, matrix)) in enumerate(zip(axes, panels.items(), strict=False)):
            array = np.array(matrix)
            image = axis.imshow(array, vmin=-1, vmax=1, cmap="RdBu_r")
            axis.set_title(title, fontsize=7)
            axis.set_xticks([])
            axis.tick_params(length=0)
            axis.set_yticks([])
            if index % columns == 0:
                axis.set_yticks(range(len(experts)), experts, fontsize=6)
            axis.spines[:].set_visible(False)
            if len(experts) <= 5:
                for (i, j), value in np.ndenumerate(array):
                    colour = "white" if abs(value) > 0.6 else "black"
                    text = f"{round(value, 2) + 0:.2f}"
                    axis.text(j, i, text, ha="center", va="center", fontsize=5, c=colour)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        bar = figure.colorbar(image, ax=axes.tolist(), shrink=0.6, label="cosine of task vectors")
        bar.outline.set_visible(False)
        return figure


def curve(points: Sequence[tuple[Mapping[str, Json], float]], measure: str) -> Figure:
    """Draws the score of each recipe of a sweep.

    Args:
        points: The swept settings by name, and the score, of each recipe.
        measure: The score's name.
    """
    names = list(points[0][0])
    *group_names, along = names
    numeric = all(isinstance(settings[along], float) for settings, _ in points)
    place = (lambda value: value) if numeric else _label
    lines: dict[str, list[tuple[float | str, float]]] = {}
    for settings, score in points:
        label = ", ".join(f"{name} {_label(settings[name])}" for name in group_names)
        lines.setdefault(label, []).append((place(settings[along]), score))
    with matplotlib.rc_context(style.RC):
        figure = Figure(figsize=(4.6, 3.0), layout="constrained")
        axis = figure.subplots()
        for label, line in lines.items():
            line = sorted(line) if numeric else line
            axis.plot(*zip(*line, strict=True), marker="o", markersize=4, label=label)
        best = max(points, key=lambda point: point[1])
        axis.plot(
            [place(best[0][along])], [best[1]], "*", color="black", markersize=10, label="best"
        )
        axis.set_xlabel(along)
        axis.set_ylabel(measure)
        axis.legend(frameon=False, fontsize=7)
        return figure


def _label(value: Json) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
