import dataclasses

import numpy as np
import pytest

from m2l.evaluation import results
from m2l.evaluation.results import Result


def result(task, dataset, category, score):
    return Result(
        task=task,
        dataset=dataset,
        category=category,
        held_out=False,
        kind="rank",
        metric="accuracy",
        score=score,
        metrics={"accuracy": score},
        count=10,
        ties=0,
        truncated=0,
        seconds=0.0,
        model_digest="m",
        task_digest="t",
    )


RESULTS = [
    *(result(f"a{i}", "a", "x", score) for i, score in enumerate((30.0, 80.0, 50.0, 44.0))),
    result("b0", "b", "x", 90.0),
    result("c0", "c", "y", 10.0),
]


def test_prompts_are_summed_up_as_numpy_does():
    row = results.over_prompts(RESULTS)[0]
    scores = [30.0, 80.0, 50.0, 44.0]
    assert (row.dataset, row.category, row.prompts) == ("a", "x", 4)
    assert (row.mean, row.median) == (np.mean(scores), np.median(scores))
    assert row.quartiles == pytest.approx(np.percentile(scores, [25, 75]))
    assert (row.worst, row.best) == (("a0", 30.0), ("a1", 80.0))
    assert 30.0 <= row.interval[0] < row.mean < row.interval[1] <= 80.0


def test_one_prompt_has_no_spread():
    row = results.over_prompts(RESULTS)[1]
    assert row.mean == row.median == row.worst[1] == row.best[1] == 90.0
    assert row.interval == (90.0, 90.0)


def test_the_mean_goes_over_prompts_then_datasets():
    of_categories = results.over_categories(results.over_prompts(RESULTS))
    assert of_categories == {("x", "accuracy"): (51.0 + 90.0) / 2, ("y", "accuracy"): 10.0}


def test_prompts_that_are_scored_by_different_metrics_have_no_common_mean():
    other = dataclasses.replace(RESULTS[1], metric="rouge")
    rows = results.over_prompts([RESULTS[0], other, RESULTS[2]])
    assert [(row.metric, row.mean) for row in rows] == [("accuracy", 40.0), ("rouge", 80.0)]
    assert results.over_categories(rows) == {("x", "accuracy"): 40.0, ("x", "rouge"): 80.0}
