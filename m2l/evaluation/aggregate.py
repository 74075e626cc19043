"""Scores over the prompts of a dataset, over datasets, and over categories."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean

import numpy as np

from m2l.evaluation import bootstrap
from m2l.evaluation.results import Result


@dataclasses.dataclass(frozen=True)
class OverPrompts:
    """How a model's score on a dataset depends on the prompt, in percent.

    Attributes:
        dataset: The dataset.
        category: Its task category.
        metric: What scores these prompts; others of the dataset may be scored by another.
        prompts: How many of its prompts were evaluated.
        mean, median: Over the prompts; T0's paper reports the median.
        quartiles: The lower and the upper one, interpolated linearly as NumPy does: their distance
            is the spread that T0's paper shows.
        worst, best: The task with the lowest and the highest score, and this score.
        interval: Where the mean over such prompts lies with 95 % confidence: the bootstrap draws
            prompts, so that one prompt has no width.
    """

    dataset: str
    category: str
    metric: str
    prompts: int
    mean: float
    median: float
    quartiles: tuple[float, float]
    worst: tuple[str, float]
    best: tuple[str, float]
    interval: tuple[float, float]


def over_prompts(results: Iterable[Result]) -> list[OverPrompts]:
    """A row for each dataset and metric, in the order in which they come."""
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        groups[result.dataset, result.metric].append(result)
    return [_over_prompts(of_one) for of_one in groups.values()]


def _over_prompts(results: Sequence[Result]) -> OverPrompts:
    ordered = sorted(results, key=lambda result: result.score)
    scores = np.array([result.score for result in results])
    low, median, high = np.quantile(scores, [0.25, 0.5, 0.75])
    interval = bootstrap.interval(lambda drawn: float(scores[drawn].mean()), len(scores))
    return OverPrompts(
        dataset=results[0].dataset,
        category=results[0].category,
        metric=results[0].metric,
        prompts=len(results),
        mean=fmean(scores),
        median=float(median),
        quartiles=(float(low), float(high)),
        worst=(ordered[0].task, ordered[0].score),
        best=(ordered[-1].task, ordered[-1].score),
        interval=tuple(interval),
    )


def over_categories(rows: Iterable[OverPrompts]) -> dict[tuple[str, str], float]:
    """By category and metric, the mean over datasets of the mean over their prompts, in percent.

    Source: "What Matters for Model Merging at Scale?", section 3; what it reports is this in units
    of a reference, `normalize.normalized`, and the mean over categories.
    """
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        groups[row.category, row.metric].append(row.mean)
    return {group: fmean(means) for group, means in groups.items()}
