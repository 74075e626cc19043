"""A study's report: tables, figures, and one HTML page that needs no network."""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import pandas as pd
from matplotlib.figure import Figure

import m2l
from m2l import files
from m2l.reporting import details, figures, paper, style, tables
from m2l.studies import aggregate, findings, records, scaling
from m2l.studies.findings import Finding

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
_HEADERS = {"before": "base model", "made_of": "made of", "drop_rate": "drop rate"}


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


def collect(out: Path) -> Material:
    """A finished study's material, from its folder or its published results.

    Raises:
        DataError: `out` holds no study, or one that is not finished.
        EvaluationError: results cannot be compared.
    """
    found = records.load(Path(out))
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


def write(out: Path, material: Material | None = None) -> Path:
    """Writes a study's report from its results.

    Args:
        out: The study's folder, or a published one (study.json and results.parquet). Gets
            report/tables, report/figures and report/index.html.
        material: What `collect` found in it, if it was asked before.

    Returns:
        The page.

    Raises:
        DataError: `out` holds no study, or one that is not finished.
        EvaluationError: results cannot be compared.
    """
    out = Path(out)
    material = material or collect(out)
    report = out / "report"
    for name, frame in frames(material).items():
        tables.write(frame, report / "tables", name)
    drawn = draw(material)
    for name, figure in drawn.items():
        figures.write(figure, report / "figures", name)
    known = ("study.json", "config.gin", "records.json", "results.parquet", "results")
    beside = [name for name in known if (out / name).exists()]
    path = report / "index.html"
    files.write(path, render(material, drawn, beside))
    return path


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


def render(material: Material, drawn: Mapping[str, Figure], beside: Sequence[str] = ()) -> str:
    """The page.

    Args:
        material: What it tells.
        drawn: Its figures, from `draw`.
        beside: The study's files to link to, by their names in the study's folder.

    Returns:
        An HTML document; it links to ../NAME for these, and to tables/ and figures/ beside it.
    """
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("m2l.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html.jinja")
    theirs = paper.merging_at_scale()
    ours_beside_theirs = {
        name: {
            "caption": f"{caption} Figure {number} of the paper.",
            "ours": _svg(drawn[name], name, caption),
            "paper": _svg(figure, f"paper_{name}", f"The paper's figure {number}. {caption}"),
        }
        for name, figure in of_paper(theirs).items()
        for number, caption in [CAPTIONS[name]]
        if name in drawn
    }
    grids = [
        {
            "number": number,
            "what": f"{column.replace('_', '-').capitalize()} performance, "
            f"{style.base_name(base).lower()} base",
            "file": f"table{number}_{column}_{base}",
            "ours": _table(tables.performance(material.performance, column, base)),
            "paper": _table(tables.performance(theirs, column, base)),
        }
        for number, (column, base) in tables.PAPER.items()
    ]
    sweeps = {
        name: _svg(figure, name, f"Scores of the hyper-parameters tried, {name}.")
        for name, figure in drawn.items()
        if name.startswith("sweeps_")
    }
    page = template.render(
        version=m2l.__version__,
        settings=material.settings,
        settings_text=json.dumps(material.settings, indent=1),
        headline=_headline(material),
        findings=[(finding, FINDINGS[finding.number]) for finding in material.findings],
        tests=list(dict.fromkeys(finding.test for finding in material.findings)),
        pairs=ours_beside_theirs,
        grids=grids,
        gains=_svg(drawn["experts"], "experts", "Each expert beside its base."),
        experts=_table(tables.experts(material.experts), digits=1),
        held_out=_table(tables.named(material.held_out), digits=1),
        sweeps=sweeps,
        chosen=_table(tables.chosen(material.choices)),
        lineage=_table(_lineage(material.lineage)),
        sizes=style.sizes(material.performance),
        beside=beside,
        hours=material.seconds / 3600,
    )
    return page + "\n"


def _headline(material: Material) -> list[tuple[str, str]]:
    """The page's first figures, each with what it is."""
    verdicts = [finding.verdict for finding in material.findings]
    found = [
        (
            f"{verdicts.count('supported')} of {len(verdicts)}",
            "of the paper's findings are supported here, "
            f"{verdicts.count('contradicted')} contradicted",
        )
    ]
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


def _lineage(lineage: pd.DataFrame) -> pd.DataFrame:
    """Every model in words."""

    def recipe(settings: Mapping[str, Any] | None) -> str:
        return ", ".join(
            f"{name} {value}"
            for name, value in (settings or {}).items()
            if name != "method" and value not in (None, [], ())
        )

    return lineage.assign(
        made_of=[_together(parents) for parents in lineage["made_of"]],
        recipe=[recipe(settings) for settings in lineage["recipe"]],
        digest=lineage["digest"].str[:16],
    )


def _together(names: Sequence[str]) -> str:
    """Names of models, those of one folder together: "bases/1M/instruct, experts/1M/a + b"."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, last = name.rpartition("/")
        folders.setdefault(folder, []).append(last)
    return ", ".join(f"{folder}/{' + '.join(last)}" for folder, last in folders.items())


def _svg(figure: Figure, name: str, label: str) -> markupsafe.Markup:
    """The figure as an svg element; ids carry the figure's name, for a page has many figures."""
    text = figures.svg(figure)
    element = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text[text.index("<svg") :])
    element = re.sub(r'(xlink:href="|url\()#([^")]+)', rf"\1#{name}-\2", element)
    width = round(figure.get_figwidth() * 96)
    head = f'<svg role="img" aria-label="{markupsafe.escape(label)}" style="--width: {width}px"'
    return markupsafe.Markup(element.replace("<svg", head, 1))


def _table(frame: pd.DataFrame, digits: int = 2) -> dict[str, Any]:
    """A frame as the template shows it: groups over the header, header, and rows of cells.

    A cell is (text, value to sort by, kind); numbers are sorted as numbers, a missing one is "".
    """
    groups: list[tuple[str, int]] = []
    if frame.columns.nlevels > 1:
        sizes = [size for size, _ in frame.columns]
        groups = [("", 1), *((size, sizes.count(size)) for size in dict.fromkeys(sizes))]
        header: Iterable[str] = ["method", *(str(count) for _, count in frame.columns)]
        frame = frame.reset_index()
        frame.columns = pd.RangeIndex(frame.shape[1])
    else:
        header = [_HEADERS.get(name, name.replace("_", "-")) for name in frame.columns]
    kinds = [_kind(frame[name]) for name in frame]
    rows = [
        [_cell(value, digits, kind) for value, kind in zip(row, kinds, strict=True)]
        for row in frame.itertuples(index=False)
    ]
    return {"groups": groups, "columns": list(zip(header, kinds, strict=True)), "rows": rows}


def _kind(column: pd.Series) -> str:
    """How a column is shown: "" for numbers, "text", or "long text", which may be broken."""
    if pd.api.types.is_numeric_dtype(column):
        return ""
    return "long text" if column.map(lambda value: len(str(value)) > 40).any() else "text"


def _cell(value: Any, digits: int, kind: str) -> tuple[str, str, str]:
    if kind:
        # A long name may be broken where it has a joint.
        shown = re.sub(r"([/+])", r"\1<wbr>", str(markupsafe.escape(value)))
        return markupsafe.Markup(shown), str(value), kind
    return tables.text(value, digits), "" if pd.isna(value) else f"{value:.12g}", kind
