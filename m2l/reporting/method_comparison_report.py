"""The report of a comparison of methods: the table, what is noise in it, and what merges cost."""

import dataclasses

import markupsafe
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from m2l import models
from m2l.merging import METHODS
from m2l.reporting import blocks, style, tables
from m2l.reporting.blocks import Drawing, Folded, Report, Section, Table, Text
from m2l.studies import method_scores, study_results
from m2l.studies.method_comparison import DEFAULT, SEARCHED, MethodComparison
from m2l.studies.method_scores import BASE, MULTITASK, MethodScores
from m2l.studies.study_results import StudyResults
from m2l.version import __version__

_NAMES = {"held_in": "held-in", "held_out": "held-out"}
_UNITS = {"held_in": "1 = the task's expert", "held_out": "1 = the base"}
_CAPTIONS = {
    "methods": "Normalised performance of each method's merge of all experts, from the best down; "
    "bars: 95 %. Dashed: the multitask model; dotted: the base.",
    "cost": "Held-in performance, by the best settings there are, over the CPU seconds of a merge "
    "by the defaults, all cores together, from the start of the command to its end.",
}


@dataclasses.dataclass(frozen=True)
class ComparisonContents:
    """The data of a report.

    Attributes:
        study: The comparison's settings.
        scores: Every model's scores.
        costs: What merges took, see `method_scores.costs`.
        searches: Every candidate, see `method_scores.searches`.
        lineage: The origin of every model, see `study_results.lineage`.
        seconds: The duration of all stages together.
    """

    study: MethodComparison
    scores: MethodScores
    costs: pd.DataFrame
    searches: pd.DataFrame
    lineage: pd.DataFrame
    seconds: float

    @property
    def settings(self) -> tuple[str, ...]:
        """Of DEFAULT and SEARCHED what the comparison has; the last are the best it has."""
        return (DEFAULT, SEARCHED) if len(self.searches) else (DEFAULT,)

    def compared(self, column: str, settings: str = "") -> pd.DataFrame:
        """Compares the methods by these settings, or by the best; see `MethodScores.compared`."""
        return self.scores.compared(column, settings or self.settings[-1])


def collect(results: StudyResults) -> ComparisonContents:
    """Computes the data of a finished comparison's report."""
    return ComparisonContents(
        study=results.study,
        scores=method_scores.scores(results),
        costs=method_scores.costs(results),
        searches=method_scores.searches(results),
        lineage=study_results.lineage(results),
        seconds=sum(results.seconds.values()),
    )


def table(material: ComparisonContents) -> pd.DataFrame:
    """Returns the table: a row for each method, from the best held-in down.

    Returns:
        method; held-in and held-out by the defaults and after the search (that of the defaults,
        where a method was not searched), the latter with its interval as text; CPU s; read and
        written, in MB.
    """
    scores, rows = material.scores, []
    costs = material.costs.set_index("method")
    for method in material.compared("held_in")["method"]:
        row: dict[str, object] = {"method": style.method_name(method)}
        for column, name in _NAMES.items():
            for settings in material.settings:
                values = scores.rows.loc[scores.index(method, settings)]
                row[f"{name}, {settings}"] = values[column]
            low, high = (values[f"{column}_{end}"] for end in ("low", "high"))
            row[f"{name}, {settings}, 95 %"] = f"{low:.2f} to {high:.2f}"
        row["CPU s"] = costs.loc[method, "cpu_seconds"]
        row["read, MB"] = costs.loc[method, "read"] / 1e6
        row["written, MB"] = costs.loc[method, "written"] / 1e6
        rows.append(row)
    return pd.DataFrame(rows)


def apart(material: ComparisonContents) -> pd.DataFrame:
    """Returns how far each method is behind the best, and how much of that may be noise.

    Returns:
        Rows with method, and for each kind of performance and of settings: behind, bound, whether
        it is "worse", and whether it is "better" than the base.
    """
    frames = []
    for column, name in _NAMES.items():
        for settings in material.settings:
            frame = material.compared(column, settings)
            frame["worse"] = np.where(frame["worse"], "worse", "")
            frame["base"] = np.where(frame["beyond_base"], "better", "")
            frame = frame.set_index(frame["method"].map(style.method_name))
            frame = frame[["behind", "bound", "worse", "base"]]
            frames.append(frame.add_prefix(f"{name}, {settings}: "))
    order = material.compared("held_in")["method"].map(style.method_name)
    return pd.concat(frames, axis=1).loc[order].rename_axis("method").reset_index()


def methods_figure(material: ComparisonContents) -> Figure:
    """Draws held-in and held-out performance of every method, by defaults and searched."""
    order = list(material.compared("held_in")["method"])
    with matplotlib.rc_context(style.RC):
        size = (8.6, 0.24 * len(order) + 1.3)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axis, column in zip(panels, _NAMES, strict=True):
            _dots(axis, material, order, column)
        panels[0].set_yticks(range(len(order)), [style.method_name(name) for name in order])
        panels[0].invert_yaxis()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        return figure


def _dots(axis: Axes, material: ComparisonContents, order: list[str], column: str) -> None:
    scores, places = material.scores, np.arange(len(order))
    for reference, line in ((MULTITASK, "--"), (BASE, ":")):
        value = scores.rows.loc[scores.rows["method"] == reference, column].iloc[0]
        axis.axvline(value, color=style.GREY, linewidth=0.9, linestyle=line, label=reference)
    axis.grid(axis="y", color="#f4f4f4", linewidth=0.6)
    faces = ("white", style.BLUE) if len(material.settings) > 1 else (style.BLUE,)
    for place, (settings, face) in enumerate(zip(material.settings, faces, strict=True)):
        shift = 0.34 * place - 0.17 * (len(faces) - 1)
        rows = scores.rows.loc[[scores.index(name, settings) for name in order]]
        value = rows[column]
        error = [value - rows[f"{column}_low"], rows[f"{column}_high"] - value]
        axis.errorbar(
            value,
            places + shift,
            xerr=np.clip(np.array(error), 0, None),
            fmt="o",
            markersize=4,
            color=style.BLUE,
            markerfacecolor=face,
            elinewidth=0.6,
            label=settings,
        )
    axis.set_xlabel(f"{_NAMES[column]} performance\n({_UNITS[column]})")


def cost_figure(material: ComparisonContents) -> Figure:
    """Draws held-in performance after the search over the CPU seconds of a merge."""
    scores, costs = material.scores, material.costs
    places = [scores.index(name, material.settings[-1]) for name in costs["method"]]
    values = list(scores.rows.loc[places, "held_in"])
    with matplotlib.rc_context(style.RC):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axis = figure.subplots()
        axis.plot(costs["cpu_seconds"], values, "o", markersize=4, color=style.BLUE, label="_")
        axis.set_xscale("log")
        axis.margins(x=0.3)
        for place, index in enumerate(np.argsort(values)):
            left = bool(place % 2)  # In turns, so that fewer names cover each other.
            axis.annotate(
                style.method_name(costs["method"][index]),
                (costs["cpu_seconds"][index], values[index]),
                xytext=(-4 if left else 4, -2),
                textcoords="offset points",
                ha="right" if left else "left",
                fontsize=6,
            )
        axis.set_xlabel("CPU seconds of a merge")
        axis.set_ylabel("held-in performance\n(1 = the task's expert)")
        return figure


def _noise(material: ComparisonContents, column: str, settings: str) -> str:
    """Returns a sentence: who is best, and how many are told apart from it."""
    frame = material.compared(column, settings)
    best, worse = frame.iloc[0], frame[frame["worse"]]
    manner = "by their defaults" if settings == DEFAULT else "after the search"
    text = (
        f"{_NAMES[column].capitalize()}, {manner}: {style.method_name(best['method'])} is first "
        f"with {best['value']:.3f}; {len(worse)} of the other {len(frame) - 1} are worse by more "
        "than noise"
    )
    if len(worse):
        text += f" ({', '.join(map(style.method_name, worse['method']))})"
    beyond = frame[frame["beyond_base"]]
    text += f". {len(beyond)} {'is' if len(beyond) == 1 else 'are'} better than the base by as much"
    if 0 < len(beyond) < len(frame):
        text += f" ({', '.join(map(style.method_name, beyond['method']))})"
    return f"{text}."


def _gain(material: ComparisonContents) -> tuple[int, float, float, float]:
    """Returns how many methods were searched, and the mean gain held-in with its interval."""
    scores = material.scores
    searched = list(material.searches["method"].unique())
    values = scores.replicates["held_in"]
    after, before = (
        values[:, [scores.index(name, settings) for name in searched]].mean(1)
        for settings in (SEARCHED, DEFAULT)
    )
    gains = after - before
    return len(searched), float(gains[0]), *method_scores.interval(gains)


def report(material: ComparisonContents) -> Report:
    """Returns the report of a comparison's data."""
    frames = {
        "methods": table(material),
        "apart": apart(material),
        "costs": material.costs,
    }
    if len(material.settings) > 1:
        frames["searches"] = material.searches
    drawn = {"methods": methods_figure(material), "cost": cost_figure(material)}
    drawings = {
        name: Drawing(name, _CAPTIONS[name], blocks.svg(figure, name, _CAPTIONS[name]))
        for name, figure in drawn.items()
    }
    study, count = material.study, len(material.study.study.categories)
    noise = [
        Text(_noise(material, column, settings))
        for column in _NAMES
        for settings in material.settings
    ]
    described = [
        (style.method_name(name), METHODS[name].summary) for name in material.study.methods
    ]
    summaries = pd.DataFrame(described, columns=["method", "what it does"])
    return Report(
        title="Merge methods compared: a study",
        plain=_plain(material),
        lead=_lead(material),
        headline=_headline(material),
        claims="",
        notes=[
            Text(
                f"Every method merges the same {count} experts. Performance is normalised: "
                "held-in, 1 is the score of the task's own expert; held-out, 1 is the score of the "
                "base. Means over a category's datasets, without those on which this scores 0, "
                "then over categories; intervals of 95 % are of a bootstrap over datasets, which "
                "are the same for all methods.",
                "note",
            )
        ],
        findings=[],
        sections=[
            Section(
                "table",
                "Every method",
                "Every method",
                [
                    drawings["methods"],
                    Table("Every method", blocks.cells(frames["methods"]), "methods"),
                    Folded("What each does", [Table("Methods", blocks.cells(summaries))]),
                ],
            ),
            Section(
                "noise",
                "Which differences are noise",
                "Noise",
                [
                    *noise,
                    Text(
                        "Behind is the distance from the first; bound is how large a distance may "
                        "be by chance, so that of all differences between two methods, taken "
                        "together, 95 % of the bootstrap's samples exceed none (Tukey's "
                        "simultaneous intervals). The experts are one draw: other experts may "
                        "rank the methods otherwise, which no interval here shows.",
                        "note",
                    ),
                    Folded("The distances", [Table("Distances", blocks.cells(frames["apart"], 3))]),
                ],
            ),
            Section(
                "cost",
                "What a merge costs",
                "Costs",
                [
                    Text(
                        "A merge by the defaults streams from checkpoints to a checkpoint in a "
                        f"process of its own, which may hold {study.memory}. Methods that need "
                        "statistics of the experts' data have these beside it."
                    ),
                    drawings["cost"],
                ],
            ),
            *_searches(material),
            blocks.lineage(material.lineage),
        ],
        settings={"max_examples": study.study.max_examples, **study.to_dict()},
        seconds=material.seconds,
        tables=frames,
        figures=drawn,
        summary=("normalised performance, and the cost of a merge", frames["methods"]),
    )


def _searches(material: ComparisonContents) -> list[Section]:
    if len(material.settings) == 1:
        return []
    text = (
        f"Of each method that has settings to choose, {material.study.candidates} candidates by "
        "TPE and the defaults were scored by mean normalised performance, held-in, on examples "
        "that nothing is evaluated on."
    )
    chosen = material.searches[material.searches["chosen"]].drop_duplicates("method")
    chosen = tables.named(chosen.drop(columns=["chosen", "number"]))
    candidates = Table("Every candidate", blocks.cells(material.searches, 3), "searches")
    content = [
        Text(text),
        Folded("What was chosen", [Table("What was chosen", blocks.cells(chosen, 3))]),
        Folded(f"{len(material.searches)} candidates", [candidates], aside=True),
    ]
    return [Section("searches", "The searches", "Searches", content)]


def _lead(material: ComparisonContents) -> markupsafe.Markup:
    study = material.study.study
    text = markupsafe.Markup(
        "{} methods on {} experts of a model of {:,} parameters, {} held-out task categories; "
        "data: {}. m2l {}."
    )
    config = study.models[material.study.size]
    return text.format(
        len(material.study.methods),
        len(study.categories),
        models.parameters(config),
        len(study.held_out),
        blocks.data_source(study.source),
        __version__,
    )


def _plain(material: ComparisonContents) -> str:
    """Returns the study in plain words: what was done, what came out, what it means."""
    rows = material.scores.rows
    base = rows.loc[rows["method"] == BASE, "held_in"].iloc[0]
    ranges = [
        f"{frame['value'].min():.0%} to {frame['value'].max():.0%}"
        for frame in (material.compared("held_in", settings) for settings in material.settings)
    ]
    last = material.compared("held_in")
    text = (
        f"The same {len(material.study.study.categories)} expert models were merged by {len(last)} "
        f"methods. By their default settings these keep {ranges[0]} of what the experts reach, of "
        f"which the base has {base:.0%}."
    )
    if len(ranges) > 1:
        count, gain, low, high = _gain(material)
        text += (
            f" The search of {count} methods' settings brings {100 * gain:+.0f} points in the mean "
            f"({100 * low:+.0f} to {100 * high:+.0f}): after it methods keep {ranges[1]}."
        )
    alike = int((~last["worse"]).sum())
    return f"{text} {alike} methods, the best among them, cannot be told apart by these tasks."


def _headline(material: ComparisonContents) -> list[tuple[str, str]]:
    """Returns the page's first numbers, each with its description."""
    frame = material.compared("held_in")
    best, rows = frame.iloc[0], material.scores.rows
    multitask, base = (
        rows.loc[rows["method"] == name, "held_in"].iloc[0] for name in (MULTITASK, BASE)
    )
    alike = int((~frame["worse"]).sum())
    numbers = [
        (
            f"{best['value']:.2f}",
            f"of the experts' performance is what the best merge keeps "
            f"({style.method_name(best['method'])}); the base has {base:.2f}, the multitask model "
            f"{multitask:.2f}",
        ),
        (f"{alike} of {len(frame)}", "methods cannot be told apart from the best"),
    ]
    if len(material.settings) > 1:
        _, gain, low, high = _gain(material)
        described = f"is what a search brings in the mean ({low:+.2f} to {high:+.2f})"
        numbers += [(f"{gain:+.2f}", described), (f"{len(material.searches):,}", "settings tried")]
    return numbers
