"""Paper 2's tables, and sentences on where each way to add a skill is ahead."""

from collections.abc import Iterator

import pandas as pd

from m2l.reporting import style
from m2l.reporting.merge_to_learn_figures import (
    MERGED,
    REGIMES,
    regime,
    skill_models,
    skills_of,
)
from m2l.studies.findings import REFUSALS, SAFETY
from m2l.studies.merge_to_learn import ALL, GENERAL, SkillsStudy
from m2l.studies.skill_scores import Score, mean, score_in

_PRINTED = {REFUSALS: "compliance"}
# The three ways that the paper compares.
WAYS = {"cft": "continued fine-tuning", "rt": "retraining", MERGED: "merging"}


def by_regime(study: SkillsStudy, frame: pd.DataFrame) -> pd.DataFrame:
    """Returns the scores and costs of each skill by each regime.

    Args:
        study: The study's settings.
        frame: What `skill_scores.models` returns.

    Returns:
        Rows with skill, model (in print), each evaluation in percent, and GFLOPs beyond the general
        model; the merge is by task arithmetic and the heuristic's weight.
    """
    rows = [_scores(study, frame[frame["regime"] == GENERAL].iloc[0], "", REGIMES[GENERAL])]
    for skill in skills_of(frame):
        for name in ("ptm", "cft", "rt", MERGED):
            (_, model), *_ = regime(skill_models(frame, skill), name).iterrows()
            rows.append(_scores(study, model, skill, REGIMES[name]))
    return pd.DataFrame(rows)


def several(study: SkillsStudy, frame: pd.DataFrame) -> pd.DataFrame:
    """Returns the paper's table of several skills at once.

    Args:
        study: The study's settings.
        frame: What `skill_scores.models` returns.

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
    """Returns the score of the heuristic's weight and of the best weight.

    Args:
        frame: What `skill_scores.models` returns.

    Returns:
        Rows with skill, method, w and score of the heuristic's weight, best_w and best_score; a
        score is the mean of general and skill score, and the best was chosen by it.
    """
    rows = []
    for skill in skills_of(frame):
        merged = skill_models(frame, skill)
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
    """Returns all models with printed column names: scores with standard errors, and costs."""
    columns = ["model", "regime", "skills", "part", "weight"]
    for name in study.evaluations:
        columns += [name, f"{name}_error"]
    printed = {"weight": "w", f"{REFUSALS}_error": "compliance_error", **_PRINTED}
    models = frame[columns].rename(columns=printed)
    return models.assign(steps=frame["steps"], GFLOPs=frame["flops"] / 1e9)


def papers_steps(papers: pd.DataFrame) -> pd.DataFrame:
    """Returns `skill_scores.papers_steps` with printed column names."""
    return papers.rename(columns=WAYS | {"ptm": WAYS[MERGED]})


# --- which way is ahead where ---


def compared(study: SkillsStudy, frame: pd.DataFrame) -> pd.DataFrame:
    """Compares continued fine-tuning, retraining and merging.

    Args:
        study: The study's settings.
        frame: What `skill_scores.models` returns.

    Returns:
        Rows with skill, data (percent), score (which), a column for each of WAYS by its name,
        ahead (the name of the way that is, or "none") and by (points to the next). One is ahead if
        it is so by more than 1.96 standard errors of the difference to the next.
    """
    rows = []
    for part in sorted({100, *study.retrained_parts}, reverse=True):
        for skill in skills_of(frame):
            for title, names in _scores_of(study, skill):
                scores = {way: _mean(frame, skill, way, names, part) for way in WAYS}
                first, second, *_ = sorted(scores, key=lambda way: -scores[way].value)
                gap = scores[first] - scores[second]
                row = {"skill": skill, "data": part, "score": title}
                row |= {WAYS[way]: score.value for way, score in scores.items()}
                clear = gap.value > 1.96 * gap.error
                rows.append(row | {"ahead": WAYS[first] if clear else "none", "by": gap.value})
    return pd.DataFrame(rows)


def ahead(study: SkillsStudy, frame: pd.DataFrame) -> list[str]:
    """Returns sentences on where each way is ahead by `compared`, and on the cost of merging."""
    table, sentences = compared(study, frame), []
    for part, rows in table.groupby("data", sort=False):
        clauses = []
        for way in WAYS.values():
            wins = rows[rows["ahead"] == way].groupby("skill", sort=False)
            skills = [f"{skill} ({', '.join(won['score'])})" for skill, won in wins]
            places = f"in {', '.join(skills)}" if skills else "nowhere"
            clauses.append(f"{way.capitalize()} is clearly ahead {places}.")
        close = int((rows["ahead"] == "none").sum())
        with_part = "all" if part == 100 else f"{part} %"
        sentences.append(
            f"With {with_part} of a skill's data: {' '.join(clauses)} Too close to call: "
            f"{close} of {len(rows)} comparisons."
        )
    shares = []
    for skill in skills_of(frame):
        models = skill_models(frame, skill)
        merging, retraining = (regime(models, way)["flops"].iloc[0] for way in (MERGED, "rt"))
        shares.append(f"{100 * merging / retraining:.0f} % for {skill}")
    sentences.append(
        "To train a model for a merge takes, of the arithmetic of retraining, "
        f"{', '.join(shares)}; trying weights takes evaluations alone."
    )
    return sentences


def _scores_of(study: SkillsStudy, skill: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "general", (GENERAL,)
    yield "skill", (skill,)
    yield "mean of both", (GENERAL, skill)
    if skill == SAFETY and REFUSALS in study.evaluations:
        yield _PRINTED[REFUSALS], (REFUSALS,)


def _mean(frame: pd.DataFrame, skill: str, way: str, names: tuple[str, ...], part: int) -> Score:
    model = regime(skill_models(frame, skill, part), way).iloc[0]
    return mean([score_in(model, name) for name in names])
