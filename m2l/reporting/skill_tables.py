"""Paper 2's tables, and what they say of where each way to add a skill is ahead."""

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


def compared(study: SkillsStudy, frame: pd.DataFrame) -> pd.DataFrame:
    """Continued fine-tuning, retraining and merging beside one another.

    Args:
        study: The study's settings.
        frame: Of `skill_results.models`.

    Returns:
        Rows with skill, data (percent), score (which), a column for each of WAYS by its name,
        ahead (the name of the way that is, or "none") and by (points to the next). One is ahead if
        it is so by more than 1.96 standard errors of the difference to the next, as if both were
        scored on examples of their own.
    """
    rows = []
    for part in sorted({100, *study.retrained_parts}, reverse=True):
        for skill in skills_of(frame):
            for what, names in _scores_of(study, skill):
                scores = {way: _mean(frame, skill, way, names, part) for way in WAYS}
                first, second, *_ = sorted(scores, key=lambda way: -scores[way].value)
                gap = scores[first] - scores[second]
                row = {"skill": skill, "data": part, "score": what}
                row |= {WAYS[way]: score.value for way, score in scores.items()}
                clear = gap.value > 1.96 * gap.error
                rows.append(row | {"ahead": WAYS[first] if clear else "none", "by": gap.value})
    return pd.DataFrame(rows)


def ahead(study: SkillsStudy, frame: pd.DataFrame) -> list[str]:
    """Sentences on where each way is ahead by `compared`, and on what merging costs."""
    table, said = compared(study, frame), []
    for part, rows in table.groupby("data", sort=False):
        told = []
        for way in WAYS.values():
            wins = rows[rows["ahead"] == way]
            where = [
                f"{skill} ({', '.join(of_skill['score'])})"
                for skill, of_skill in wins.groupby("skill", sort=False)
            ]
            told.append(f"{way.capitalize()} is clearly ahead {_in(where)}.")
        close = int((rows["ahead"] == "none").sum())
        with_part = "all" if part == 100 else f"{part} %"
        said.append(
            f"With {with_part} of a skill's data: {' '.join(told)} Too close to call: {close} of "
            f"{len(rows)} comparisons."
        )
    shares = []
    for skill in skills_of(frame):
        ours, again = (
            regime(of_skill(frame, skill), way)["flops"].iloc[0] for way in (MERGED, "rt")
        )
        shares.append(f"{100 * ours / again:.0f} % for {skill}")
    said.append(
        "To train a model for a merge takes, of the arithmetic of retraining, "
        f"{', '.join(shares)}; trying weights takes evaluations alone."
    )
    return said


def _in(where: list[str]) -> str:
    return f"in {', '.join(where)}" if where else "nowhere"


def _scores_of(study: SkillsStudy, skill: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "general", (GENERAL,)
    yield "skill", (skill,)
    yield "mean of both", (GENERAL, skill)
    if skill == SAFETY and REFUSALS in study.evaluations:
        yield _PRINTED[REFUSALS], (REFUSALS,)


def _mean(frame: pd.DataFrame, skill: str, way: str, names: tuple[str, ...], part: int) -> Score:
    model = regime(of_skill(frame, skill, part), way).iloc[0]
    return mean([Score(float(model[name]), float(model[f"{name}_error"])) for name in names])
