"""Paper 2's figures: what a skill costs a general model, by each way to add it.

Each is drawn from a frame of `skill_results.models`: a row for each model, scores in percent with
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
from m2l.studies.skill_findings import REFUSALS, SAFETY
from m2l.studies.skills import GENERAL, METHODS

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
    "dare": {"color": style.GREEN, "marker": "D"},
    GENERAL: {"color": style.BLACK, "marker": "o"},
    "ptm": {"color": style.GREY, "marker": "d"},
    "cft": {"color": style.VERMILLION, "marker": "X"},
    "rt": {"color": "#882255", "marker": "P"},
    MERGED: {"color": style.ORANGE, "marker": "*"},
}
_ERROR = {"fmt": "none", "elinewidth": 0.7, "alpha": 0.4, "zorder": 1}
_STAR = {"marker": "*", "markersize": 12, "markeredgecolor": "black", "markeredgewidth": 0.7}
# The regime at whose model the line of an interpolation ends, at w = 1.
_ENDS = {"linear": "ptm", "wise_ft": "cft"}


def evaluation_name(name: str) -> str:
    """What an evaluation measures, as an axis says it."""
    return _EVALUATIONS.get(name, f"{name.replace('_', ' ')} score, %")


def skills_of(frame: pd.DataFrame) -> list[str]:
    """The frame's skills, in the study's order."""
    return list(frame.loc[frame["regime"] == "ptm", "skills"].unique())


def of_skill(frame: pd.DataFrame, skill: str, part: int | None = 100) -> pd.DataFrame:
    """The models that one skill was added to, by percent of its data; None: any."""
    found = frame[frame["skills"] == skill]
    return found if part is None else found[found["part"] == part]


def by_heuristic(frame: pd.DataFrame) -> pd.DataFrame:
    """The merges by task arithmetic whose weight is |D| / |G|."""
    return frame[frame["heuristic"] & (frame["method"] == "task_arithmetic")]


def regime(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """The models of a regime; of the merges those of `by_heuristic`."""
    return by_heuristic(frame) if name == MERGED else frame[frame["regime"] == name]


def tradeoff(frame: pd.DataFrame) -> Figure:
    """The paper's central figure: the general score against the skill's, along w.

    Args:
        frame: Of `skill_results.models`.

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
    """Safety against exaggerated refusals, along w.

    Args:
        frame: Of `skill_results.models`, of a study with both evaluations.

    Returns:
        The figure, one panel like those of `tradeoff`: the best is at the upper right.
    """
    with matplotlib.rc_context(style.RC):
        figure, axes = _panels(1, 1, 5.0, 4.2)
        _along(axes[0][0], frame, SAFETY, REFUSALS, SAFETY)
        _legend(figure, _handles(frame))
        return figure


def _along(axis: Axes, frame: pd.DataFrame, skill: str, x: str, y: str) -> None:
    models = of_skill(frame, skill)
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
        found, look = general if name == GENERAL else regime(models, name), _LOOKS[name]
        _errors(axis, found, x, y, look["color"])
        edge = {"markeredgecolor": "white", "markeredgewidth": 0.6}
        axis.plot(found[x], found[y], linestyle="", markersize=9, zorder=5, **edge, **look)
    axis.set_xlabel(evaluation_name(x))
    axis.set_ylabel(evaluation_name(y))
    axis.grid(color="#eeeeee", linewidth=0.6)
    axis.set_axisbelow(True)


def cost(frame: pd.DataFrame, papers: pd.DataFrame) -> Figure:
    """What each way to add a skill costs, beside what it brings.

    Args:
        frame: Of `skill_results.models`.
        papers: Of `skill_results.papers_steps`.

    Returns:
        The figure: for each skill the mean of general and skill score over floating-point
        operations beyond the general model, from the least part of the data to all of it; and the
        paper's own measure, steps of one epoch over all parts.
    """
    skills = skills_of(frame)
    with matplotlib.rc_context(style.RC):
        figure, axes = _panels(1, len(skills) + 1, 2.6, 3.3)
        *scores, steps = axes[0]
        _share(scores, "x", "y")
        for axis, skill in zip(scores, skills, strict=True):
            of_both = of_skill(frame, skill, None)
            _level(axis, (_general(frame)[GENERAL] + _general(frame)[skill]) / 2)
            for name in ("ptm", "cft", "rt", MERGED):
                rows = regime(of_both, name).sort_values("part")
                both = (rows[GENERAL] + rows[skill]) / 2
                error = np.hypot(rows[f"{GENERAL}_error"], rows[f"{skill}_error"]) / 2
                _line(axis, rows["flops"], both, error, name)
            axis.set_xscale("log")
            ticks = matplotlib.ticker
            axis.xaxis.set_major_locator(ticks.LogLocator(subs=(1, 3)))
            axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0e}".replace("e+", "e"))
            axis.xaxis.set_minor_formatter(ticks.NullFormatter())
            axis.set_title(skill.capitalize())
            axis.set_xlabel("FLOPs beyond\nthe general model")
        scores[0].set_ylabel("mean of general and skill score, %")
        _papers_bars(steps, papers)
        _legend(figure, [*map(_handle, (GENERAL, "ptm", "cft", "rt", MERGED))])
        return figure


def _papers_bars(axis: Axes, papers: pd.DataFrame) -> None:
    for place, name in enumerate(("ptm", "cft", "rt")):
        x = np.arange(len(papers)) + (place - 1) * 0.27
        axis.bar(x, papers[name], 0.25, color=_LOOKS[name]["color"])
    axis.set_xticks(range(len(papers)), papers["skill"])
    axis.set_title("The paper's measure")
    axis.set_ylabel("steps of one epoch, all parts")


def data_curves(frame: pd.DataFrame) -> Figure:
    """What more of a skill's data brings, and what it does to the general score.

    Args:
        frame: Of `skill_results.models`.

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
                for of in ("cft", "rt", MERGED):
                    rows = regime(of_skill(frame, skill, None), of).sort_values("part")
                    _line(axis, rows["part"], rows[name], rows[f"{name}_error"], of)
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


# --- what the figures have in common ---


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    size = (max(4.0, width * columns + 0.3), height * rows + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _share(axes: Sequence[Axes], *which: str) -> None:
    """Before anything is drawn: panels that join later keep the first one's limits."""
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
    """What the legend shows for a regime; the general model is a level there."""
    line = matplotlib.lines.Line2D
    if name == GENERAL:
        look = {"color": _LOOKS[GENERAL]["color"], "linestyle": "--", "linewidth": 0.9}
        return line([], [], label=REGIMES[name], **look)
    size = 11 if name == MERGED else 6.5
    return line([], [], label=REGIMES[name], markersize=size, linewidth=1.3, **_LOOKS[name])


def _handles(frame: pd.DataFrame) -> list[Artist]:
    line = matplotlib.lines.Line2D
    found: list[Artist] = [
        line([], [], label=REGIMES[name], linestyle="", markersize=7, **_LOOKS[name])
        for name in (GENERAL, "ptm", "cft", "rt")
    ]
    for method in _methods(frame):
        label = f"{style.method_name(method)}, along w"
        found.append(line([], [], label=label, markersize=4, linewidth=1.3, **_LOOKS[method]))
    grey = {"color": "white", "linestyle": ""}
    found.append(line([], [], label="Heuristic w", **_STAR, **grey))
    return found


def _legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Under the panels, in as many columns as the figure's width has room for."""
    columns = min(len(handles), max(1, int(figure.get_figwidth() / 1.75)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
