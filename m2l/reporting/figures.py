"""A study's figures, drawn from its tables; each as svg, pdf and png."""

import io
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_GREY = "#666666"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    # Fixed, so that the same results give the same bytes.
    "svg.hashsalt": "m2l",
}


def _methods(cells: pd.DataFrame) -> dict[str, dict[str, str]]:
    """How each method's line is drawn."""
    merging = [name for name in cells["method"].unique() if name != "Multitask"]
    markers = "osD^v*"
    styles = {
        name: {"color": _COLOURS[i % 6], "marker": markers[i % 6], "linestyle": "-"}
        for i, name in enumerate(merging)
    }
    return styles | {"Multitask": {"color": _GREY, "marker": "", "linestyle": "--"}}


def by_experts(cells: pd.DataFrame, column: str, reference: str) -> Figure:
    """Normalised performance over the number of merged experts, a panel for each base.

    Args:
        cells: `tables.cells`.
        column: "held_in" or "held_out".
        reference: What 1.0 stands for, in words.

    Returns:
        The figure: means over seeds, with every seed as a faint dot.
    """
    with matplotlib.rc_context(STYLE):
        bases = list(cells["base"].unique())
        figure = Figure(figsize=(3.4 * len(bases), 3.0), layout="constrained")
        panels = figure.subplots(1, len(bases), sharey=True, squeeze=False)[0]
        for panel, base in zip(panels, bases, strict=True):
            here = cells[cells["base"] == base]
            panel.axhline(1.0, color="#bbbbbb", linewidth=0.8, zorder=0)
            for method, style in _methods(cells).items():
                of_method = here[here["method"] == method]
                mean = of_method.groupby("experts")[column].mean()
                panel.plot(mean.index, mean.values, label=method, markersize=5, **style)
                if method != "Multitask":
                    panel.plot(
                        of_method["experts"],
                        of_method[column],
                        ".",
                        color=style["color"],
                        alpha=0.35,
                        markersize=4,
                    )
            panel.set_title(f"{base} base", fontsize=9)
            panel.set_xlabel("experts merged")
            panel.set_xticks(sorted(cells["experts"].unique()))
        panels[0].set_ylabel(f"{column.replace('_', '-')} performance\n(1 = {reference})")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
        return figure


def gains(experts: pd.DataFrame) -> Figure:
    """Each expert's score beside its base's, on the datasets it was trained on."""
    with matplotlib.rc_context(STYLE):
        bases = list(experts["base"].unique())
        datasets = list(experts["dataset"].unique())
        figure = Figure(
            figsize=(3.4 * len(bases), 0.34 * len(datasets) + 1.0), layout="constrained"
        )
        panels = figure.subplots(1, len(bases), sharey=True, sharex=True, squeeze=False)[0]
        for panel, base in zip(panels, bases, strict=True):
            here = experts[experts["base"] == base].set_index("dataset").loc[datasets]
            rows = range(len(datasets))
            before, after = here["before"], here["expert"]
            panel.hlines(rows, 0, 100, color="#eeeeee", zorder=0)
            panel.hlines(rows, before, after, color=_COLOURS[0], linewidth=2)
            panel.plot(before, rows, "o", color="white", markeredgecolor=_COLOURS[0], label="base")
            panel.plot(after, rows, "o", color=_COLOURS[0], label="expert")
            panel.plot(here["multitask"], rows, "|", color=_GREY, markersize=9, label="multitask")
            panel.set_title(f"{base} base", fontsize=9)
            panel.set_xlabel("score, %")
        panels[0].set_yticks(range(len(datasets)), datasets)
        panels[0].invert_yaxis()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
        return figure


def svg(figure: Figure) -> str:
    """The figure as an svg document, the same bytes for the same figure."""
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing)
    return text.getvalue()


def write(figure: Figure, directory: Path, name: str) -> None:
    """Writes NAME.svg, NAME.pdf and NAME.png (200 dots an inch)."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.svg").write_text(svg(figure))
    with matplotlib.rc_context(STYLE):
        figure.savefig(directory / f"{name}.pdf", metadata={"CreationDate": None})
        figure.savefig(directory / f"{name}.png", dpi=200)
