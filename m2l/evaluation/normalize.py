"""Normalised performance: a model's scores in units of a reference model's.

Source: "What Matters for Model Merging at Scale?", section 3. Held-in tasks are divided by the
task's own expert, held-out tasks by the base model; then the mean over the datasets of a category,
over categories, and (by the caller) over seeds.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import fmean

from m2l.errors import EvaluationError
from m2l.evaluation.runner import Result


def dataset_scores(results: Iterable[Result]) -> dict[str, float]:
    """The mean score over each dataset's prompts, in percent."""
    by_dataset = defaultdict(list)
    for result in results:
        by_dataset[result.dataset].append(result.score)
    return {dataset: fmean(scores) for dataset, scores in by_dataset.items()}


def ratios(
    results: Iterable[Result], reference: Mapping[str, Result]
) -> dict[tuple[str, str], float]:
    """By category and dataset, the score over the reference's score.

    Args:
        results: The model's results, one for each task.
        reference: By task name, the results that stand for 1.0: at least those of `results`.

    Returns:
        1.0 where the model does as well as the reference; NaN where the reference scores 0, for
        nothing can be divided by it.

    Raises:
        EvaluationError: there are no results; a task lacks its reference; the reference was scored
            by another metric or on other examples.
    """
    results = list(results)
    if not results:
        raise EvaluationError("normalised performance of no results at all")
    for result in results:
        of_task = reference.get(result.task)
        if of_task is None:
            raise EvaluationError(f"{result.task}: the reference model has no result on it")
        if of_task.metric != result.metric:
            raise EvaluationError(
                f"{result.task}: its score is {result.metric} and the reference's is "
                f"{of_task.metric}; evaluate both with the same --generative_score"
            )
        if of_task.task_digest != result.task_digest:
            raise EvaluationError(
                f"{result.task}: the reference was scored on other examples "
                f"({of_task.task_digest[:12]}, not {result.task_digest[:12]}); evaluate both anew"
            )
    category_of = {result.dataset: result.category for result in results}
    ones = dataset_scores(reference[result.task] for result in results)
    return {
        (category_of[dataset], dataset): score / ones[dataset] if ones[dataset] else math.nan
        for dataset, score in dataset_scores(results).items()
    }


def normalized(results: Iterable[Result], reference: Mapping[str, Result]) -> float:
    """The mean over a category's datasets, then categories, of `ratios`; NaN if one is.

    Args and errors are those of `ratios`.
    """
    by_category = defaultdict(list)
    for (category, _), ratio in ratios(results, reference).items():
        by_category[category].append(ratio)
    return fmean(fmean(of_category) for of_category in by_category.values())
