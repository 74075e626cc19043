"""The report of paper 1's study: its figures 1 to 7, its tables 1 to 4, and their details."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import markupsafe
import pandas as pd
from matplotlib.figure import Figure

from m2l.reporting import blocks, figures, style, tables
from m2l.reporting.blocks import Drawing, Folded, Heading, Report, Section, Table, Text
from m2l.studies import findings, normalized_performance, study_results
from m2l.studies.findings import Finding
from m2l.studies.study_results import StudyResults
from m2l.typing import JsonObject
from m2l.version import __version__

# The figures that each of the paper's findings is derived from.
FINDINGS = {
    1: ("by_base",),
    2: ("by_size",),
    3: ("generalization_instruct", "generalization_pretrained"),
    4: ("more_experts",),
    5: ("methods_at_scale",),
}
# The number in the paper and the caption of each figure.
CAPTIONS = {
    "radar": (1, "Held-in performance by size, method and base."),
    "generalization_instruct": (2, "Held-out performance, instruction-tuned base."),
    "by_base": (3, "Held-in performance over model size; colour is the base, marker the method."),
    "by_size": (4, "Held-in performance by method; colour is the model size."),
    "generalization_pretrained": (5, "Held-out performance, pretrained base."),
    "more_experts": (6, "Performance over the number of experts merged; colour is the size."),
    "methods_at_scale": (7, "The methods side by side on the largest model."),
}
_FILES = ("performance", "cells")


@dataclasses.dataclass(frozen=True)
class ScalingContents:
    """The data of a report, in frames as `m2l.studies.normalized_performance` computes them.

    Attributes:
        settings: The study's settings, as JSON values.
        performance: Normalised performance, see `figures`.
        cells: The same by seed.
        experts: Scores of the experts on their own datasets, in percent.
        held_out: Scores of bases and multitask models on the held-out datasets, in percent.
        choices: The swept hyper-parameters with their scores; may be empty.
        lineage: The origin of every model, see `study_results.lineage`.
        findings: The paper's five findings by this study's results.
        seconds: The duration of all stages together.
    """

    settings: JsonObject
    performance: pd.DataFrame
    cells: pd.DataFrame
    experts: pd.DataFrame
    held_out: pd.DataFrame
    choices: pd.DataFrame
    lineage: pd.DataFrame
    findings: Sequence[Finding]
    seconds: float


def collect(results: StudyResults) -> ScalingContents:
    """Computes the data of a finished study's report.

    Raises:
        EvaluationError: Results cannot be compared.
    """
    grid = normalized_performance.grid(results)
    replicates = normalized_performance.Replicates(grid)
    parameters = {size: results.parameters(size) for size in results.study.models}
    return ScalingContents(
        settings=results.study.to_dict(),
        performance=normalized_performance.performance(replicates),
        cells=normalized_performance.cells(grid),
        experts=normalized_performance.experts(results),
        held_out=normalized_performance.held_out(results),
        choices=normalized_performance.choices(results),
        lineage=study_results.lineage(results),
        findings=findings.scaling_findings(replicates, parameters),
        seconds=sum(results.seconds.values()),
    )


def frames(material: ScalingContents) -> dict[str, pd.DataFrame]:
    """Returns the report's tables by file name."""
    frames = {
        "performance": material.performance,
        "cells": material.cells,
        "experts": tables.experts(material.experts),
        "held_out": tables.named(material.held_out),
        "choices": material.choices,
    }
    for number, (column, base) in tables.PAPER.items():
        if base not in style.bases(material.performance):
            continue
        table = tables.performance(material.performance, column, base)
        frames[f"table{number}_{column}_{base}"] = table
    return frames


def paper_figures(frame: pd.DataFrame) -> dict[str, Figure]:
    """Draws the paper's figures from a performance frame; returns them by name."""
    drawn = {
        "radar": figures.radar(frame),
        "by_base": figures.by_base(frame),
        "by_size": figures.by_size(frame),
        "more_experts": figures.more_experts(frame),
        "methods_at_scale": figures.methods_at_scale(frame),
    }
    for base in style.bases(frame):
        drawn[f"generalization_{base}"] = figures.generalization(frame, base)
    return drawn


def draw(material: ScalingContents) -> dict[str, Figure]:
    """Draws the report's figures; returns them by file name."""
    drawn = paper_figures(material.performance) | {"experts": figures.gains(material.experts)}
    swept = material.choices[material.choices["scale"].notna()]
    for base in style.bases(swept):
        drawn[f"sweeps_{base}"] = figures.sweeps(swept, base)
    return drawn


def report(material: ScalingContents) -> Report:
    """Returns the report of a study's data."""
    drawn = draw(material)
    pairs = _pairs(drawn)
    return Report(
        title="What matters for model merging at scale: a study",
        plain=_plain(material),
        lead=_lead(material),
        headline=_headline(material),
        claims="The paper's five findings",
        notes=[
            Text(
                "Performance is normalised: held-in, 1 is the score of the task's own expert; "
                "held-out, 1 is the score of the base model the experts came from. Means over a "
                "category's datasets, then over categories, then over draws of experts; shaded "
                "areas and bars are 95 % bands.",
                "note",
            )
        ],
        findings=[
            (finding, [pairs[name] for name in FINDINGS[finding.number] if name in pairs])
            for finding in material.findings
        ],
        sections=[
            Section("overview", "Everything at once, held-in", "Overview", [pairs["radar"]]),
            _grids(material),
            _experts(material, drawn["experts"]),
            _held_out(material),
            _choices(material, drawn),
            blocks.lineage(material.lineage),
        ],
        settings=material.settings,
        seconds=material.seconds,
        tables=frames(material),
        figures=drawn,
        summary=(
            "normalised performance, by number of experts merged",
            tables.summary(material.performance),
        ),
    )


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _lead(material: ScalingContents) -> str:
    settings, sizes = material.settings, style.sizes(material.performance)
    text = markupsafe.Markup(
        "{}, {}, {} merge methods, {} experts merged, {} held-in and {} held-out task "
        "categories, {} of experts; data: {}. After Yadav et al., <cite>What Matters for Model "
        "Merging at Scale?</cite> m2l {}."
    )
    return text.format(
        f"{_number(len(sizes), 'model size')} ({', '.join(sizes)} parameters)",
        _number(len(style.bases(material.performance)), "base").replace("2 bases", "two bases"),
        len(settings["recipes"]),
        ", ".join(map(str, settings["expert_counts"])),
        len(settings["categories"]),
        len(settings["held_out"]),
        _number(len(settings["seeds"]), "draw"),
        blocks.data_source(settings["source"]),
        __version__,
    )


def _plain(material: ScalingContents) -> str:
    """Returns the study in plain words: what was done, what came out, what it means."""
    settings, performance = material.settings, material.performance
    largest, most = style.sizes(performance)[-1], style.counts(performance)[-1]
    merged = performance[performance["method"] != style.MULTITASK]
    merged = merged[(merged["size"] == largest) & (merged["experts"] == most)]
    merges = int((material.cells["method"] != style.MULTITASK).sum())
    text = (
        f"Language models were trained to be experts, each on one of "
        f"{len(settings['categories'])} kinds of task, and then merged into one model, "
        f"{_number(merges, 'time')} in all. Every merge was asked the tasks that its experts were "
        "trained for, and tasks that none of them had seen."
    )
    if merged["held_in"].notna().any():
        text += (
            f" With {most} experts the best merge of the largest models keeps "
            f"{merged['held_in'].max():.0%} of what the experts themselves reach"
        )
        if merged["held_out"].notna().any():
            text += (
                f", and reaches {merged['held_out'].max():.0%} of the model that they came from on "
                "the unseen tasks"
            )
        text += "."
    return f"{text} {blocks.meaning(material.findings)}"


def _pairs(drawn: Mapping[str, Figure]) -> dict[str, Drawing]:
    """Returns the study's figures, each with the figure of the paper's own numbers."""
    return {
        name: Drawing(
            name,
            f"{caption} Figure {number} of the paper.",
            blocks.svg(drawn[name], name, caption),
            blocks.svg(figure, f"paper_{name}", f"The paper's figure {number}. {caption}"),
        )
        for name, figure in paper_figures(tables.paper_performance()).items()
        for number, caption in [CAPTIONS[name]]
        if name in drawn
    }


def _grids(material: ScalingContents) -> Section:
    paper = tables.paper_performance()
    content: list[blocks.Block] = [
        Text(
            "Normalised performance by method, model size and number of experts merged. A header "
            "sorts."
        )
    ]
    for number, (column, base) in tables.PAPER.items():
        if base not in style.bases(material.performance):
            continue
        title = (
            f"{column.replace('_', '-').capitalize()} performance, "
            f"{style.base_name(base).lower()} base"
        )
        cells, paper_cells = (
            blocks.cells(tables.performance(frame, column, base))
            for frame in (material.performance, paper)
        )
        name = f"The paper's table {number}"
        content += [
            Heading(f"Table {number}. {title}"),
            Table(title, cells, f"table{number}_{column}_{base}"),
            *(Text(line, "note") for line in _left_open(material.settings, column)),
            Folded(name, [Table(name, paper_cells)]),
        ]
    links = [markupsafe.Markup('<a href="tables/{0}.csv">{0}.csv</a>').format(n) for n in _FILES]
    content.append(
        Text(markupsafe.Markup("With bands, and by draw: {} {}").format(*links), "files")
    )
    return Section("tables", "The paper's tables 1 to 4", "Tables", content)


def _left_open(settings: JsonObject, column: str) -> list[str]:
    """Returns what decides a table's figures and the paper leaves open, a line for each thing."""
    limit = settings["max_prompts"]
    free = settings["generative_score"] == "likelihood"
    lines = [
        f"Scores are means over {f'at most {limit}' if limit else 'all'} prompts of a dataset, "
        f"{settings['max_examples']} examples of each, and ratios are of these means"
        f"{'; free text is scored by the likelihood of its references' * free}. The paper tells "
        "neither prompts nor numbers of examples."
    ]
    values = {
        style.method_name(method): math.prod(map(len, swept.values()))
        for method, swept in settings["swept"].items()
    }
    if values:
        counted = ", ".join(f"{count} for {name}" for name, count in values.items())
        lines.append(
            f"The paper does not say how its scales were set. Here they are chosen on held-in "
            f"examples of their own ({counted} values): that favours the methods with more to "
            "choose from over Average, which has nothing."
        )
    steps = {run: _steps(settings[run]) for run in ("expert", "multitask")}
    first = next(iter(_by_size(settings["expert"])))
    lines.append(
        f"An expert has {steps['expert']} steps, the multitask model {steps['multitask']}; the "
        "paper tells the experts' alone; "
        + (
            "both at most: the checkpoint of the lowest validation loss is taken."
            if first["validation"]
            else "none was stopped early, as some of the paper's were."
        )
    )
    if column == "held_out":
        lines.append("The base's score on a task is 1: where it is at chance, ratios say little.")
    return lines


def _by_size(training: JsonObject) -> list[JsonObject]:
    return [training] if "mixture" in training else list(training.values())


def _steps(training: JsonObject) -> str:
    counts = dict.fromkeys(settings["steps"] for settings in _by_size(training))
    return " or ".join(f"{count:,}" for count in counts)


def _experts(material: ScalingContents, figure: Figure) -> Section:
    free = (
        "the task's metric on greedy decoding"
        if material.settings["generative_score"] == "decoding"
        else "the geometric mean of a reference token's probability"
    )
    scores = blocks.cells(tables.experts(material.experts), digits=1)
    return Section(
        "experts",
        "The experts",
        "Experts",
        [
            Text(
                f"Scores in percent on the {material.settings['split']} split: accuracy by rank "
                f"classification where a task has answer choices, otherwise {free}. Means over "
                "each dataset's prompts."
            ),
            Drawing(
                "experts",
                "Before and after training each expert on its own category, largest model.",
                blocks.svg(figure, "experts", "Each expert beside its base."),
            ),
            Folded("Every expert's scores", [Table("Every expert's scores", scores, "experts")]),
        ],
    )


def _held_out(material: ScalingContents) -> Section:
    scores = blocks.cells(tables.named(material.held_out), digits=1)
    table = Table("Scores on the held-out datasets", scores, "held_out")
    note = Text(
        "Scores in percent. Ratios to a base that stands at chance say little: compare these "
        "figures with chance before reading the held-out panels."
    )
    title = "The held-out datasets themselves"
    content = [note, Folded("Scores by dataset", [table])]
    return Section("held-out", title, "Held-out datasets", content)


def _choices(material: ScalingContents, drawn: Mapping[str, Figure]) -> Section:
    chosen = blocks.cells(tables.chosen(material.choices))
    swept = {name: figure for name, figure in drawn.items() if name.startswith("sweeps_")}
    content: list[blocks.Block] = []
    if swept or chosen["rows"]:
        content.append(
            Text(
                "The paper does not give its scale, density and drop rate. Here they are chosen "
                "for each size, base, method and number of experts, on examples that nothing is "
                "evaluated on. A line is the best of the other setting at each scale, a star what "
                "was chosen."
            )
        )
        for name, figure in swept.items():
            base = style.base_name(name.removeprefix("sweeps_")).lower()
            caption = f"What each scale scored, {base} base."
            content.append(Drawing(name, caption, blocks.svg(figure, name, caption)))
        table = Table("The hyper-parameters chosen", chosen, "choices")
        content.append(Folded("What was chosen", [table], aside=True))
    else:
        content.append(
            Text(
                "The scale, density and drop rate of a merge are fixed values; the paper gives "
                "none. They are among the settings below."
            )
        )
    return Section("choices", "Hyper-parameters", "Hyper-parameters", content)


def _headline(material: ScalingContents) -> list[tuple[str, str]]:
    """Returns the page's first numbers, each with its description."""
    numbers = [blocks.verdicts(material.findings)]
    performance = material.performance
    largest, most = style.sizes(performance)[-1], style.counts(performance)[-1]
    merged = performance[performance["method"] != style.MULTITASK]
    merged = merged[(merged["size"] == largest) & (merged["experts"] == most)]
    for column, text in (
        ("held_in", "of its experts' performance is what the best merge of {} keeps"),
        ("held_out", "times its base's performance on unseen tasks: the best merge of {}"),
    ):
        if merged[column].notna().any():
            best = merged.loc[merged[column].idxmax()]
            model = f"{style.method_name(best['method'])}, {style.base_name(best['base']).lower()}"
            description = f"{text.format(most)} at {largest} ({model})"
            numbers.append((f"{best[column]:.2f}", description))
    merges = int((material.cells["method"] != style.MULTITASK).sum())
    numbers.append((f"{merges:,}", "merging experiments"))
    results = int(material.lineage["results"].sum())
    numbers.append((f"{results:,}", "results (model and task)"))
    return numbers
