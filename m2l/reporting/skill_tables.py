"""Paper 2's tables, and what they say of where each way to add a skill is ahead."""

import math
from collections.abc import Iterator

import pandas as pd

from m2l.reporting import style
from m2l.reporting.skill_figures import (
    MERGED,
    REGIMES,
    of_skill,
    regime,
    skills_of,
)
from m2l.studies.skill_findings import REFUSALS, SAFETY
from m2l.studies.skill_results import Score, mean
from m2l.studies.skills import ALL, GENERAL, SkillsStudy

# The three ways that the paper compares.
_PRINTED = {REFUSALS: "compliance"}
WAYS = {"cft": "continued fine-tuning", "rt": "retraining", MERGED: "merging"}


def by_regime(study: SkillsStudy, frame: pd.DataFrame) -> pd.DataFrame:
    """Each skill by each regime.

    Args:
        study: The study's settings.
        frame: Of `skill_results.models`.

    Returns:
        Rows with skill, model (in print), each evaluation in percent, and GFLOPs beyond the general
        model; the merge is by task arithmetic and the heuristic's weight.
    """
    rows = [_scores(study, frame[frame["regime"] == GENERAL].iloc[0], "", REGIMES[GENERAL])]
    for skill in skills_of(frame):
        for name in ("ptm", "cft", "rt", MERGED):
            (_, model), *_ = regime(of_skill(frame, skill), name).iterrows()
            rows.append(_scores(study, model, skill, REGIMES[name]))
    return pd.DataFrame(rows)


def several(study: SkillsStudy, frame: pd.DataFrame) -> pd.DataFrame:
    """The paper's table of several skills at once.

    Args:
        study: The study's settings.
        frame: Of `skill_results.models`.

    Returns:
        Rows with skill (which ones), model, each evaluation in percent, and GFLOPs beyond the
        general model: the general model, all skills by continued fine-tuning and by retraining,
        merges of pairs, and of all by each method that adds.
    """
    rows = [_scores(study, frame[frame["regime"] == GENERAL].iloc[0], "", REGIMES[GENERAL])]
    for name in ("cft", "rt"):
        for _, model in regime(frame[frame["skills"] == ALL], name).iterrows():
            rows.append(_scores(study, model, ALL, REGIMES[name]))
    together = frame[(frame["regime"] == MERGED) & frame["skills"].str.contains("+", regex=False)]
    for _, model in together.iterrows():
        count = model["skills"].count("+") + 1
        which = ALL if count == len(study.skills) else model["skills"].replace("+", ", ")
        rows.append(_scores(study, model, which, style.method_name(model["method"])))
    return pd.DataFrame(rows)


def _scores(study: SkillsStudy, model: pd.Series, skill: str, name: str) -> dict[str, object]:
    scores = {_PRINTED.get(column, column): model[column] for column in study.evaluations}
    return {"model": name, "skill": skill} | scores | {"GFLOPs": model["flops"] / 1e9}


def weights(frame: pd.DataFrame) -> pd.DataFrame:
    """What the heuristic's weight gives, beside the best of those tried.

    Args:
        frame: Of `skill_results.models`.

    Returns:
        Rows with skill, method, w and score of the heuristic's weight, best_w and best_score; a
        score is the mean of general and skill score, and the best was chosen by it.
    """
    rows = []
    for skill in skills_of(frame):
        merged = of_skill(frame, skill)
        merged = merged[merged["regime"] == MERGED]
        for method in style.methods(merged):
            tried = merged[merged["method"] == method]
            both = (tried[GENERAL] + tried[skill]) / 2
            best, zero = both.idxmax(), tried.index[tried["heuristic"]][0]
            rows.append(
                {
                    "skill": skill,
                    "method": style.method_name(method),
                    "w": tried.loc[zero, "weight"],
                    "score": both[zero],
                    "best_w": tried.loc[best, "weight"],
                    "best_score": both[best],
                }
            )
    return pd.DataFrame(rows)


def every_model(study: SkillsStudy, frame: pd.DataFrame) -> pd.DataFrame:
    """All models in print: what they are, their scores with standard errors, their costs."""
    columns = ["model", "regime", "skills", "part", "weight"]
    for name in study.evaluations:
        columns += [name, f"{name}_error"]
    printed = {"weight": "w", f"{REFUSALS}_error": "compliance_error", **_PRINTED}
    found = frame[columns].rename(columns=printed)
    return found.assign(steps=frame["steps"], GFLOPs=frame["flops"] / 1e9)


def papers_steps(papers: pd.DataFrame) -> pd.DataFrame:
    """`skill_results.papers_steps` in print."""
    return papers.rename(columns=WAYS | {"ptm": WAYS[MERGED]})


# --- which way is ahead where ---


def ahead(study: SkillsStudy, frame: pd.DataFrame) -> list[str]:
    """Sentences on which of continued fine-tuning, retraining and merging is ahead in what.

    One is ahead if it is so by more than 1.96 standard errors of the difference to the next, as if
    both were scored on examples of their own.

    Args:
        study: The study's settings.
        frame: Of `skill_results.models`.

    Returns:
        A sentence or two for each skill, for how often each is ahead, for little data, and for
        costs.
    """
    said, wins = [], dict.fromkeys(WAYS, 0)
    for skill in skills_of(frame):
        told = []
        for what, names in _compared(study, frame, skill):
            scores = {way: _mean(frame, skill, way, names) for way in WAYS}
            winner, sentence = _judged(scores)
            told.append(f"{what}: {sentence}")
            if winner:
                wins[winner] += 1
        said.append(f"{skill.capitalize()}. {'; '.join(told)}.")
    counted = ", ".join(f"{WAYS[way]} in {count}" for way, count in wins.items())
    compared = sum(1 for skill in skills_of(frame) for _ in _compared(study, frame, skill))
    said.append(f"Of these {compared} comparisons a way is clearly ahead: {counted}.")
    said += [*_with_little_data(study, frame), _costs(frame)]
    return said


def _compared(
    study: SkillsStudy, frame: pd.DataFrame, skill: str
) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "general score", (GENERAL,)
    yield "skill score", (skill,)
    yield "mean of both", (GENERAL, skill)
    if skill == SAFETY and REFUSALS in study.evaluations:
        yield "safe look-alikes answered", (REFUSALS,)


def _mean(
    frame: pd.DataFrame, skill: str, way: str, names: tuple[str, ...], part: int = 100
) -> Score:
    model = regime(of_skill(frame, skill, part), way).iloc[0]
    return mean([Score(float(model[name]), float(model[f"{name}_error"])) for name in names])


def _judged(scores: dict[str, Score]) -> tuple[str, str]:
    """The way that is clearly ahead, or "", and what is to be said."""
    first, second, *_ = sorted(scores, key=lambda way: -scores[way].value)
    listed = ", ".join(f"{WAYS[way]} {score.value:.1f}" for way, score in scores.items())
    gap = scores[first] - scores[second]
    if math.isnan(gap.error) or gap.value <= 1.96 * gap.error:
        return "", f"{WAYS[first]} and {WAYS[second]} are too close to call ({listed})"
    return first, f"{WAYS[first]} is ahead by {gap.value:.1f} points ({listed})"


def _with_little_data(study: SkillsStudy, frame: pd.DataFrame) -> Iterator[str]:
    if not study.retrained_parts:
        return
    part, told = min(study.retrained_parts), []
    for skill in skills_of(frame):
        scores = {way: _mean(frame, skill, way, (GENERAL, skill), part) for way in WAYS}
        told.append(f"{skill}: {_judged(scores)[1]}")
    yield f"With {part} % of a skill's data, by the mean of both scores, {'; '.join(told)}."


def _costs(frame: pd.DataFrame) -> str:
    told = []
    for skill in skills_of(frame):
        models = of_skill(frame, skill)
        ours, again = (regime(models, way)["flops"].iloc[0] for way in (MERGED, "rt"))
        told.append(f"{100 * ours / again:.0f} % for {skill}")
    return (
        "To train a model for a merge takes, of the arithmetic of retraining, "
        f"{', '.join(told)}; trying weights takes evaluations alone."
    )
