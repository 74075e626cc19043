"""Figures 1 to 7 of paper 1, drawn from a performance frame, and those of experts and sweeps.

A performance frame has a row for each size, base, method ("multitask" among them) and number of
experts: size, base, method, experts, held_in, held_in_low, held_in_high, held_out, held_out_low,
held_out_high. Performance is normalised: held-in, 1 is the task's expert; held-out, 1 is the base
model. Low and high are a 95 % band; it is not drawn where they are NaN.

Source: Yadav et al., "What Matters for Model Merging at Scale?", figures 1 to 7.
"""

import io
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from m2l.reporting import style

REFERENCES = {"held_in": "1 = the task's expert", "held_out": "1 = the base model"}
_LABELS = {"held_in": "Held-in", "held_out": "Held-out"}
_ERROR = {"elinewidth": 0.8, "ecolor": "#333333", "capsize": 1.5}


def radar(frame: pd.DataFrame, experts: Sequence[int] | None = None) -> Figure:
    """Draws figure 1: held-in performance of every size and method, a line for each base.

    Args:
        frame: A performance frame.
        experts: A panel for each of these numbers of experts; by default the least and the most.

    Returns:
        The figure; the bold circle is 1, the task's expert.
    """
    counts = style.counts(frame)
    panels = list(experts or dict.fromkeys((counts[0], counts[-1])))
    sizes, methods = style.sizes(frame), style.methods(frame)
    # A spoke is left free between two sizes; the first free one points up and carries the scale.
    slots = len(methods) + 1
    angles = {
        (size, method): 2 * np.pi * (slots * i + j + 1) / (slots * len(sizes))
        for i, size in enumerate(sizes)
        for j, method in enumerate(methods)
    }
    top = max(1.0, frame[["held_in", "held_in_high"]].max().max()) + 0.04
    with matplotlib.rc_context(style.RC):
        figure = Figure(figsize=(5.2 * len(panels), 5.9))
        for place, count in enumerate(panels):
            # By hand: a layout engine cuts what is written around the spokes.
            box = ((place + 0.19) / len(panels), 0.23, 0.62 / len(panels), 0.62 * 5.2 / 5.9)
            axis = figure.add_axes(box, projection="polar")
            here = frame[frame["experts"] == count]
            circle = np.linspace(0, 2 * np.pi, 200)
            axis.plot(circle, np.ones(200), color="black", linewidth=1.8, label="Task's expert")
            for base in style.bases(frame):
                _radar_line(axis, here[here["base"] == base], angles, base)
            _spokes(axis, angles, sizes, top)
            middle = (place + 0.5) / len(panels)
            figure.text(middle, 0.97, f"Merging {count} experts, held-in", ha="center", va="center")
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=3)
        return figure


def _radar_line(
    axis: Axes, rows: pd.DataFrame, angles: dict[tuple[str, str], float], base: str
) -> None:
    rows = rows.set_index(["size", "method"]).reindex([*angles, next(iter(angles))])
    theta = [*angles.values(), next(iter(angles.values())) + 2 * np.pi]
    look = {"color": style.BASE_COLOURS[base]}
    marker = "o" if base == "instruct" else "s"
    name = style.base_name(base)
    axis.plot(
        theta, rows["held_in"], marker=marker, markersize=4, label=name, clip_on=False, **look
    )
    low, high = rows["held_in_low"], rows["held_in_high"]
    if low.notna().any():
        axis.fill_between(theta, low, high, alpha=0.18, linewidth=0, **look)


def _spokes(
    axis: Axes, angles: dict[tuple[str, str], float], sizes: Sequence[str], top: float
) -> None:
    """Writes the methods' names at the spokes of a radar, and the sizes at groups of spokes."""
    axis.set_theta_zero_location("N")
    axis.set_theta_direction(-1)
    axis.set_ylim(0, top)
    axis.set_yticks([0.2, 0.4, 0.6, 0.8], ["0.2", "0.4", "0.6", "0.8"])
    axis.tick_params(axis="y", labelsize=7, labelcolor=style.GREY)
    axis.set_rlabel_position(0)
    axis.set_xticks([])
    axis.yaxis.grid(color="#e2e2e2", linewidth=0.6)
    axis.spines["polar"].set_visible(False)
    for (_, method), angle in angles.items():
        axis.plot([angle, angle], [0, top], color="#e2e2e2", linewidth=0.6, zorder=0)
        left = angle > np.pi
        axis.text(
            angle,
            top * 1.03,
            style.method_name(method),
            fontsize=7.5,
            rotation=90 - np.degrees(angle) + 180 * left,
            rotation_mode="anchor",
            ha="right" if left else "left",
            va="center",
        )
    for size in sizes:
        spokes = [angle for (name, _), angle in angles.items() if name == size]
        # Between two spokes, where there is no method's name.
        middle = np.mean(spokes[: 2 * (len(spokes) // 2)] or spokes)
        look = {"fontsize": 10, "fontweight": "bold"}
        axis.text(middle, top * 1.42, size, ha="center", va="center", **look)


def generalization(
    frame: pd.DataFrame, base: str, methods: Sequence[str] = ("task_arithmetic", "ties")
) -> Figure:
    """Draws figures 2 (base "instruct") and 5 ("pretrained"): held-out over the number of experts.

    Args:
        frame: A performance frame.
        base: The base of the merges.
        methods: The methods to draw, besides multitask; all of them if the frame has none of these.

    Returns:
        The figure, a panel for each size.
    """
    frame = frame[frame["base"] == base]
    merging = style.methods(frame, multitask=False)
    drawn = [name for name in merging if name in methods] or merging
    sizes = style.sizes(frame)
    with matplotlib.rc_context(style.RC):
        figure, axes = _row(len(sizes), 2.35, 2.9)
        for axis, size in zip(axes, sizes, strict=True):
            here = frame[frame["size"] == size]
            _reference(axis)
            for method in [*drawn, *style.methods(here)[-1:]]:
                if method in drawn or method == style.MULTITASK:
                    look = style.method_style(method, merging)
                    rows = here[here["method"] == method]
                    _line(axis, rows, "held_out", label=style.method_name(method), **look)
            axis.set_title(f"{style.base_name(base)}, {size}")
            _experts_axis(axis, frame)
        axes[0].set_ylabel(_label("held_out"))
        _legend(figure, axes[0].get_legend_handles_labels()[0])
        return figure


def by_base(frame: pd.DataFrame) -> Figure:
    """Draws figure 3: held-in over model size, marker by method and colour by base.

    Args:
        frame: A performance frame.

    Returns:
        The figure, a panel for each number of experts.
    """
    counts, sizes = style.counts(frame), style.sizes(frame)
    methods = style.methods(frame, multitask=False)
    offsets = np.linspace(-0.24, 0.24, len(methods)) if len(methods) > 1 else [0.0]
    with matplotlib.rc_context(style.RC):
        figure, axes = _row(len(counts), max(2.3, 0.55 * len(sizes)), 3.1)
        for axis, count in zip(axes, counts, strict=True):
            _reference(axis, "--")
            for base in style.bases(frame):
                for method, offset in zip(methods, offsets, strict=True):
                    chosen = (frame["base"] == base) & (frame["method"] == method)
                    rows = frame[chosen & (frame["experts"] == count)]
                    rows = rows.set_index("size").reindex(sizes)
                    axis.errorbar(
                        np.arange(len(sizes)) + offset,
                        rows["held_in"],
                        yerr=_error(rows, "held_in"),
                        fmt=style.method_style(method, methods)["marker"],
                        color=style.BASE_COLOURS[base],
                        elinewidth=0.8,
                        markersize=4.5,
                        label=f"{style.base_name(base)}, {style.method_name(method)}",
                    )
            axis.set_title(f"{count} experts")
            axis.set_xticks(range(len(sizes)), sizes)
            axis.set_xlim(-0.6, len(sizes) - 0.4)
            axis.set_xlabel("model size")
        axes[0].set_ylabel(_label("held_in"))
        line = matplotlib.lines.Line2D
        handles = [
            line([], [], color=style.BASE_COLOURS[base], linewidth=5, label=style.base_name(base))
            for base in style.bases(frame)
        ]
        for method in methods:
            marker = style.method_style(method, methods)["marker"]
            look = {"color": style.GREY, "linestyle": "", "marker": marker}
            handles.append(line([], [], label=style.method_name(method), **look))
        _legend(figure, handles)
        return figure


def by_size(frame: pd.DataFrame) -> Figure:
    """Draws figure 4: held-in bars over the methods, coloured by size.

    Args:
        frame: A performance frame.

    Returns:
        The figure: pretrained with the fewest experts, instruction-tuned with the fewest and with
        the most.
    """
    counts, sizes = style.counts(frame), style.sizes(frame)
    panels = [("pretrained", counts[0]), ("instruct", counts[0]), ("instruct", counts[-1])]
    panels = [panel for panel in dict.fromkeys(panels) if panel[0] in style.bases(frame)]
    methods = style.methods(frame, multitask=False)
    looks = style.ordered_styles(sizes)
    with matplotlib.rc_context(style.RC):
        figure, axes = _row(len(panels), max(2.2, 0.68 * len(methods) + 0.2), 3.1)
        for axis, (base, count) in zip(axes, panels, strict=True):
            here = frame[(frame["base"] == base) & (frame["experts"] == count)]
            for place, size in enumerate(sizes):
                rows = here[here["size"] == size].set_index("method").reindex(methods)
                colour = looks[size]["color"]
                _bars(axis, rows, "held_in", place, len(sizes), color=colour, label=size)
            _reference(axis, "--")
            axis.set_title(f"{style.base_name(base)}, {count} experts")
            names = [style.method_name(name) for name in methods]
            axis.set_xticks(range(len(methods)), [_broken(name) for name in names])
        axes[0].set_ylabel(_label("held_in"))
        _legend(figure, axes[-1].get_legend_handles_labels()[0])
        return figure


def more_experts(frame: pd.DataFrame, method: str = "task_arithmetic") -> Figure:
    """Draws figure 6: one method over the number of experts, a line for each size.

    Args:
        frame: A performance frame.
        method: The merge method; the frame's first method if it does not have this one.

    Returns:
        The figure: held-in and held-out, each for both bases.
    """
    merging = style.methods(frame, multitask=False)
    method = method if method in merging else merging[0]
    rows = frame[frame["method"] == method]
    sizes, bases = style.sizes(frame), style.bases(frame)
    looks = style.ordered_styles(sizes)
    panels = [(column, base) for column in REFERENCES for base in bases]
    with matplotlib.rc_context(style.RC):
        figure, axes = _row(len(panels), 2.35, 3.0, sharey=False)
        for axis, (column, base) in zip(axes, panels, strict=True):
            _reference(axis)
            for size in sizes:
                here = rows[(rows["base"] == base) & (rows["size"] == size)]
                _line(axis, here, column, label=size, **looks[size])
            axis.set_title(f"{style.base_name(base)},\n{_LABELS[column].lower()}")
            _experts_axis(axis, frame)
        for first, column in ((0, "held_in"), (len(bases), "held_out")):
            axes[first].set_ylabel(f"{style.method_name(method)}\n{REFERENCES[column]}")
            for axis in axes[first + 1 : first + len(bases)]:
                axis.sharey(axes[first])
                axis.tick_params(labelleft=False)
        _legend(figure, axes[0].get_legend_handles_labels()[0])
        return figure


def methods_at_scale(frame: pd.DataFrame) -> Figure:
    """Draws figure 7: the largest size's methods side by side, grouped by the number of experts.

    Args:
        frame: A performance frame.

    Returns:
        The figure: held-in and held-out bars, of the instruction-tuned base if there is one.
    """
    base, largest, counts = style.bases(frame)[-1], style.sizes(frame)[-1], style.counts(frame)
    frame = frame[(frame["base"] == base) & (frame["size"] == largest)]
    methods = style.methods(frame, multitask=False)
    with matplotlib.rc_context(style.RC):
        width = max(2.6, (0.16 * len(methods) + 0.2) * len(counts) + 0.4)
        figure, axes = _row(2, width, 3.0, sharey=False)
        for axis, column in zip(axes, REFERENCES, strict=True):
            for place, method in enumerate(methods):
                rows = frame[frame["method"] == method].set_index("experts").reindex(counts)
                look = {"color": style.method_style(method, methods)["color"]}
                name = style.method_name(method)
                _bars(axis, rows, column, place, len(methods), label=name, **look)
            _reference(axis, "--")
            axis.set_title(f"{_LABELS[column]}, {largest}, {style.base_name(base).lower()}")
            axis.set_xticks(range(len(counts)), counts)
            axis.set_xlabel("experts merged")
            axis.set_ylabel(REFERENCES[column])
        _legend(figure, axes[0].get_legend_handles_labels()[0])
        return figure


# --- the experts, and the sweeps ---


def gains(experts: pd.DataFrame, size: str | None = None) -> Figure:
    """Draws each expert's score and its base's, on the datasets it was trained on.

    Args:
        experts: size, base, dataset, before, expert, multitask; scores in percent.
        size: The experts' size; by default the last one, the largest.

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
    """Draws the scores that merges' hyper-parameters were chosen by, over the scale.

    Where a method has a density or a drop rate as well, a line is the best of them at each scale.

    Args:
        choices: size, base, method, experts, scale, density, drop_rate (NaN where the method has
            none), score, chosen (bool). Methods without a scale have no curve.
        base: The base of the merges.

    Returns:
        The figure: a row for each method, a column for each size, a line for each number of
        experts, a star at the chosen values.
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


# --- common to the figures ---


def _row(
    panels: int, width: float, height: float, sharey: bool = True
) -> tuple[Figure, list[Axes]]:
    """Returns a figure of `panels` panels in a row, each `width` by `height` inches."""
    figure = Figure(figsize=(max(4.0, width * panels + 0.5), height), layout="constrained")
    return figure, list(figure.subplots(1, panels, sharey=sharey, squeeze=False)[0])


def _label(column: str) -> str:
    return f"{_LABELS[column]} performance\n({REFERENCES[column]})"


def _reference(axis: Axes, line: str = "-") -> None:
    axis.axhline(1.0, color="#999999", linewidth=0.9, linestyle=line, zorder=0)


def _experts_axis(axis: Axes, frame: pd.DataFrame) -> None:
    counts = style.counts(frame)
    margin = max(0.5, (counts[-1] - counts[0]) * 0.06)
    axis.set_xticks(counts)
    axis.set_xlim(counts[0] - margin, counts[-1] + margin)
    axis.set_xlabel("experts merged")


def _error(rows: pd.DataFrame, column: str) -> np.ndarray | None:
    """Returns the band's distances down and up from the values (2 x rows), or None without one."""
    value = rows[column]
    distances = np.array([value - rows[f"{column}_low"], rows[f"{column}_high"] - value])
    return np.clip(distances, 0, None) if np.isfinite(distances).any() else None


def _line(axis: Axes, rows: pd.DataFrame, column: str, **look: object) -> None:
    """Draws a line over the number of experts with its band; one point has an error bar."""
    rows = rows.sort_values("experts")
    axis.plot(rows["experts"], rows[column], markersize=4.5, linewidth=1.5, **look)
    error = _error(rows, column)
    if error is None:
        return
    if len(rows) == 1:
        axis.errorbar(rows["experts"], rows[column], yerr=error, fmt="none", **_ERROR)
        return
    low, high = rows[f"{column}_low"], rows[f"{column}_high"]
    axis.fill_between(rows["experts"], low, high, color=look["color"], alpha=0.15, linewidth=0)


def _bars(
    axis: Axes, rows: pd.DataFrame, column: str, index: int, count: int, **look: object
) -> BarContainer:
    """Draws the bars of the `index`-th of `count` group members at 0, 1, 2, ..."""
    width = 0.82 / count
    x = np.arange(len(rows)) + (index - (count - 1) / 2) * width
    error = _error(rows, column)
    return axis.bar(x, rows[column], width * 0.94, yerr=error, error_kw=_ERROR, **look)


def _broken(name: str) -> str:
    return name.replace(" ", "\n").replace("-", "-\n")


def _legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Adds a legend under the panels, in as many columns as fit."""
    columns = max(1, int(figure.get_figwidth() / 1.3))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)))


# --- for phones, and for pointers ---

_PHONE_WIDTH = 3.8


def narrowed(figure: Figure) -> Figure:
    """Returns a copy for narrow screens: the same panels below each other, two in a row if many.

    It is made of a figure that was not drawn yet, whose layout is still computed.
    """
    copy = pickle.loads(pickle.dumps(figure))
    if all(axis.get_subplotspec() is not None for axis in copy.axes):
        _refill(copy)
    else:
        _stack(copy)
    for legend in list(copy.legends):
        legend.remove()
        names = [text.get_text() for text in legend.get_texts()]
        with matplotlib.rc_context(style.RC):
            options = {"loc": "outside lower center", "ncols": 2}
            copy.legend(handles=legend.legend_handles, labels=names, **options)
    return copy


def _refill(figure: Figure) -> None:
    """Puts the panels of a grid into one column or two, each with the labels that it shared."""
    grid = figure.axes[0].get_gridspec()
    height = figure.get_figheight() / grid.nrows
    places = {
        (axis.get_subplotspec().rowspan.start, axis.get_subplotspec().colspan.start): axis
        for axis in figure.axes
    }
    columns = 1 if len(places) <= 5 else 2
    for (row, column), axis in places.items():
        bottom = max(r for r, c in places if c == column)
        axis.set_title(axis.get_title() or places[0, column].get_title())
        axis.set_xlabel(axis.get_xlabel() or places[bottom, column].get_xlabel())
        left = [places[row, place].get_ylabel() for place in range(column + 1)]
        axis.set_ylabel(next(filter(None, reversed(left)), ""))
        axis.tick_params(labelleft=True, labelbottom=True)
    rows = -(-len(places) // columns)
    figure.set_size_inches(_PHONE_WIDTH, height * rows)
    for place, axis in zip(figure.add_gridspec(rows, columns), figure.axes, strict=False):
        axis.set_subplotspec(place)


def _stack(figure: Figure) -> None:
    """Puts panels of a row that were placed by hand below each other, with what is written."""
    count = len(figure.axes)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width / count, height * count)
    for place, axis in enumerate(figure.axes):
        left, bottom, wide, high = axis.get_position(original=True).bounds
        row = count - 1 - place
        axis.set_position(
            (left * count - place, (bottom + row) / count, wide * count, high / count)
        )
    for text in figure.texts:
        left, bottom = text.get_position()
        place = int(left * count)
        text.set_position((left * count - place, (bottom + count - 1 - place) / count))


def values(figure: Figure) -> dict[str, list[str]]:
    """Marks the points and bars of a figure; returns what each is, by the mark that is its id.

    A line's texts are those of its points, in their order; a bar has one.
    """
    texts: dict[str, list[str]] = {}
    for axis in figure.axes:
        labels = {line: line.get_label() for line in axis.lines}
        for container in axis.containers:
            if isinstance(container, ErrorbarContainer):
                line, caps, _ = container.lines
                labels |= {line: container.get_label()} if line is not None else {}
                labels = {each: label for each, label in labels.items() if each not in caps}
        for line, label in labels.items():
            if line.get_marker() in ("", "None", None):
                continue
            points = np.column_stack([np.asarray(xy, float) for xy in line.get_data()])
            points = points[np.isfinite(points).all(axis=1)]
            line.set_gid(f"value{len(texts)}")
            # Where y has words for numbers, the values are along x.
            worded = any(name[:1].isalpha() for name in _names(axis.yaxis))
            along, order = (axis.yaxis, -1) if worded else (axis.xaxis, 1)
            texts[line.get_gid()] = [_value(along, label, *point[::order]) for point in points]
        for container in axis.containers:
            for bar in container if isinstance(container, BarContainer) else ():
                middle, length, along = bar.get_center()[0], bar.get_height(), axis.xaxis
                if container.orientation == "horizontal":
                    middle, length, along = bar.get_center()[1], bar.get_width(), axis.yaxis
                if np.isfinite(length):
                    bar.set_gid(f"value{len(texts)}")
                    text = _value(along, container.get_label(), middle, length)
                    texts[bar.get_gid()] = [text]
    return texts


def _names(axis: Axis) -> list[str]:
    """Returns what the ticks of an axis are called, shown or not, if that is set."""
    if not isinstance(axis.get_major_locator(), matplotlib.ticker.FixedLocator):
        return []
    names = axis.get_major_formatter().format_ticks(axis.get_ticklocs())
    return [str(name) for name in names] if any(map(str, names)) else []


def _value(axis: Axis, label: object, x: float, y: float) -> str:
    """Returns "TIES, 4: 0.42"; where the axis' ticks are names, with the nearest one's."""
    place = f"{x:g}"
    if names := _names(axis):
        ticks = axis.get_ticklocs()
        place = names[int(np.argmin(np.abs(np.asarray(ticks) - x)))].replace("\n", " ")
    series = "" if str(label).startswith("_") else f"{label}, "
    return f"{series}{place}: {y:.3g}"


# --- files ---


def _with_fixed_layout(figure: Figure) -> Figure:
    """Computes the layout once: computed again at the next drawing, it would differ slightly."""
    if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


def svg(figure: Figure) -> str:
    """Returns the figure as an svg document, the same bytes for the same figure."""
    text = io.StringIO()
    with matplotlib.rc_context(style.RC):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        _with_fixed_layout(figure).savefig(text, format="svg", metadata=metadata)
    return text.getvalue()


_SAVE_OPTIONS = {"pdf": {"metadata": {"CreationDate": None}}, "png": {"dpi": 200}}


def write(
    figure: Figure, directory: Path, name: str, formats: Iterable[str] = ("svg", "pdf", "png")
) -> None:
    """Writes NAME.svg, NAME.pdf and NAME.png (200 dots an inch)."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.svg").write_text(svg(figure))
    with matplotlib.rc_context(style.RC):
        for ending in formats:
            if ending != "svg":
                with (directory / f"{name}.{ending}").open("wb") as file:
                    figure.savefig(file, format=ending, **_SAVE_OPTIONS[ending])
