"""Scores and costs of all ways to add a skill, computed from the results of paper 2's study.

Source: Morrison et al., "Merge to Learn" (2024), sections 3 and 4.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from statistics import fmean

import pandas as pd

from m2l import tasks
from m2l.errors import EvaluationError
from m2l.evaluation.results import Result
from m2l.studies import merge_to_learn
from m2l.studies.merge_to_learn import GENERAL, SkillsStudy
from m2l.studies.study_results import StudyResults
from m2l.training import resources

BASE = "pretrained"


@dataclasses.dataclass(frozen=True)
class Score:
    """A mean over tasks, in percent.

    Attributes:
        value: The mean over datasets of the mean over their prompts.
        error: Its standard error, from the tasks' own bootstrap intervals over examples.
    """

    value: float
    error: float

    def __sub__(self, other: "Score") -> "Score":
        # As if the two were independent, though they are scored on the same examples: too wide.
        return Score(self.value - other.value, math.hypot(self.error, other.error))


def mean(scores: Sequence[Score]) -> Score:
    """Returns the mean of independent scores."""
    error = math.sqrt(sum(score.error**2 for score in scores)) / len(scores)
    return Score(fmean(score.value for score in scores), error)


def score(results: Iterable[Result]) -> Score:
    """Computes a model's score on tasks."""
    by_dataset: dict[str, list[Score]] = {}
    for result in results:
        # The standard error of a normal distribution with this 95 % interval.
        low, high = result.interval or (math.nan, math.nan)
        by_dataset.setdefault(result.dataset, []).append(Score(result.score, (high - low) / 3.92))
    return mean([mean(scores) for scores in by_dataset.values()])


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
        evaluation NAME a column NAME in percent and NAME_error; steps, positions, flops, seconds.
    """
    study: SkillsStudy = study_results.study
    tasks.use(study.source)
    evaluations = {
        name: [task for task in tasks.tasks_in(mixture) if tasks.info(task).kind != "train"]
        for name, mixture in study.evaluations.items()
    }
    rows: list[dict[str, object]] = []

    def add(model: str, regime: str, cost: TrainingCost, **columns: object) -> None:
        row: dict[str, object] = {"model": model, "regime": regime}
        results = study_results.results.get(model, {})
        for name, names in evaluations.items():
            if missing := [task for task in names if task not in results]:
                raise EvaluationError(f"the study has no result of {model} on {missing[0]}")
            evaluated = score(results[task] for task in names)
            row |= {name: evaluated.value, f"{name}_error": evaluated.error}
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
    return Score(float(rows[evaluation].iloc[0]), float(rows[f"{evaluation}_error"].iloc[0]))


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
