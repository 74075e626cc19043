"""The report of paper 2's study: three ways to add a skill to a general model."""

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import fmean

import markupsafe
import pandas as pd
from matplotlib.figure import Figure

from m2l import models
from m2l.reporting import blocks, merge_to_learn_figures, merge_to_learn_tables, style
from m2l.reporting.blocks import Drawing, Folded, Heading, Report, Section, Table, Text
from m2l.reporting.merge_to_learn_figures import MERGED
from m2l.studies import skill_scores, study_results
from m2l.studies.findings import REFUSALS, SAFETY, Finding, skills_findings
from m2l.studies.merge_to_learn import GENERAL, SkillsStudy
from m2l.studies.study_results import StudyResults
from m2l.version import __version__

# The figures and tables that each of the paper's findings is derived from.
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
class SkillsContents:
    """The data of a report, in frames as `m2l.studies.skill_scores` computes them.

    Attributes:
        study: The study's settings.
        models: Every model with its scores and costs.
        papers_steps: Costs in the paper's measure.
        lineage: The origin of every model, see `study_results.lineage`.
        findings: The paper's findings by this study's results.
        seconds: The duration of all stages together.
    """

    study: SkillsStudy
    models: pd.DataFrame
    papers_steps: pd.DataFrame
    lineage: pd.DataFrame
    findings: Sequence[Finding]
    seconds: float


def collect(results: StudyResults) -> SkillsContents:
    """Computes the data of a finished study's report."""
    frame = skill_scores.models(results)
    return SkillsContents(
        study=results.study,
        models=frame,
        papers_steps=skill_scores.papers_steps(results.study),
        lineage=study_results.lineage(results),
        findings=skills_findings(results.study, frame),
        seconds=sum(results.seconds.values()),
    )


def frames(material: SkillsContents) -> dict[str, pd.DataFrame]:
    """Returns the report's tables by file name, of TABLES."""
    study, frame = material.study, material.models
    return {
        "models": frame.drop(columns="deviations", errors="ignore"),
        "by_regime": merge_to_learn_tables.by_regime(study, frame),
        "several": merge_to_learn_tables.several(study, frame),
        "weights": merge_to_learn_tables.weights(frame),
        "compared": merge_to_learn_tables.compared(study, frame),
        "papers_steps": merge_to_learn_tables.papers_steps(material.papers_steps),
    }


def draw(material: SkillsContents) -> dict[str, Figure]:
    """Draws the report's figures; returns them by file name."""
    frame = material.models
    drawn = {
        "tradeoff": merge_to_learn_figures.tradeoff(frame),
        "data_curves": merge_to_learn_figures.data_curves(frame),
        "cost": merge_to_learn_figures.cost(frame, material.papers_steps),
    }
    if SAFETY in material.study.skills and REFUSALS in material.study.evaluations:
        drawn["refusals"] = merge_to_learn_figures.refusals(frame)
    return drawn


def report(material: SkillsContents) -> Report:
    """Returns the report of a study's data."""
    study = material.study
    tables, drawn = frames(material), draw(material)
    shown: dict[str, list[blocks.Block]] = {
        name: [Drawing(name, CAPTIONS[name], blocks.svg(figure, name, CAPTIONS[name]))]
        for name, figure in drawn.items()
    }
    for name, digits in (("papers_steps", 0), ("weights", 2), ("several", 1)):
        table = Table(CAPTIONS[name], blocks.cells(tables[name], digits), name)
        shown[name] = [Text(f"{CAPTIONS[name]}.", "note"), table]
    shown["weights"] = [Folded("Every method's weights", shown["weights"])]
    return Report(
        title="Skills added to a general model: a study",
        plain=_plain(material),
        lead=_lead(study),
        headline=_headline(material),
        claims="What the paper says, and what this study finds",
        notes=[Text(_how_scored(study), "note")],
        findings=[
            (finding, [b for name in FINDINGS[finding.number] for b in shown.get(name, ())])
            for finding in material.findings
        ],
        sections=[
            _ahead(material, tables),
            _scores(material),
            blocks.lineage(material.lineage),
        ],
        settings=study.to_dict(),
        seconds=material.seconds,
        tables=tables,
        figures=drawn,
        summary=("scores in percent, and cost beyond the general model", tables["by_regime"]),
    )


def _lead(study: SkillsStudy) -> markupsafe.Markup:
    methods = ", ".join(map(style.method_name, study.methods))
    skills_named = ", ".join(study.skills)
    text = markupsafe.Markup(
        "{} added to a general model of {:,} parameters: by continued fine-tuning, by retraining "
        "on all data, and by training them apart and merging ({}); data: {}. After Morrison et "
        "al., <cite>Merge to Learn</cite>. m2l {}."
    )
    count = models.parameters(study.model)
    named = f"{len(study.skills)} skill{'' if len(study.skills) == 1 else 's'} ({skills_named})"
    return text.format(named, count, methods, blocks.data_source(study.source), __version__)


def _plain(material: SkillsContents) -> str:
    """Returns the study in plain words: what was done, what came out, what it means."""
    before = material.models[material.models["regime"] == GENERAL].iloc[0]
    scores = {
        column: {way: _average(material, way, column) for way in ("cft", MERGED)}
        for column in (GENERAL, "")
    }
    without = fmean(before[skill] for skill in material.study.skills)
    return (
        "A general model was taught a new skill in three ways: by training it further, by "
        "training anew on all data, and by training the skill apart and merging it in. A merge "
        f"brings the skill from {without:.0f} to {scores[''][MERGED]:.0f} percent and the general "
        f"score from {before[GENERAL]:.0f} to {scores[GENERAL][MERGED]:.0f}; further training "
        f"brings them to {scores['']['cft']:.0f} and {scores[GENERAL]['cft']:.0f}. "
        f"{blocks.meaning(material.findings)}"
    )


def _average(material: SkillsContents, way: str, column: str) -> float:
    """Returns the mean over skills of a column, or of the skill's own score, of a way's models."""
    return fmean(
        merge_to_learn_figures.regime(
            merge_to_learn_figures.skill_models(material.models, skill), way
        )[column or skill].iloc[0]
        for skill in material.study.skills
    )


def _how_scored(study: SkillsStudy) -> str:
    free = (
        "by the task's metric on greedy decoding"
        if study.generative_score == "decoding"
        else "by the geometric mean of a reference token's probability"
    )
    text = (
        f"Scores in percent on the {study.split} split, answers in free text {free}: means over "
        "datasets of the means over their prompts. Unless it says otherwise, a merge is the "
        "general model plus w times the skill's task vector, by the weight that needs no tuning, "
        "w = |D| / |G|."
    )
    if REFUSALS in study.evaluations:
        text += " Compliance is with safe look-alikes: 100 is no exaggerated refusal."
    return text


def _headline(material: SkillsContents) -> list[tuple[str, str]]:
    """Returns the page's first numbers, each with its description."""
    frame, skill_names = material.models, list(material.study.skills)
    numbers = [blocks.verdicts(material.findings)]
    before = frame[frame["regime"] == GENERAL].iloc[0]
    scores = {way: f"{_average(material, way, GENERAL):.1f}" for way in ("cft", "rt", MERGED)}
    numbers.append(
        (
            scores[MERGED],
            f"is the general score after a merge, {before[GENERAL]:.1f} before; {scores['cft']} "
            f"after continued fine-tuning, {scores['rt']} retrained",
        )
    )
    scores = {way: f"{_average(material, way, ''):.1f}" for way in ("cft", "rt", MERGED)}
    without = fmean(before[skill] for skill in skill_names)
    numbers.append(
        (
            scores[MERGED],
            f"is the skill score after a merge, {without:.1f} before; {scores['cft']} after "
            f"continued fine-tuning, {scores['rt']} retrained",
        )
    )
    share = 100 * _average(material, MERGED, "flops") / _average(material, "rt", "flops")
    numbers.append((f"{share:.0f} %", "of the arithmetic of retraining is what a merge takes"))
    merges = int((frame["regime"] == MERGED).sum())
    results = int(material.lineage["results"].sum())
    numbers.append((f"{merges:,}", f"merges, with {results:,} results (model and task)"))
    return numbers


def _ahead(material: SkillsContents, tables: Mapping[str, pd.DataFrame]) -> Section:
    content: list[blocks.Block] = [
        Text(
            "Merges by task arithmetic, without tuning. One way is ahead if it is so by more than "
            "1.96 standard errors of its difference to the next.",
            "note",
        )
    ]
    if {"ties_mergekit", "dare"} & set(material.study.methods):
        content.append(
            Text(
                "TIES (mergekit) is the paper's, which trims tensor by tensor; TIES trims the "
                "model as a whole. Which DARE it used the paper does not say: here signs are not "
                "elected. Answers are decoded greedily, where the paper draws ten programs.",
                "note",
            )
        )
    content += map(Text, merge_to_learn_tables.ahead(material.study, material.models))
    content.append(Table("The ways compared", blocks.cells(tables["compared"], 1), "compared"))
    content.append(Heading("Each way's scores"))
    content.append(Table("Each way's scores", blocks.cells(tables["by_regime"], 1), "by_regime"))
    return Section("ahead", "Which way is ahead where", "Which way is ahead", content)


def _scores(material: SkillsContents) -> Section:
    everything = merge_to_learn_tables.every_model(material.study, material.models)
    table = Table("Every model's scores", blocks.cells(everything, 1), "models")
    summary = f"{len(everything)} models: scores in percent, their standard errors, and costs"
    return Section("scores", "Every score", "Scores", [Folded(summary, [table], aside=True)])
