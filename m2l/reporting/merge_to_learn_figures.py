"""Paper 2's figures: the scores and costs of each way to add a skill to a general model.

Each is drawn from a frame of `skill_scores.models`: a row for each model, scores in percent with
their standard errors. Bars are one standard error long to each side, where it is known.

Source: Morrison et al., "Merge to Learn" (2024), figures 1 to 4.
"""

from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from m2l.reporting import style
from m2l.studies.findings import REFUSALS, SAFETY
from m2l.studies.merge_to_learn import GENERAL, METHODS

MERGED = "merge"
REGIMES = {
    GENERAL: "General model",
    "ptm": "Skill's own model",
    "cft": "Continued fine-tuning",
    "rt": "Retraining",
    MERGED: "Merge, heuristic w",
}
_EVALUATIONS = {
    GENERAL: "general score, %",
    SAFETY: "unsafe requests refused, %",
    REFUSALS: "safe look-alikes answered, %",
}
_LOOKS = {
    "task_arithmetic": {"color": style.ORANGE, "marker": "^"},
    "linear": {"color": style.BLUE, "marker": "v"},
    "wise_ft": {"color": style.SKY, "marker": "p"},
    "ties": {"color": style.PINK, "marker": "s"},
    "ties_mergekit": {"color": "#44AA99", "marker": "<"},
    "dare": {"color": style.GREEN, "marker": "D"},
    GENERAL: {"color": style.BLACK, "marker": "o"},
    "ptm": {"color": style.GREY, "marker": "d"},
    "cft": {"color": style.VERMILLION, "marker": "X"},
    "rt": {"color": "#882255", "marker": "P"},
    MERGED: {"color": style.ORANGE, "marker": "*"},
}
_ERROR = {"fmt": "none", "elinewidth": 0.7, "alpha": 0.4, "zorder": 1}
_STAR = {"marker": "*", "markersize": 12, "markeredgecolor": "black", "markeredgewidth": 0.7}
# The regime of the model at w = 1, where the line of an interpolation ends.
_ENDS = {"linear": "ptm", "wise_ft": "cft"}


def evaluation_name(name: str) -> str:
    """Returns the axis label of an evaluation."""
    return _EVALUATIONS.get(name, f"{name.replace('_', ' ')} score, %")


def skills_of(frame: pd.DataFrame) -> list[str]:
    """Returns the frame's skills, in the study's order."""
    return list(frame.loc[frame["regime"] == "ptm", "skills"].unique())


def skill_models(frame: pd.DataFrame, skill: str, part: int | None = 100) -> pd.DataFrame:
    """Returns the models that one skill was added to, by percent of its data; None: any."""
    models = frame[frame["skills"] == skill]
    return models if part is None else models[models["part"] == part]


def regime(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Returns the models of a regime; of merges those by task arithmetic with w = |D| / |G|."""
    if name == MERGED:
        return frame[frame["heuristic"] & (frame["method"] == "task_arithmetic")]
    return frame[frame["regime"] == name]


def tradeoff(frame: pd.DataFrame) -> Figure:
    """Draws the paper's central figure: the general score against the skill's, along w.

    Args:
        frame: What `skill_scores.models` returns.

    Returns:
        The figure, a panel for each skill: a line for each method, from the general model where w
        is 0 (ties and dare, which change it as well, begin at their first w), a star at the
        heuristic's weight, and the models of the other regimes.
    """
    skills = skills_of(frame)
    with matplotlib.rc_context(style.RC):
        figure, axes = _panels(1, len(skills), 3.1, 3.7)
        for axis, skill in zip(axes[0], skills, strict=True):
            _along(axis, frame, skill, GENERAL, skill)
            axis.set_title(skill.capitalize())
        _legend(figure, _handles(frame))
        return figure


def refusals(frame: pd.DataFrame) -> Figure:
    """Draws safety against exaggerated refusals, along w.

    Args:
        frame: What `skill_scores.models` returns of a study with both evaluations.

    Returns:
        The figure, one panel like those of `tradeoff`: the best is at the upper right.
    """
    with matplotlib.rc_context(style.RC):
        figure, axes = _panels(1, 1, 5.0, 4.2)
        _along(axes[0][0], frame, SAFETY, REFUSALS, SAFETY)
        _legend(figure, _handles(frame))
        return figure


def _along(axis: Axes, frame: pd.DataFrame, skill: str, x: str, y: str) -> None:
    models = skill_models(frame, skill)
    general = frame[frame["regime"] == GENERAL]
    for method in _methods(frame):
        merged = models[models["method"] == method].sort_values("weight")
        start = general if method in ("task_arithmetic", *_ENDS) else general.iloc[:0]
        end = regime(models, _ENDS.get(method, "none"))
        line, look = pd.concat([start, merged, end]), _LOOKS[method]
        axis.plot(line[x], line[y], color=look["color"], linewidth=1.3, zorder=2)
        axis.plot(merged[x], merged[y], linestyle="", markersize=4, zorder=3, **look)
        _errors(axis, merged, x, y, look["color"])
        star = merged[merged["heuristic"]]
        axis.plot(star[x], star[y], color=look["color"], linestyle="", zorder=6, **_STAR)
    for name in (GENERAL, "ptm", "cft", "rt"):
        rows, look = general if name == GENERAL else regime(models, name), _LOOKS[name]
        _errors(axis, rows, x, y, look["color"])
        edge = {"markeredgecolor": "white", "markeredgewidth": 0.6}
        axis.plot(rows[x], rows[y], linestyle="", markersize=9, zorder=5, **edge, **look)
    axis.set_xlabel(evaluation_name(x))
    axis.set_ylabel(evaluation_name(y))
    axis.grid(color="#eeeeee", linewidth=0.6)
    axis.set_axisbelow(True)


def cost(frame: pd.DataFrame, papers: pd.DataFrame) -> Figure:
    """Draws the score of each way to add a skill over its cost.

    Args:
        frame: What `skill_scores.models` returns.
        papers: What `skill_scores.papers_steps` returns.

    Returns:
        The figure: for each skill the mean of general and skill score over floating-point
        operations beyond the general model, from the least part of the data to all of it; and the
        paper's measure, steps of one epoch over all parts.
    """
    skills = skills_of(frame)
    with matplotlib.rc_context(style.RC):
        figure, axes = _panels(1, len(skills) + 1, 2.6, 3.3)
        *scores, steps = axes[0]
        _share(scores, "x", "y")
        for axis, skill in zip(scores, skills, strict=True):
            models = skill_models(frame, skill, None)
            _level(axis, (_general(frame)[GENERAL] + _general(frame)[skill]) / 2)
            for name in ("ptm", "cft", "rt", MERGED):
                rows = regime(models, name).sort_values("part")
                both = (rows[GENERAL] + rows[skill]) / 2
                error = np.hypot(rows[f"{GENERAL}_error"], rows[f"{skill}_error"]) / 2
                _line(axis, rows["flops"], both, error, name)
            axis.set_xscale("log")
            axis.set_title(skill.capitalize())
            axis.set_xlabel("FLOPs beyond\nthe general model")
        ticks, (low, high) = matplotlib.ticker, scores[0].get_xlim()
        for axis in scores:
            # Within a decade there are too few of 1 and 3.
            locator = ticks.LogLocator(subs=(1, 3)) if high > 10 * low else ticks.MaxNLocator(4)
            axis.xaxis.set_major_locator(locator)
            axis.xaxis.set_major_formatter(_power)
            axis.xaxis.set_minor_formatter(ticks.NullFormatter())
        scores[0].set_ylabel("mean of general and skill score, %")
        _papers_bars(steps, papers)
        _legend(figure, [*map(_handle, (GENERAL, "ptm", "cft", "rt", MERGED))])
        return figure


def _power(x: float, _: int) -> str:
    return f"{x:.2g}".replace("e+", "e")


def _papers_bars(axis: Axes, papers: pd.DataFrame) -> None:
    for place, name in enumerate(("ptm", "cft", "rt")):
        x = np.arange(len(papers)) + (place - 1) * 0.27
        axis.bar(x, papers[name], 0.25, color=_LOOKS[name]["color"])
    axis.set_xticks(range(len(papers)), papers["skill"])
    axis.set_title("The paper's measure")
    axis.set_ylabel("steps of one epoch, all parts")


def data_curves(frame: pd.DataFrame) -> Figure:
    """Draws a skill's score and the general score over the amount of the skill's data.

    Args:
        frame: What `skill_scores.models` returns.

    Returns:
        The figure: the skill's score above, the general one below, a column for each skill, over
        the percent of its data; merges are by the heuristic's weight for that much data.
    """
    skills = skills_of(frame)
    with matplotlib.rc_context(style.RC):
        figure, axes = _panels(2, len(skills), 2.7, 2.3)
        _share(axes[1], "y")
        for row, axes_of_row in enumerate(axes):
            for axis, skill in zip(axes_of_row, skills, strict=True):
                name = (skill, GENERAL)[row]
                _level(axis, _general(frame)[name])
                for way in ("cft", "rt", MERGED):
                    rows = regime(skill_models(frame, skill, None), way).sort_values("part")
                    _line(axis, rows["part"], rows[name], rows[f"{name}_error"], way)
                axis.set_xlim(0, 105)
                axis.set_xticks(sorted({int(part) for part in frame["part"].dropna()}))
                if row == 0:
                    axis.set_title(skill.capitalize())
                    axis.set_ylabel(evaluation_name(skill))
                else:
                    axis.set_xlabel("percent of the skill's data")
        axes[1][0].set_ylabel(evaluation_name(GENERAL))
        _legend(figure, [*map(_handle, (GENERAL, "cft", "rt", MERGED))])
        return figure


# --- common to the figures ---


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    size = (max(4.0, width * columns + 0.3), height * rows + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _share(axes: Sequence[Axes], *which: str) -> None:
    # Called before anything is drawn: panels that join later keep the first one's limits.
    for axis in axes[1:]:
        for name in which:
            getattr(axis, f"share{name}")(axes[0])


def _methods(frame: pd.DataFrame) -> list[str]:
    return [method for method in METHODS if method in set(frame["method"])]


def _general(frame: pd.DataFrame) -> pd.Series:
    return frame[frame["regime"] == GENERAL].iloc[0]


def _level(axis: Axes, value: float) -> None:
    axis.axhline(value, color=_LOOKS[GENERAL]["color"], linewidth=0.9, linestyle="--", zorder=0)


def _line(axis: Axes, x: pd.Series, y: pd.Series, error: pd.Series, name: str) -> None:
    look = _LOOKS[name]
    size = 11 if name == MERGED else 6.5
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.5}
    axis.plot(x, y, markersize=size, linewidth=1.3, label=REGIMES[name], **edge, **look)
    if error.notna().any():
        axis.errorbar(x, y, yerr=error, ecolor=look["color"], **_ERROR)


def _errors(axis: Axes, rows: pd.DataFrame, x: str, y: str, colour: str) -> None:
    across, up = rows[f"{x}_error"], rows[f"{y}_error"]
    if across.notna().any() or up.notna().any():
        axis.errorbar(rows[x], rows[y], xerr=across, yerr=up, ecolor=colour, **_ERROR)


def _handle(name: str) -> Artist:
    """Returns a regime's entry of the legend; the general model is a horizontal line."""
    line = matplotlib.lines.Line2D
    if name == GENERAL:
        look = {"color": _LOOKS[GENERAL]["color"], "linestyle": "--", "linewidth": 0.9}
        return line([], [], label=REGIMES[name], **look)
    size = 11 if name == MERGED else 6.5
    return line([], [], label=REGIMES[name], markersize=size, linewidth=1.3, **_LOOKS[name])


def _handles(frame: pd.DataFrame) -> list[Artist]:
    line = matplotlib.lines.Line2D
    handles: list[Artist] = [
        line([], [], label=REGIMES[name], linestyle="", markersize=7, **_LOOKS[name])
        for name in (GENERAL, "ptm", "cft", "rt")
    ]
    for method in _methods(frame):
        label = f"{style.method_name(method)}, along w"
        handles.append(line([], [], label=label, markersize=4, linewidth=1.3, **_LOOKS[method]))
    grey = {"color": "white", "linestyle": ""}
    handles.append(line([], [], label="Heuristic w", **_STAR, **grey))
    return handles


def _legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Adds a legend under the panels, in as many columns as fit."""
    columns = min(len(handles), max(1, int(figure.get_figwidth() / 1.75)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
