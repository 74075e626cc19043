"""What lies under the paper's figures: what each expert learned, and what each sweep found."""

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from m2l.reporting import style


def gains(experts: pd.DataFrame, size: str | None = None) -> Figure:
    """Each expert's score beside its base's, on the datasets it was trained on.

    Args:
        experts: size, base, dataset, before, expert, multitask; scores in percent.
        size: Whose experts; by default the last size's, the largest.

    Returns:
        The figure, a panel for each base.
    """
    experts = experts[experts["size"] == (size or style.sizes(experts)[-1])]
    bases, datasets = style.bases(experts), list(experts["dataset"].unique())
    with matplotlib.rc_context(style.RC):
        figure = Figure(
            figsize=(3.6 * len(bases) + 0.8, 0.3 * len(datasets) + 1.1), layout="constrained"
        )
        panels = figure.subplots(1, len(bases), sharey=True, sharex=True, squeeze=False)[0]
        for panel, base in zip(panels, bases, strict=True):
            here = experts[experts["base"] == base].set_index("dataset").reindex(datasets)
            rows = range(len(datasets))
            before, after = here["before"], here["expert"]
            panel.hlines(rows, 0, 100, color="#eeeeee", zorder=0)
            panel.hlines(rows, before, after, color=style.BLUE, linewidth=2)
            look = {"color": "white", "markeredgecolor": style.BLUE}
            panel.plot(before, rows, "o", label="base", **look)
            panel.plot(after, rows, "o", color=style.BLUE, label="expert")
            look = {"color": style.BLACK, "markersize": 10, "markeredgewidth": 1.4}
            panel.plot(here["multitask"], rows, "|", label="multitask", **look)
            panel.set_title(f"{style.base_name(base)}, {here['size'].iloc[0]}")
            panel.set_xlabel("score, %")
        panels[0].set_yticks(range(len(datasets)), datasets)
        panels[0].invert_yaxis()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        return figure


def sweeps(choices: pd.DataFrame, base: str) -> Figure:
    """The scores by which merges' hyper-parameters were chosen, over the scale.

    Where a method has a density or a drop rate as well, a line is the best of them at each scale.

    Args:
        choices: size, base, method, experts, scale, density, drop_rate (NaN where the method has
            none), score, chosen (bool). Methods without a scale have no curve.
        base: Whose merges.

    Returns:
        The figure: a row for each method, a column for each size, a line for each number of
        experts, a star at what was chosen.
    """
    choices = choices[(choices["base"] == base) & choices["scale"].notna()]
    sizes, methods = style.sizes(choices), style.methods(choices)
    looks = style.ordered_styles(style.counts(choices))
    with matplotlib.rc_context(style.RC):
        figure = Figure(
            figsize=(2.2 * len(sizes) + 0.6, 1.75 * len(methods) + 0.8), layout="constrained"
        )
        panels = figure.subplots(
            len(methods), len(sizes), sharex="row", sharey="row", squeeze=False
        )
        for row, method in zip(panels, methods, strict=True):
            for panel, size in zip(row, sizes, strict=True):
                cell = choices[(choices["method"] == method) & (choices["size"] == size)]
                for count, look in looks.items():
                    _curve(panel, cell[cell["experts"] == count], count, look)
                if method == methods[0]:
                    panel.set_title(f"{style.base_name(base)}, {size}")
                if method == methods[-1]:
                    panel.set_xlabel("scale")
            row[0].set_ylabel(f"{style.method_name(method)}\nscore")
        handles = [
            matplotlib.lines.Line2D([], [], markersize=4, label=f"{count} experts", **look)
            for count, look in looks.items()
        ]
        star = {"marker": "*", "linestyle": "", "markersize": 9, "color": style.GREY}
        handles.append(matplotlib.lines.Line2D([], [], label="chosen", **star))
        figure.legend(handles=handles, loc="outside lower center", ncols=6)
        return figure


def _curve(panel: Axes, rows: pd.DataFrame, count: int, look: dict[str, object]) -> None:
    best = rows.groupby("scale")["score"].max()
    panel.plot(best.index, best, markersize=3, linewidth=1.2, label=f"{count} experts", **look)
    chosen = rows[rows["chosen"].astype(bool)]
    star = {"markeredgecolor": "black", "markeredgewidth": 0.6, "color": look["color"]}
    panel.plot(chosen["scale"], chosen["score"], "*", markersize=11, zorder=5, **star)
