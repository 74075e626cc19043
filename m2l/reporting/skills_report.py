"""The report of paper 2's study: three ways to add a skill to a general model."""

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import markupsafe
import pandas as pd
from matplotlib.figure import Figure

from m2l import models
from m2l.reporting import blocks, skill_figures, skill_tables, style
from m2l.reporting.blocks import Drawing, Folded, Heading, Report, Section, Table, Text
from m2l.reporting.skill_figures import MERGED
from m2l.studies import aggregate, skill_findings, skill_results, skills
from m2l.studies.findings import Finding
from m2l.studies.records import Records
from m2l.studies.skill_findings import REFUSALS, SAFETY
from m2l.studies.skills import GENERAL, SkillsStudy
from m2l.version import __version__

# What each of the paper's findings is read from: figures, then tables.
FINDINGS = {
    1: ("tradeoff",),
    2: ("data_curves",),
    3: ("cost", "papers_steps"),
    4: ("refusals",),
    5: ("weights",),
    6: ("several",),
}
TABLES = ("models", "by_regime", "several", "weights", "papers_steps", "compared")
CAPTIONS = {
    "tradeoff": "General score against the skill's, along w: the best is at the upper right. Lines "
    "begin at the general model where w is 0, those of linear and WiSE-FT end at the model that is "
    "mixed in; stars are at the weight that needs no tuning. Bars: one standard error.",
    "data_curves": "Scores over the amount of the skill's data; the dashed line is the general "
    "model. Bars: one standard error.",
    "cost": "What is gained over what it costs, from the least part of the data to all of it; and "
    "the paper's own measure of cost. The dashed line is the general model.",
    "refusals": "Unsafe requests that are refused against safe look-alikes that are answered, "
    "along w: the best is at the upper right.",
    "papers_steps": "The paper's measure of cost: steps of one epoch, over all parts of the data",
    "weights": "The weight without tuning, and the best of those tried, by the mean of general and "
    "skill score",
    "several": "Several skills at once: scores in percent",
}


@dataclasses.dataclass(frozen=True)
class Material:
    """What a report is made from; `m2l.studies.skill_results` says what the frames hold.

    Attributes:
        study: The study's settings.
        models: Every model with its scores and costs.
        papers_steps: Costs in the paper's own measure.
        lineage: Every model with results: what it is made of and how, its digest, their number.
        findings: What the study says of the paper's findings.
        seconds: How long all of the study's stages took together.
    """

    study: SkillsStudy
    models: pd.DataFrame
    papers_steps: pd.DataFrame
    lineage: pd.DataFrame
    findings: Sequence[Finding]
    seconds: float


def collect(found: Records) -> Material:
    """A finished study's material."""
    frame = skill_results.models(found)
    return Material(
        study=found.study,
        models=frame,
        papers_steps=skill_results.papers_steps(found.study),
        lineage=aggregate.lineage(found),
        findings=skill_findings.findings(found.study, frame),
        seconds=sum(found.seconds.values()),
    )


def frames(material: Material) -> dict[str, pd.DataFrame]:
    """The report's tables by file name, of TABLES."""
    study, frame = material.study, material.models
    return {
        "models": frame,
        "by_regime": skill_tables.by_regime(study, frame),
        "several": skill_tables.several(study, frame),
        "weights": skill_tables.weights(frame),
        "compared": skill_tables.compared(study, frame),
        "papers_steps": skill_tables.papers_steps(material.papers_steps),
    }


def draw(material: Material) -> dict[str, Figure]:
    """The report's figures by file name."""
    frame = material.models
    drawn = {
        "tradeoff": skill_figures.tradeoff(frame),
        "data_curves": skill_figures.data_curves(frame),
        "cost": skill_figures.cost(frame, material.papers_steps),
    }
    if SAFETY in material.study.skills and REFUSALS in material.study.evaluations:
        drawn["refusals"] = skill_figures.refusals(frame)
    return drawn


def report(material: Material) -> Report:
    """The report.

    Args:
        material: What it tells.
    """
    study = material.study
    made, drawn = frames(material), draw(material)
    shown: dict[str, list[blocks.Block]] = {
        name: [Drawing(name, CAPTIONS[name], blocks.svg(figure, name, CAPTIONS[name]))]
        for name, figure in drawn.items()
    }
    for name, digits in (("papers_steps", 0), ("weights", 2), ("several", 1)):
        table = Table(CAPTIONS[name], blocks.cells(made[name], digits), name)
        shown[name] = [Text(f"{CAPTIONS[name]}.", "note"), table]
    shown["weights"] = [Folded("Every method's weights", shown["weights"])]
    return Report(
        title="Skills added to a general model: a study",
        lead=_lead(study),
        headline=_headline(material),
        claims="What the paper says, and what this study finds",
        notes=[Text(_how_scored(study), "note")],
        findings=[
            (finding, [b for name in FINDINGS[finding.number] for b in shown.get(name, ())])
            for finding in material.findings
        ],
        sections=[
            _ahead(material, made),
            _scores(material),
            blocks.lineage(material.lineage),
        ],
        settings=skills.to_dict(study),
        seconds=material.seconds,
        tables=made,
        figures=drawn,
        summary=("scores in percent, and cost beyond the general model", made["by_regime"]),
    )


def _lead(study: SkillsStudy) -> markupsafe.Markup:
    methods = ", ".join(map(style.method_name, study.methods))
    skills_named = ", ".join(study.skills)
    said = markupsafe.Markup(
        "{} added to a general model of {:,} parameters: by continued fine-tuning, by retraining "
        "on all data, and by training them apart and merging ({}); data: {}. After Morrison et "
        "al., <cite>Merge to Learn</cite>. m2l {}."
    )
    count = models.parameters(study.model)
    named = f"{len(study.skills)} skill{'' if len(study.skills) == 1 else 's'} ({skills_named})"
    return said.format(named, count, methods, study.source, __version__)


def _how_scored(study: SkillsStudy) -> str:
    free = (
        "by the task's metric on greedy decoding"
        if study.generative_score == "decoding"
        else "by the geometric mean of a reference token's probability"
    )
    said = (
        f"Scores in percent on the {study.split} split, answers in free text {free}: means over "
        "datasets of the means over their prompts. Unless it says otherwise, a merge is the "
        "general model plus w times the skill's task vector, by the weight that needs no tuning, "
        "w = |D| / |G|."
    )
    if REFUSALS in study.evaluations:
        said += " Compliance is with safe look-alikes: 100 is no exaggerated refusal."
    return said


def _headline(material: Material) -> list[tuple[str, str]]:
    """The page's first figures, each with what it is."""
    frame, skill_names = material.models, list(material.study.skills)
    found = [blocks.verdicts(material.findings)]

    def of(way: str, column: str) -> float:
        return fmean(
            skill_figures.regime(skill_figures.of_skill(frame, skill), way)[column or skill].iloc[0]
            for skill in skill_names
        )

    before = frame[frame["regime"] == GENERAL].iloc[0]
    scores = {way: f"{of(way, GENERAL):.1f}" for way in ("cft", "rt", MERGED)}
    found.append(
        (
            scores[MERGED],
            f"is the general score after a merge, {before[GENERAL]:.1f} before; {scores['cft']} "
            f"after continued fine-tuning, {scores['rt']} retrained",
        )
    )
    scores = {way: f"{of(way, ''):.1f}" for way in ("cft", "rt", MERGED)}
    without = fmean(before[skill] for skill in skill_names)
    found.append(
        (
            scores[MERGED],
            f"is the skill score after a merge, {without:.1f} before; {scores['cft']} after "
            f"continued fine-tuning, {scores['rt']} retrained",
        )
    )
    share = 100 * of(MERGED, "flops") / of("rt", "flops")
    found.append((f"{share:.0f} %", "of the arithmetic of retraining is what a merge takes"))
    merges = int((frame["regime"] == MERGED).sum())
    results = int(material.lineage["results"].sum())
    found.append((f"{merges:,}", f"merges, with {results:,} results (model and task)"))
    return found


def _ahead(material: Material, made: Mapping[str, pd.DataFrame]) -> Section:
    said: list[Any] = [
        Text(
            "Merges by task arithmetic, without tuning. One way is ahead if it is so by more than "
            "1.96 standard errors of its difference to the next.",
            "note",
        )
    ]
    said += map(Text, skill_tables.ahead(material.study, material.models))
    said.append(Table("The ways compared", blocks.cells(made["compared"], 1), "compared"))
    said.append(Heading("Each way's scores"))
    said.append(Table("Each way's scores", blocks.cells(made["by_regime"], 1), "by_regime"))
    return Section("ahead", "Which way is ahead where", "Which way is ahead", said)


def _scores(material: Material) -> Section:
    everything = skill_tables.every_model(material.study, material.models)
    table = Table("Every model's scores", blocks.cells(everything, 1), "models")
    said = f"{len(everything)} models: scores in percent, their standard errors, and costs"
    return Section("scores", "Every score", "Scores", [Folded(said, [table], aside=True)])
