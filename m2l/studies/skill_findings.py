"""What paper 2 says of the ways to add a skill, and what a study's own numbers say to it.

Source: Morrison et al., "Merge to Learn" (2024), sections 4 and 5.
"""

import math

import pandas as pd

from m2l.studies.findings import Finding
from m2l.studies.skill_results import Score, at, mean
from m2l.studies.skills import ALL, GENERAL, SkillsStudy

TEST = (
    "95 % interval from the tasks' bootstrap over examples, as if each model were scored on "
    "examples of its own: supported if all of it lies on the claim's side of 0, contradicted if "
    "all of it lies on the other, undecided otherwise"
)
SAFETY, REFUSALS = "safety", "exaggerated_refusals"


def _finding(
    number: int, title: str, claim: str, statistic: str, value: Score | None, sentence: str
) -> Finding:
    if value is None or math.isnan(value.error):
        nothing = (math.nan, math.nan)
        said = sentence if value is None else "This study has nothing to compare."
        return Finding(number, title, claim, statistic, math.nan, nothing, "not tested", said, TEST)
    low, high = value.value - 1.96 * value.error, value.value + 1.96 * value.error
    verdict = "supported" if low > 0 else "contradicted" if high < 0 else "undecided"
    said = f"{sentence} ({statistic}: {value.value:+.1f}, 95 % interval {low:+.1f} to {high:+.1f}.)"
    return Finding(number, title, claim, statistic, value.value, (low, high), verdict, said, TEST)


def findings(study: SkillsStudy, frame: pd.DataFrame) -> list[Finding]:
    """The paper's claims in order.

    Args:
        study: The study's settings.
        frame: `skill_results.models`.
    """
    found = [_keeps(study, frame), _learns(study, frame), _costs(study, frame)]
    if SAFETY in study.skills and REFUSALS in study.evaluations:
        found.append(_refuses(frame))
    found.append(_heuristic(study, frame))
    if len(study.skills) > 1:
        found.append(_several(study, frame))
    return found


def _least(*scores: Score) -> Score:
    """Of several things that a claim says at once, the one that holds least."""
    return min(scores, key=lambda score: score.value)


def _raised(score: Score, by: float) -> Score:
    return Score(score.value + by, score.error)


def _merged(frame: pd.DataFrame, name: str, skill: str) -> Score:
    """Of the merge by task arithmetic whose weight needed no trying."""
    return at(
        frame,
        name,
        regime="merge",
        method="task_arithmetic",
        skills=skill,
        part=100,
        heuristic=True,
    )


def _trained(frame: pd.DataFrame, name: str, regime: str, skill: str) -> Score:
    return at(frame, name, regime=regime, skills=skill, part=100)


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in values.items())


def _keeps(study: SkillsStudy, frame: pd.DataFrame) -> Finding:
    ours = {skill: _merged(frame, GENERAL, skill) for skill in study.skills}
    theirs = {skill: _trained(frame, GENERAL, "cft", skill) for skill in study.skills}
    before = at(frame, GENERAL, regime=GENERAL)
    return _finding(
        1,
        "Merging keeps the general model's abilities, continued fine-tuning does not",
        "Continued fine-tuning loses 10 to 40 % of general performance, a merge next to nothing.",
        "general score, merge less continued fine-tuning, points",
        mean([ours[skill] - theirs[skill] for skill in study.skills]),
        f"The general model scores {before.value:.1f}. After merging: "
        f"{_listed({name: score.value for name, score in ours.items()})}; after continued "
        f"fine-tuning: {_listed({name: score.value for name, score in theirs.items()})}.",
    )


def _learns(study: SkillsStudy, frame: pd.DataFrame) -> Finding:
    gains, parts = [], []
    for skill in study.skills:
        before = at(frame, skill, regime=GENERAL)
        merged = _merged(frame, skill, skill)
        retrained = _trained(frame, skill, "rt", skill)
        gains.append(merged - mean([before, retrained]))
        others = (_trained(frame, skill, regime, skill).value for regime in ("cft", "rt", "ptm"))
        cft, rt, alone = others
        parts.append(
            f"{skill} from {before.value:.1f} to {merged.value:.1f} (continued {cft:.1f}, "
            f"retrained {rt:.1f}, the skill's own model {alone:.1f})"
        )
    return _finding(
        2,
        "A merge has learned the skill",
        "Task arithmetic by the zero-tuning weight brings most of what the other ways bring.",
        "skill score, merge less half way from the general model to retraining, points",
        mean(gains),
        "By the heuristic's weight: " + "; ".join(parts) + ".",
    )


def _costs(study: SkillsStudy, frame: pd.DataFrame) -> Finding:
    shares, behind = {}, []
    for skill in study.skills:
        flops = {
            regime: float(
                frame[
                    (frame["regime"] == regime)
                    & (frame["skills"] == skill)
                    & (frame["part"] == 100)
                ]["flops"].iloc[0]
            )
            for regime in ("ptm", "rt")
        }
        shares[skill] = 100 * (1 - flops["ptm"] / flops["rt"])
        both = [
            _merged(frame, name, skill) - _trained(frame, name, "rt", skill)
            for name in (GENERAL, skill)
        ]
        behind.append(mean(both))
    difference = mean(behind)
    # As good if it is not worse by more than five points.
    return _finding(
        3,
        "It does nearly as well as retraining for a fraction of the cost",
        "Merging costs 50 to 95 % less than retraining on everything, and is about as good.",
        "mean of general and skill score, merge less retraining, plus 5 points",
        _raised(difference, 5),
        f"The skill's own model takes less arithmetic than retraining by "
        f"{', '.join(f'{share:.0f} % ({skill})' for skill, share in shares.items())}.",
    )


def _refuses(frame: pd.DataFrame) -> Finding:
    # A model that refuses nothing complies best: it must be about as safe, too, by some weight.
    ways = {
        way: {name: _trained(frame, name, way, SAFETY) for name in (SAFETY, REFUSALS)}
        for way in ("cft", "rt")
    }
    other = max(ways.values(), key=lambda scores: scores[REFUSALS].value)
    held: dict[float, Score] = {}
    merges: dict[float, dict[str, Score]] = {}
    for _, row in _along(frame, SAFETY).iterrows():
        scores = {name: Score(row[name], row[f"{name}_error"]) for name in (SAFETY, REFUSALS)}
        complies, refuses = (scores[name] - other[name] for name in (REFUSALS, SAFETY))
        held[row["weight"]] = _least(complies, _raised(refuses, 5))
        merges[row["weight"]] = scores
    best = max(held, key=lambda weight: held[weight].value)
    zero = {name: _merged(frame, name, SAFETY) for name in (SAFETY, REFUSALS)}

    def said(scores: dict[str, Score]) -> str:
        return f"{scores[SAFETY].value:.0f} and {scores[REFUSALS].value:.0f}"

    return _finding(
        4,
        "Merged models refuse less of what is harmless",
        "At about the same safety, merges comply with safe requests that sound unsafe far more "
        "often than retrained or continued models do.",
        "merge at its best weight less the more compliant of the others, points: the lesser of "
        "compliance with safe look-alikes and of safety plus 5",
        held[best],
        "Unsafe requests refused and safe look-alikes answered, in percent: "
        f"{said(merges[best])} by the merge at w {best:.2f}, {said(zero)} by the heuristic's w, "
        f"{said(ways['cft'])} after continued fine-tuning, {said(ways['rt'])} after retraining. "
        "The best weight is chosen on the examples it is scored by.",
    )


def _along(frame: pd.DataFrame, skill: str) -> pd.DataFrame:
    """The merges of a skill by task arithmetic, whatever the weight."""
    return frame[
        (frame["regime"] == "merge")
        & (frame["method"] == "task_arithmetic")
        & (frame["skills"] == skill)
        & (frame["part"] == 100)
    ]


def _heuristic(study: SkillsStudy, frame: pd.DataFrame) -> Finding:
    gaps, parts = [], []
    for skill in study.skills:
        tried = _along(frame, skill)
        most = tried.loc[tried[skill].idxmax()]
        gain = Score(most[skill], most[f"{skill}_error"]) - at(frame, skill, regime=GENERAL)
        if gain.value <= 1.96 * gain.error:
            # Where nothing is gained by any weight, the least is as good as the best.
            parts.append(f"{skill}: no w that was tried adds it")
            continue
        both = (tried[GENERAL] + tried[skill]) / 2
        best, zero = tried.loc[both.idxmax()], tried[tried["heuristic"]].iloc[0]
        errors = [
            math.hypot(row[f"{GENERAL}_error"], row[f"{skill}_error"]) / 2 for row in (best, zero)
        ]
        gap = float(both.max() - both.loc[zero.name])
        gaps.append(Score(5 - gap, math.hypot(*errors) if best.name != zero.name else 0.0))
        parts.append(
            f"{skill}: w {zero['weight']:.2f}, {gap:.1f} below the best at {best['weight']:.2f}"
        )
    return _finding(
        5,
        "The weight can be had without trying",
        "|D| / |G| is a good weight without any validation.",
        "5 points less what its mean of general and skill score is below the best weight's",
        mean(gaps) if gaps else None,
        f"{'; '.join(parts)}."
        + " The best are chosen on the examples they are scored by." * bool(gaps),
    )


def _several(study: SkillsStudy, frame: pd.DataFrame) -> Finding:
    together = "+".join(study.skills)
    gain = mean(
        [
            _merged(frame, skill, together) - at(frame, skill, regime=GENERAL)
            for skill in study.skills
        ]
    )
    general, before = _merged(frame, GENERAL, together), at(frame, GENERAL, regime=GENERAL)
    scores = {skill: _merged(frame, skill, together).value for skill in study.skills}
    others = {
        regime: [_trained(frame, name, regime, ALL).value for name in (GENERAL, *study.skills)]
        for regime in ("cft", "rt")
    }
    return _finding(
        6,
        "Skills can be added together",
        "One merge of all skills keeps the general score and has some of each skill, less than "
        "retraining has.",
        "merge of all less general model, points: the lesser of the mean skill score's and the "
        "general score's plus 5",
        _least(gain, _raised(general - before, 5)),
        f"All skills in one merge: general {general.value:.1f} (before {before.value:.1f}), "
        f"{_listed(scores)}; retrained on "
        f"everything: {', '.join(f'{value:.1f}' for value in others['rt'])}; continued: "
        f"{', '.join(f'{value:.1f}' for value in others['cft'])}.",
    )
