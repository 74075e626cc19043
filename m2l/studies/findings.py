"""The two papers' findings, and what a study's own results say about each.

Sources: Yadav et al., "What Matters for Model Merging at Scale?", sections 4.1 to 4.5; Morrison et
al., "Merge to Learn" (2024), sections 4 and 5.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from m2l.studies.merge_to_learn import ALL, GENERAL, SkillsStudy
from m2l.studies.normalized_performance import MULTITASK, REPLICATES, Replicates, interval
from m2l.studies.skill_scores import Score, mean, score_in, score_of_model

SCALING_TEST = (
    f"95 % interval of a bootstrap over datasets and seeds ({REPLICATES:,} replicates, the same "
    "draw for every model): supported if all of it lies on the claim's side of 0, contradicted if "
    "all of it lies on the other, undecided otherwise"
)
_SKILLS_TEST = (
    "95 % interval of the tasks' errors over examples, {}: supported if all of it lies on the "
    "claim's side of 0, contradicted if all of it lies on the other, undecided otherwise"
)
PAIRED_TEST = _SKILLS_TEST.format("which all models share and differences pair")
# Of results that have no values of examples.
INDEPENDENT_TEST = _SKILLS_TEST.format("as if each model were scored on examples of its own")
_NOT_TESTED = "This study has nothing to compare."
SAFETY, REFUSALS = "safety", "exaggerated_refusals"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim of a paper, and a study's own numbers.

    Attributes:
        number: The paper's order.
        title: The claim in a few words.
        claim: The paper's claim, in a sentence.
        statistic: The statistic in words; above 0 is on the claim's side.
        value: The statistic.
        interval: Its 95 % interval; NaN if the study cannot say.
        verdict: "supported", "contradicted" or "undecided"; "not tested" by a study that has no
            such comparison.
        sentence: What the study's numbers say.
        test: How the verdict is derived.
    """

    number: int
    title: str
    claim: str
    statistic: str
    value: float
    interval: tuple[float, float]
    verdict: str
    sentence: str
    test: str


def _finding(
    number: int,
    title: str,
    claim: str,
    statistic: str,
    estimate: tuple[float, float, float] | None,
    sentence: str,
    digits: int,
    test: str,
) -> Finding:
    """Returns the finding of a statistic and its interval (value, low, high); None: not tested."""
    if estimate is None:
        ends = (math.nan, math.nan)
        return Finding(
            number, title, claim, statistic, math.nan, ends, "not tested", sentence, test
        )
    value, low, high = estimate
    verdict = "supported" if low > 0 else "contradicted" if high < 0 else "undecided"
    value_text, low_text, high_text = (f"{end:+.{digits}f}" for end in estimate)
    sentence += f" ({statistic}: {value_text}, 95 % interval {low_text} to {high_text}.)"
    return Finding(number, title, claim, statistic, value, (low, high), verdict, sentence, test)


def _scaling_finding(
    number: int,
    title: str,
    claim: str,
    statistic: str,
    replicates: np.ndarray | None,
    sentence: str,
) -> Finding:
    estimate = None
    if replicates is None:
        sentence = _NOT_TESTED
    else:
        estimate = (float(replicates[0]), *interval(replicates))
    return _finding(number, title, claim, statistic, estimate, sentence, 3, SCALING_TEST)


def _mean(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    # Cells that a replicate has no dataset for are left out.
    with np.errstate(invalid="ignore"):
        present = np.isfinite(values)
        return np.where(present, values, 0).sum(axes) / present.sum(axes)


def _slope(values: np.ndarray, axis: int, along: np.ndarray) -> np.ndarray:
    """Returns the slope of the least-squares line along an axis."""
    x = along - along.mean()
    return np.tensordot(np.moveaxis(values, axis, -1), x / (x**2).sum(), axes=1)


@dataclasses.dataclass(frozen=True)
class _PerformanceArrays:
    """Arrays [replicates, sizes, bases, methods, counts]; the multitask models' without methods."""

    held_in: np.ndarray
    held_out: np.ndarray
    multitask_out: np.ndarray
    sizes: list[str]
    counts: list[int]
    bases: list[str]
    tripled: np.ndarray

    @classmethod
    def of(cls, grid: Replicates, parameters: Mapping[str, int]) -> "_PerformanceArrays":
        methods = grid.axes["method"]
        merged = [i for i, method in enumerate(methods) if method != MULTITASK]
        return cls(
            held_in=grid.held_in[:, :, :, merged],
            held_out=grid.held_out[:, :, :, merged],
            multitask_out=grid.held_out[:, :, :, methods.index(MULTITASK)],
            sizes=grid.axes["size"],
            counts=grid.axes["experts"],
            bases=grid.axes["base"],
            tripled=np.log([parameters[size] for size in grid.axes["size"]]) / np.log(3),
        )

    @property
    def instruct(self) -> int:
        """The place of the instruction-tuned base; of the only one, if there is one."""
        return self.bases.index("instruct") if "instruct" in self.bases else 0


def scaling_findings(replicates: Replicates, parameters: Mapping[str, int]) -> list[Finding]:
    """Returns the five findings of paper 1, in the paper's order.

    Args:
        replicates: The study's grid.
        parameters: The number of parameters of each size's models.
    """
    grid = _PerformanceArrays.of(replicates, parameters)
    return [
        _instruction_tuned(grid),
        _larger(grid),
        _generalisation(grid),
        _more_experts(grid),
        _alike(grid),
    ]


def _instruction_tuned(grid: _PerformanceArrays) -> Finding:
    statistic, sentence = None, ""
    if len(grid.bases) > 1:
        pretrained = grid.held_in[:, :, grid.bases.index("pretrained")]
        difference = grid.held_in[:, :, grid.instruct] - pretrained
        statistic = _mean(difference, (1, 2, 3))
        first, second = (
            _mean(grid.held_in[:1, :, grid.bases.index(base)], (1, 2, 3))[0]
            for base in ("instruct", "pretrained")
        )
        sentence = (
            f"Merges keep {first:.2f} of their experts' performance on an instruction-tuned base "
            f"and {second:.2f} on a pretrained one; the instruction-tuned is ahead in "
            f"{int((difference[0] > 0).sum())} of {difference[0].size} settings."
        )
    return _scaling_finding(
        1,
        "Instruction-tuned bases merge better",
        "Experts made from an instruction-tuned base merge better than those made from a "
        "pretrained one, at every size, by every method and for every number of experts.",
        "held-in performance, instruction-tuned less pretrained",
        statistic,
        sentence,
    )


def _larger(grid: _PerformanceArrays) -> Finding:
    statistic, sentence = None, ""
    if len(grid.sizes) > 1:
        slopes = _slope(grid.held_in, 1, grid.tripled)
        statistic = _mean(slopes, (1, 2, 3))
        first, last = (_mean(grid.held_in[:1, i], (1, 2, 3))[0] for i in (0, -1))
        rising, all_of = int((slopes[0] > 0).sum()), slopes[0].size
        sentence = (
            f"Held-in performance goes from {first:.2f} at {grid.sizes[0]} to {last:.2f} at "
            f"{grid.sizes[-1]}; it rises with size in {rising} of {all_of} settings."
        )
    return _scaling_finding(
        2,
        "Larger models merge better",
        "The larger the models, the more of their experts' performance a merge keeps.",
        "held-in performance gained by three times the parameters",
        statistic,
        sentence,
    )


def _generalisation(grid: _PerformanceArrays) -> Finding:
    above, all_of = int((grid.held_out[0] > 1).sum()), grid.held_out[0].size
    means = {
        base: f"{_mean(grid.held_out[:1, :, place], (1, 2, 3))[0]:.3f}"
        for place, base in enumerate(grid.bases)
    }
    strong = "an instruction-tuned" if "instruct" in means else "a pretrained"
    sentence = (
        f"Merges score {means[grid.bases[grid.instruct]]} of {strong} base on tasks nobody was "
        "trained on"
        + f", and {means.get('pretrained')} of a pretrained one" * (len(means) > 1)
        + f"; above 1 in {above} of {all_of} settings. "
    )
    strong = strong.removeprefix("an ").removeprefix("a ")
    if len(grid.counts) > 1:
        number = np.array(grid.counts, float)
        slope = _mean(_slope(grid.held_out[:, :, grid.instruct], 3, number), (1, 2))
        low, high = interval(slope)
        sentence += (
            f"Each expert more adds {slope[0]:+.4f} on the {strong} base "
            f"(interval {low:+.4f} to {high:+.4f}). "
        )
    merged = _mean(grid.held_out[:, -1, grid.instruct, :, -1], (1,))
    ahead = merged - grid.multitask_out[:, -1, grid.instruct, -1]
    low, high = interval(ahead)
    sentence += (
        f"At {grid.sizes[-1]} and {grid.counts[-1]} experts, merges of the {strong} are "
        f"{ahead[0]:+.3f} from the multitask model (interval {low:+.3f} to {high:+.3f})."
    )
    return _scaling_finding(
        3,
        "Merging improves generalisation",
        "Merged models do better than their base on held-out tasks; with a strong base they do so "
        "the more, the more experts are merged, and large ones pass the multitask model.",
        "held-out performance above the base's",
        _mean(grid.held_out, (1, 2, 3, 4)) - 1,
        sentence,
    )


def _more_experts(grid: _PerformanceArrays) -> Finding:
    statistic, sentence = None, ""
    if len(grid.sizes) > 1 and len(grid.counts) > 1:
        number = np.array(grid.counts, float)
        slopes = _slope(grid.held_in, 4, number)  # [replicates, sizes, bases, methods]
        statistic = _mean(_slope(slopes, 1, grid.tripled), (1, 2))
        span = number[-1] - number[0]
        first, last = (float(_mean(slopes[:1, i], (1, 2))[0]) * span for i in (0, -1))
        sentence = (
            f"From {grid.counts[0]} to {grid.counts[-1]} experts, held-in performance changes by "
            f"{first:+.2f} at {grid.sizes[0]} and by {last:+.2f} at {grid.sizes[-1]}."
        )
    return _scaling_finding(
        4,
        "Larger models merge more experts",
        "The larger the models, the less is lost when more experts are merged.",
        "what three times the parameters save of the loss for each further expert",
        statistic,
        sentence,
    )


def _alike(grid: _PerformanceArrays) -> Finding:
    statistic, sentence = None, ""
    held_in = grid.held_in[:, :, grid.instruct]
    if len(grid.sizes) > 1 and held_in.shape[2] > 1:
        spread = _mean(held_in.max(2) - held_in.min(2), (2,))  # [replicates, sizes]
        statistic = spread[:, 0] - spread[:, -1]
        sentence = (
            f"The best and the worst method are {spread[0, 0]:.3f} apart at {grid.sizes[0]} and "
            f"{spread[0, -1]:.3f} at {grid.sizes[-1]} (held-in, instruction-tuned base)."
        )
    return _scaling_finding(
        5,
        "Methods become alike at scale",
        "With large instruction-tuned models all merge methods do equally well.",
        "distance of best and worst method, smallest less largest size",
        statistic,
        sentence,
    )


def _skills_finding(
    number: int, title: str, claim: str, statistic: str, score: Score | None, sentence: str
) -> Finding:
    estimate, test = None, PAIRED_TEST
    if score is not None and math.isnan(score.error):
        sentence = _NOT_TESTED
    elif score is not None:
        test = INDEPENDENT_TEST if score.deviations is None else PAIRED_TEST
        half = 1.96 * score.error
        estimate = (score.value, score.value - half, score.value + half)
    return _finding(number, title, claim, statistic, estimate, sentence, 1, test)


def skills_findings(study: SkillsStudy, frame: pd.DataFrame) -> list[Finding]:
    """Returns the claims of paper 2 in the paper's order.

    Args:
        study: The study's settings.
        frame: What `skill_scores.models` returns.
    """
    findings = [_keeps(study, frame), _learns(study, frame), _costs(study, frame)]
    if SAFETY in study.skills and REFUSALS in study.evaluations:
        findings.append(_refuses(frame))
    findings.append(_heuristic(study, frame))
    if len(study.skills) > 1:
        findings.append(_several(study, frame))
    return findings


def _lowest(*scores: Score) -> Score:
    return min(scores, key=lambda score: score.value)


def _raised(score: Score, points: float) -> Score:
    return dataclasses.replace(score, value=score.value + points)


def _merged(frame: pd.DataFrame, name: str, skill: str) -> Score:
    # The merge by task arithmetic with the heuristic's weight.
    return score_of_model(
        frame,
        name,
        regime="merge",
        method="task_arithmetic",
        skills=skill,
        part=100,
        heuristic=True,
    )


def _trained(frame: pd.DataFrame, name: str, regime: str, skill: str) -> Score:
    return score_of_model(frame, name, regime=regime, skills=skill, part=100)


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in values.items())


def _keeps(study: SkillsStudy, frame: pd.DataFrame) -> Finding:
    ours = {skill: _merged(frame, GENERAL, skill) for skill in study.skills}
    theirs = {skill: _trained(frame, GENERAL, "cft", skill) for skill in study.skills}
    before = score_of_model(frame, GENERAL, regime=GENERAL)
    return _skills_finding(
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
        before = score_of_model(frame, skill, regime=GENERAL)
        merged = _merged(frame, skill, skill)
        retrained = _trained(frame, skill, "rt", skill)
        gains.append(merged - mean([before, retrained]))
        regimes = ("cft", "rt", "ptm")
        cft, rt, alone = (_trained(frame, skill, regime, skill).value for regime in regimes)
        parts.append(
            f"{skill} from {before.value:.1f} to {merged.value:.1f} (continued {cft:.1f}, "
            f"retrained {rt:.1f}, the skill's own model {alone:.1f})"
        )
    return _skills_finding(
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
    return _skills_finding(
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
    margins: dict[float, Score] = {}
    merges: dict[float, dict[str, Score]] = {}
    for _, row in _along(frame, SAFETY).iterrows():
        scores = {name: score_in(row, name) for name in (SAFETY, REFUSALS)}
        complies, refuses = (scores[name] - other[name] for name in (REFUSALS, SAFETY))
        margins[row["weight"]] = _lowest(complies, _raised(refuses, 5))
        merges[row["weight"]] = scores
    best = max(margins, key=lambda weight: margins[weight].value)
    zero = {name: _merged(frame, name, SAFETY) for name in (SAFETY, REFUSALS)}

    def said(scores: dict[str, Score]) -> str:
        return f"{scores[SAFETY].value:.0f} and {scores[REFUSALS].value:.0f}"

    return _skills_finding(
        4,
        "Merged models refuse less of what is harmless",
        "At about the same safety, merges comply with safe requests that sound unsafe far more "
        "often than retrained or continued models do.",
        "merge at its best weight less the more compliant of the others, points: the lesser of "
        "compliance with safe look-alikes and of safety plus 5",
        margins[best],
        "Unsafe requests refused and safe look-alikes answered, in percent: "
        f"{said(merges[best])} by the merge at w {best:.2f}, {said(zero)} by the heuristic's w, "
        f"{said(ways['cft'])} after continued fine-tuning, {said(ways['rt'])} after retraining. "
        "The best weight is chosen on the examples it is scored by.",
    )


def _along(frame: pd.DataFrame, skill: str) -> pd.DataFrame:
    """Returns the merges of a skill by task arithmetic with all weights."""
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
        gain = score_in(most, skill) - score_of_model(frame, skill, regime=GENERAL)
        if gain.value <= 1.96 * gain.error:
            # Where nothing is gained by any weight, the least is as good as the best.
            parts.append(f"{skill}: no w that was tried adds it")
            continue
        both = (tried[GENERAL] + tried[skill]) / 2
        best, zero = tried.loc[both.idxmax()], tried[tried["heuristic"]].iloc[0]
        gap = Score(0.0, 0.0, {})
        if best.name != zero.name:
            best_score, zero_score = (
                mean([score_in(row, name) for name in (GENERAL, skill)]) for row in (best, zero)
            )
            gap = best_score - zero_score
        gaps.append(dataclasses.replace(gap, value=5 - gap.value))
        parts.append(
            f"{skill}: w {zero['weight']:.2f}, {gap.value:.1f} below the best at "
            f"{best['weight']:.2f}"
        )
    return _skills_finding(
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
            _merged(frame, skill, together) - score_of_model(frame, skill, regime=GENERAL)
            for skill in study.skills
        ]
    )
    general = _merged(frame, GENERAL, together)
    before = score_of_model(frame, GENERAL, regime=GENERAL)
    scores = {skill: _merged(frame, skill, together).value for skill in study.skills}
    rt, cft = (
        ", ".join(f"{_trained(frame, n, regime, ALL).value:.1f}" for n in (GENERAL, *study.skills))
        for regime in ("rt", "cft")
    )
    return _skills_finding(
        6,
        "Skills can be added together",
        "One merge of all skills keeps the general score and has some of each skill, less than "
        "retraining has.",
        "merge of all less general model, points: the lesser of the mean skill score's and the "
        "general score's plus 5",
        _lowest(gain, _raised(general - before, 5)),
        f"All skills in one merge: general {general.value:.1f} (before {before.value:.1f}), "
        f"{_listed(scores)}; retrained on everything: {rt}; continued: {cft}.",
    )
