import dataclasses

import pytest

from m2l.errors import EvaluationError
from m2l.evaluation.results import Result, dataset_scores, normalized


def result(task, dataset, category, score, digest="same"):
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
        task_digest=digest,
    )


MODEL = [
    result("a1", "a", "x", 30.0),
    result("a2", "a", "x", 50.0),
    result("b1", "b", "x", 80.0),
    result("c1", "c", "y", 60.0),
]
REFERENCE = {
    r.task: r
    for r in [
        result("a1", "a", "x", 40.0),
        result("a2", "a", "x", 60.0),
        result("b1", "b", "x", 80.0),
        result("c1", "c", "y", 40.0),
    ]
}


def test_a_dataset_is_the_mean_over_its_prompts():
    assert dataset_scores(MODEL) == {"a": 40.0, "b": 80.0, "c": 60.0}


def test_the_mean_goes_over_datasets_then_categories():
    # Category x: (40/50 + 80/80) / 2 = 0.9; category y: 60/40 = 1.5.
    assert normalized(MODEL, REFERENCE) == pytest.approx((0.9 + 1.5) / 2)


def test_a_model_is_one_by_its_own_measure():
    assert normalized(REFERENCE.values(), REFERENCE) == 1.0


def test_a_reference_on_other_examples_is_refused():
    other = REFERENCE | {"b1": dataclasses.replace(REFERENCE["b1"], task_digest="other")}
    with pytest.raises(EvaluationError, match="b1: the reference was scored on other examples"):
        normalized(MODEL, other)


def test_a_likelihood_is_not_divided_by_a_decodings_score():
    by_likelihood = dataclasses.replace(
        REFERENCE["b1"], metric="reference_likelihood", task_digest="other"
    )
    with pytest.raises(EvaluationError, match=r"b1: its score is accuracy .* reference_likelihood"):
        normalized(MODEL, REFERENCE | {"b1": by_likelihood})


def test_a_missing_reference_is_refused():
    with pytest.raises(EvaluationError, match="c1: the reference model has no result"):
        normalized(MODEL, {task: r for task, r in REFERENCE.items() if task != "c1"})


def test_a_dataset_on_which_the_reference_scores_0_is_left_out():
    zero = REFERENCE | {"c1": result("c1", "c", "y", 0.0)}
    without = [each for each in MODEL if each.task != "c1"]
    assert normalized(MODEL, zero) == normalized(without, REFERENCE)
    with pytest.raises(EvaluationError, match="scores 0 on every task"):
        normalized([each for each in MODEL if each.task == "c1"], zero)


def test_no_results_have_no_performance():
    with pytest.raises(EvaluationError):
        normalized([], REFERENCE)
