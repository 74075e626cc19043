"""The report of paper 1's study: its figures 1 to 7 and tables 1 to 4, and what lies under them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import markupsafe
import pandas as pd
from matplotlib.figure import Figure

from m2l.reporting import blocks, details, figures, paper, style, tables
from m2l.reporting.blocks import Drawing, Folded, Heading, Report, Section, Table, Text
from m2l.studies import aggregate, findings, scaling
from m2l.studies.findings import Finding
from m2l.studies.records import Records
from m2l.version import __version__

# What each of the paper's findings is read from.
FINDINGS = {
    1: ("by_base",),
    2: ("by_size",),
    3: ("generalization_instruct", "generalization_pretrained"),
    4: ("more_experts",),
    5: ("methods_at_scale",),
}
# By figure: its number in the paper, and what it shows.
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
class Material:
    """What a report is made from; `m2l.studies.aggregate` says what the frames hold.

    Attributes:
        settings: The study's settings, as JSON values.
        performance: Normalised performance, see `figures`.
        cells: The same by seed.
        experts: Scores of the experts on their own datasets, in percent.
        held_out: Scores of bases and multitask models on the held-out datasets, in percent.
        choices: The hyper-parameters that were tried, with their scores; none, if none were.
        lineage: Every model with results: what it is made of and how, its digest, their number.
        findings: What the study says of the paper's five findings.
        seconds: How long all of the study's stages took together.
    """

    settings: Mapping[str, Any]
    performance: pd.DataFrame
    cells: pd.DataFrame
    experts: pd.DataFrame
    held_out: pd.DataFrame
    choices: pd.DataFrame
    lineage: pd.DataFrame
    findings: Sequence[Finding]
    seconds: float


def collect(found: Records) -> Material:
    """A finished study's material.

    Raises:
        EvaluationError: results cannot be compared.
    """
    grid = aggregate.grid(found)
    replicates = aggregate.Replicates(grid)
    parameters = {size: found.parameters(size) for size in found.study.models}
    return Material(
        settings=scaling.to_dict(found.study),
        performance=aggregate.performance(replicates),
        cells=aggregate.cells(grid),
        experts=aggregate.experts(found),
        held_out=aggregate.held_out(found),
        choices=aggregate.choices(found),
        lineage=aggregate.lineage(found),
        findings=findings.findings(replicates, parameters),
        seconds=sum(found.seconds.values()),
    )


def frames(material: Material) -> dict[str, pd.DataFrame]:
    """The report's tables by file name."""
    found = {
        "performance": material.performance,
        "cells": material.cells,
        "experts": tables.experts(material.experts),
        "held_out": tables.named(material.held_out),
        "choices": material.choices,
    }
    for number, (column, base) in tables.PAPER.items():
        table = tables.performance(material.performance, column, base)
        found[f"table{number}_{column}_{base}"] = table
    return found


def of_paper(frame: pd.DataFrame) -> dict[str, Figure]:
    """The paper's figures by name, drawn from a performance frame."""
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


def draw(material: Material) -> dict[str, Figure]:
    """The report's figures by file name."""
    drawn = of_paper(material.performance) | {"experts": details.gains(material.experts)}
    swept = material.choices[material.choices["scale"].notna()]
    for base in style.bases(swept):
        drawn[f"sweeps_{base}"] = details.sweeps(swept, base)
    return drawn


def report(material: Material) -> Report:
    """The report.

    Args:
        material: What it tells.
    """
    drawn = draw(material)
    pairs = _pairs(drawn)
    return Report(
        title="What matters for model merging at scale: a study",
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


def _number(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _lead(material: Material) -> str:
    settings, sizes = material.settings, style.sizes(material.performance)
    said = markupsafe.Markup(
        "{}, two bases, {} merge methods, {} experts merged, {} held-in and {} held-out task "
        "categories, {} of experts; data: {}. After Yadav et al., <cite>What Matters for Model "
        "Merging at Scale?</cite> m2l {}."
    )
    return said.format(
        f"{_number(len(sizes), 'model size')} ({', '.join(sizes)} parameters)",
        len(settings["recipes"]),
        ", ".join(map(str, settings["expert_counts"])),
        len(settings["categories"]),
        len(settings["held_out"]),
        _number(len(settings["seeds"]), "draw"),
        settings["source"],
        __version__,
    )


def _pairs(drawn: Mapping[str, Figure]) -> dict[str, Drawing]:
    """The paper's figures, ours beside the paper's own."""
    return {
        name: Drawing(
            name,
            f"{caption} Figure {number} of the paper.",
            blocks.svg(drawn[name], name, caption),
            blocks.svg(figure, f"paper_{name}", f"The paper's figure {number}. {caption}"),
        )
        for name, figure in of_paper(paper.merging_at_scale()).items()
        for number, caption in [CAPTIONS[name]]
        if name in drawn
    }


def _grids(material: Material) -> Section:
    theirs = paper.merging_at_scale()
    shown: list[blocks.Block] = [
        Text(
            "Normalised performance by method, model size and number of experts merged. A header "
            "sorts."
        )
    ]
    for number, (column, base) in tables.PAPER.items():
        what = (
            f"{column.replace('_', '-').capitalize()} performance, "
            f"{style.base_name(base).lower()} base"
        )
        ours = blocks.cells(tables.performance(material.performance, column, base))
        papers = blocks.cells(tables.performance(theirs, column, base))
        name = f"The paper's table {number}"
        shown += [
            Heading(f"Table {number}. {what}"),
            Table(what, ours, f"table{number}_{column}_{base}"),
            Folded(name, [Table(name, papers)]),
        ]
    links = [markupsafe.Markup('<a href="tables/{0}.csv">{0}.csv</a>').format(n) for n in _FILES]
    shown.append(Text(markupsafe.Markup("With bands, and by draw: {} {}").format(*links), "files"))
    return Section("tables", "The paper's tables 1 to 4", "Tables", shown)


def _experts(material: Material, figure: Figure) -> Section:
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


def _held_out(material: Material) -> Section:
    scores = blocks.cells(tables.named(material.held_out), digits=1)
    table = Table("Scores on the held-out datasets", scores, "held_out")
    said = Text(
        "Scores in percent. Ratios to a base that stands at chance say little: compare these "
        "figures with chance before reading the held-out panels."
    )
    title = "The held-out datasets themselves"
    shown = [said, Folded("Scores by dataset", [table])]
    return Section("held-out", title, "Held-out datasets", shown)


def _choices(material: Material, drawn: Mapping[str, Figure]) -> Section:
    chosen = blocks.cells(tables.chosen(material.choices))
    swept = {name: figure for name, figure in drawn.items() if name.startswith("sweeps_")}
    shown: list[blocks.Block] = []
    if swept or chosen["rows"]:
        shown.append(
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
            shown.append(Drawing(name, caption, blocks.svg(figure, name, caption)))
        table = Table("The hyper-parameters chosen", chosen, "choices")
        shown.append(Folded("What was chosen", [table], aside=True))
    else:
        shown.append(
            Text(
                "The scale, density and drop rate of a merge are fixed values; the paper gives "
                "none. They are among the settings below."
            )
        )
    return Section("choices", "Hyper-parameters", "Hyper-parameters", shown)


def _headline(material: Material) -> list[tuple[str, str]]:
    """The page's first figures, each with what it is."""
    found = [blocks.verdicts(material.findings)]
    performance = material.performance
    largest, most = style.sizes(performance)[-1], style.counts(performance)[-1]
    merged = performance[performance["method"] != style.MULTITASK]
    merged = merged[(merged["size"] == largest) & (merged["experts"] == most)]
    for column, what in (
        ("held_in", "of its experts' performance is what the best merge of {} keeps"),
        ("held_out", "times its base's performance on unseen tasks: the best merge of {}"),
    ):
        if merged[column].notna().any():
            best = merged.loc[merged[column].idxmax()]
            how = f"({style.method_name(best['method'])}, {style.base_name(best['base']).lower()})"
            found.append((f"{best[column]:.2f}", f"{what.format(most)} at {largest} {how}"))
    merges = int((material.cells["method"] != style.MULTITASK).sum())
    found.append((f"{merges:,}", "merging experiments"))
    results = int(material.lineage["results"].sum())
    found.append((f"{results:,}", "results (model and task)"))
    return found
