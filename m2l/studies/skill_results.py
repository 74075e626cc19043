"""From a skills study's results to what it compares: scores and costs of all ways to add a skill.

Source: Morrison et al., "Merge to Learn" (2024), sections 3 and 4.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import pandas as pd

from m2l import tasks
from m2l.errors import EvaluationError
from m2l.evaluation.results import Result, dataset_scores
from m2l.studies import skills
from m2l.studies.records import Records
from m2l.studies.skills import GENERAL, SkillsStudy
from m2l.training import resources
from m2l.training.settings import TrainSettings

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
    """Of independent scores."""
    error = math.sqrt(sum(score.error**2 for score in scores)) / len(scores)
    return Score(fmean(score.value for score in scores), error)


def score(results: Iterable[Result]) -> Score:
    """A model's score on tasks."""
    results = list(results)
    by_dataset: dict[str, list[Score]] = {}
    for result in results:
        # Of an interval of 95 %, as if it were normal.
        low, high = result.interval or (math.nan, math.nan)
        by_dataset.setdefault(result.dataset, []).append(Score(result.score, (high - low) / 3.92))
    found = mean([mean(of_dataset) for of_dataset in by_dataset.values()])
    assert math.isclose(found.value, fmean(dataset_scores(results).values()))
    return found


@dataclasses.dataclass(frozen=True)
class Cost:
    """What it took to train what a model is made of, beyond the base and the general model.

    Attributes:
        steps: Optimizer steps.
        positions: Tokens that went through the model, padding included.
        flops: Floating-point operations of matrix products.
        seconds: Time spent, set-up and compilation included.
    """

    steps: int = 0
    positions: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(a + b for a, b in pairs))


def _cost(records: Records, settings: TrainSettings, steps: int, stage: str) -> Cost:
    rows = settings.batch_size, settings.input_length, settings.target_length
    return Cost(
        steps=steps,
        positions=steps * rows[0] * (rows[1] + rows[2]),
        flops=steps * resources.step_flops(records.study.model, *rows),
        seconds=records.seconds[stage],
    )


def models(records: Records) -> pd.DataFrame:
    """Every model of the study.

    Returns:
        Rows with model, regime ("base", "general", "cft", "rt", "ptm": the skill's own model,
        "merge"), method (of a merge), skills ("science", "science+safety", "all" of trained ones),
        part (percent of the skill's data), weight (w, of one skill), heuristic; for each
        evaluation NAME a column NAME in percent and NAME_error; steps, positions, flops, seconds.
    """
    study: SkillsStudy = records.study
    trained = {model.name: model for model in skills.trained(study)}
    costs = {
        name: _cost(records, study.finetune, skills.steps(study, model.examples), f"models/{name}")
        for name, model in trained.items()
    }
    measured = _tasks(study)
    rows = [_row(records, measured, f"models/{BASE}", "base", Cost())]
    for name, model in trained.items():
        beside = {"skills": model.skill, "part": model.part}
        cost = Cost() if model.regime == GENERAL else costs[name]
        rows.append(_row(records, measured, f"models/{name}", model.regime, cost) | beside)
    for merge in skills.merges(study):
        _, names, regime = merge.group.split("/")
        cost = sum((costs[f"{regime}/{name}"] for name in names.split("+")), Cost())
        one = merge.weights[0] if len(merge.weights) == 1 else math.nan
        beside = {
            "method": merge.method,
            "skills": "+".join(merge.skills),
            "part": merge.part,
            "weight": one,
            "heuristic": merge.heuristic,
        }
        rows.append(_row(records, measured, merge.model, "merge", cost) | beside)
    frame = pd.DataFrame(rows).fillna({"method": "", "skills": "", "heuristic": False})
    return frame.astype({"heuristic": bool})


def _row(
    records: Records, measured: Mapping[str, Sequence[str]], model: str, regime: str, cost: Cost
) -> dict[str, object]:
    row: dict[str, object] = {"model": model, "regime": regime}
    by_task = records.results.get(model, {})
    for name, tasks_of in measured.items():
        if missing := [task for task in tasks_of if task not in by_task]:
            raise EvaluationError(f"the study has no result of {model} on {missing[0]}")
        found = score(by_task[task] for task in tasks_of)
        row |= {name: found.value, f"{name}_error": found.error}
    return row | dataclasses.asdict(cost)


def _tasks(study: SkillsStudy) -> dict[str, list[str]]:
    """By evaluation, the tasks that measure it."""
    tasks.use(study.source)
    return {
        name: [task for task in tasks.tasks_in(mixture) if tasks.info(task).kind != "train"]
        for name, mixture in study.evaluations.items()
    }


def at(frame: pd.DataFrame, name: str, **where: object) -> Score:
    """One model's score of an evaluation.

    Args:
        frame: `models`.
        name: The evaluation.
        where: Columns and their values, which one row has.

    Raises:
        ValueError: no row or several have them.
    """
    found = frame
    for column, value in where.items():
        found = found[found[column] == value]
    if len(found) != 1:
        raise ValueError(f"{len(found)} models are {where}, not one")
    return Score(float(found[name].iloc[0]), float(found[f"{name}_error"].iloc[0]))


def papers_steps(study: SkillsStudy) -> pd.DataFrame:
    """The paper's own measure of cost: steps of one epoch, over all amounts of a skill's data.

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
