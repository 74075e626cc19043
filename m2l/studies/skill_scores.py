"""Scores and costs of all ways to add a skill, computed from the results of paper 2's study.

Source: Morrison et al., "Merge to Learn" (2024), sections 3 and 4.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import numpy as np
import pandas as pd

from m2l import tasks
from m2l.errors import EvaluationError
from m2l.evaluation.results import Result
from m2l.studies import merge_to_learn
from m2l.studies.merge_to_learn import BASE, GENERAL, SkillsStudy
from m2l.studies.study_results import StudyResults
from m2l.training import resources


@dataclasses.dataclass(frozen=True)
class Score:
    """A mean over tasks, in percent.

    Attributes:
        value: The mean over datasets of the mean over their prompts.
        error: Its standard error, over examples.
        deviations: By task each example's part in the score's deviation from what more examples
            would give; None where results have no values of examples, as older ones. With them
            differences and means pair the examples, without they count as independent.
    """

    value: float
    error: float
    deviations: Mapping[str, np.ndarray] | None = dataclasses.field(default=None, compare=False)

    def __sub__(self, other: "Score") -> "Score":
        return _combined([(1.0, self), (-1.0, other)])


def _combined(terms: Sequence[tuple[float, Score]]) -> Score:
    """Returns the weighted sum of scores; on the same examples, their deviations are added."""
    value = math.fsum(weight * score.value for weight, score in terms)
    if any(score.deviations is None for _, score in terms):
        error = math.sqrt(sum((weight * score.error) ** 2 for weight, score in terms))
        return Score(value, error)
    sums: dict[str, np.ndarray] = {}
    for weight, score in terms:
        for task, deviations in score.deviations.items():
            sums[task] = sums.get(task, 0.0) + weight * deviations
    error = math.sqrt(sum(float(part @ part) for part in sums.values()))
    return Score(value, error, sums)


def mean(scores: Sequence[Score]) -> Score:
    """Returns the mean of scores."""
    total = _combined([(1 / len(scores), score) for score in scores])
    return dataclasses.replace(total, value=fmean(score.value for score in scores))


def score(results: Iterable[Result]) -> Score:
    """Computes a model's score on tasks."""
    by_dataset: dict[str, list[Score]] = {}
    for result in results:
        by_dataset.setdefault(result.dataset, []).append(_score_of_task(result))
    return mean([mean(scores) for scores in by_dataset.values()])


def _score_of_task(result: Result) -> Score:
    if result.values is None or result.count < 2:
        # The standard error of a normal distribution with this 95 % interval.
        low, high = result.interval or (math.nan, math.nan)
        return Score(result.score, (high - low) / 3.92)
    values, count = np.array(result.values), result.count
    # The score of a likelihood is 100 exp(mean), of which this is the slope.
    slope = result.score if result.metric == "reference_likelihood" else 1.0
    deviations = slope * (values - values.mean()) / math.sqrt(count * (count - 1))
    return Score(result.score, float(np.linalg.norm(deviations)), {result.task: deviations})


def score_in(row: pd.Series, evaluation: str) -> Score:
    """Returns a model's score of an evaluation from its row of `models`."""
    deviations = row["deviations"].get(evaluation) if "deviations" in row else None
    return Score(float(row[evaluation]), float(row[f"{evaluation}_error"]), deviations)


@dataclasses.dataclass(frozen=True)
class TrainingCost:
    """The cost of training a model's constituents, without the base and the general model.

    Attributes:
        steps: Optimizer steps.
        positions: Tokens that went through the model, padding included.
        flops: Floating-point operations of matrix products.
        seconds: Time, set-up and compilation included.
    """

    steps: int = 0
    positions: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "TrainingCost") -> "TrainingCost":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return TrainingCost(*(a + b for a, b in pairs))


def models(study_results: StudyResults) -> pd.DataFrame:
    """Returns the scores and costs of every model of the study.

    Returns:
        Rows with model, regime ("base", "general", "cft", "rt", "ptm": the skill's own model,
        "merge"), method (of a merge), skills ("science", "science+safety", "all" of trained ones),
        part (percent of the skill's data), weight (w, of one skill), heuristic; for each
        evaluation NAME a column NAME in percent and NAME_error; deviations, of its scores by
        evaluation; steps, positions, flops, seconds.
    """
    study: SkillsStudy = study_results.study
    tasks.use(study.source)
    evaluations = {name: study.tasks_of(name) for name in study.evaluations}
    rows: list[dict[str, object]] = []

    def add(model: str, regime: str, cost: TrainingCost, **columns: object) -> None:
        row: dict[str, object] = {"model": model, "regime": regime}
        results, deviations = study_results.results.get(model, {}), {}
        for name, names in evaluations.items():
            if missing := [task for task in names if task not in results]:
                raise EvaluationError(f"the study has no result of {model} on {missing[0]}")
            evaluated = score(results[task] for task in names)
            row |= {name: evaluated.value, f"{name}_error": evaluated.error}
            if evaluated.deviations is not None:
                deviations[name] = evaluated.deviations
        row["deviations"] = deviations
        rows.append(row | dataclasses.asdict(cost) | columns)

    add(f"models/{BASE}", "base", TrainingCost())
    batch = (study.finetune.batch_size, study.finetune.input_length, study.finetune.target_length)
    costs: dict[str, TrainingCost] = {}
    for model in merge_to_learn.trained_models(study):
        steps, stage = merge_to_learn.steps(study, model.examples), f"models/{model.name}"
        cost = costs[model.name] = TrainingCost(
            steps=steps,
            positions=steps * batch[0] * (batch[1] + batch[2]),
            flops=steps * resources.step_flops(study.model, *batch),
            seconds=study_results.seconds[stage],
        )
        cost = TrainingCost() if model.regime == GENERAL else cost
        add(stage, model.regime, cost, skills=model.skill, part=model.part)
    for merge in merge_to_learn.merges(study):
        _, names, regime = merge.group.split("/")
        add(
            merge.model,
            "merge",
            sum((costs[f"{regime}/{name}"] for name in names.split("+")), TrainingCost()),
            method=merge.method,
            skills="+".join(merge.skills),
            part=merge.part,
            weight=merge.weights[0] if len(merge.weights) == 1 else math.nan,
            heuristic=merge.heuristic,
        )
    frame = pd.DataFrame(rows).fillna({"method": "", "skills": "", "heuristic": False})
    return frame.astype({"heuristic": bool})


def score_of_model(frame: pd.DataFrame, evaluation: str, **columns: object) -> Score:
    """Returns one model's score of an evaluation.

    Args:
        frame: What `models` returns.
        evaluation: The evaluation's name.
        columns: Columns and their values, which identify the model.

    Raises:
        ValueError: There is not exactly one such model.
    """
    rows = frame
    for column, value in columns.items():
        rows = rows[rows[column] == value]
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} models have {columns}, not one")
    return score_in(rows.iloc[0], evaluation)


def papers_steps(study: SkillsStudy) -> pd.DataFrame:
    """Computes the paper's measure of cost: steps of one epoch, over all amounts of a skill's data.

    That is sum |D_i| for continued fine-tuning and for merging, and n |G| + sum |D_i| for
    retraining, over batches: n is the number of amounts, each of which is retrained.

    Returns:
        Rows with skill, cft, rt and ptm, in steps.
    """
    rows = []
    general = study.examples[study.general]
    for skill, mixture in study.skills.items():
        amounts = [study.examples[mixture] * part // 100 for part in (*study.parts, 100)]
        alone = sum(amounts) / study.finetune.batch_size
        again = (len(amounts) * general + sum(amounts)) / study.finetune.batch_size
        rows.append({"skill": skill, "cft": alone, "rt": again, "ptm": alone})
    return pd.DataFrame(rows)
