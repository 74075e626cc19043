"""What a skills study's results come to, with scores that can be averaged by hand."""

import dataclasses
import math

import numpy as np
import pytest

from m2l.evaluation.results import Result
from m2l.studies import findings, merge_to_learn, skill_scores, study_results
from m2l.studies.skill_scores import Score
from m2l.training import resources

RESULT = Result(
    task="task",
    dataset="dataset",
    category="category",
    held_out=False,
    kind="rank",
    metric="accuracy",
    score=0.0,
    metrics={},
    count=50,
    ties=0,
    truncated=0,
    seconds=0.0,
    model_digest="model",
    task_digest="task",
)


def result(dataset, score, half):
    """One whose 95 % interval goes so far to both sides."""
    interval = None if half is None else (score - half, score + half)
    return dataclasses.replace(RESULT, dataset=dataset, score=score, interval=interval)


def changed(records_of, **by_model):
    """A study's frame in which models (part of a name: evaluation: score) score otherwise."""

    def change(model, name, score):
        for part, scores in by_model.items():
            if part in model:
                score = scores.get(name, score)
        return score

    found = records_of(change)
    return found.study, skill_scores.models(found)


def verdicts(study, frame):
    return {finding.number: finding.verdict for finding in findings.skills_findings(study, frame)}


@pytest.fixture(scope="module")
def frame(skills_records, tmp_path_factory):
    """From the results as they are published."""
    out = tmp_path_factory.mktemp("published")
    study_results.publish(skills_records(), out)
    return skill_scores.models(study_results.load(out))


def test_a_score_is_a_mean_over_datasets_of_means_over_prompts_with_its_error():
    found = skill_scores.score(
        [result("a", 10.0, 1.96), result("a", 30.0, 1.96), result("b", 50.0, 3.92)]
    )
    assert found.value == (20 + 50) / 2
    # Errors 1 and 1 of a, whose mean has 1 / sqrt(2); 2 of b.
    assert found.error == pytest.approx(math.sqrt(0.5 + 4) / 2)


def test_a_task_without_an_interval_leaves_the_error_unknown():
    found = skill_scores.score([result("a", 10.0, None), result("b", 30.0, 1.0)])
    assert found.value == 20 and math.isnan(found.error)


def test_the_error_of_a_difference_is_that_of_independent_scores():
    assert Score(5.0, 3.0) - Score(2.0, 4.0) == Score(3.0, 5.0)


def test_scores_of_the_same_examples_are_paired():
    rng = np.random.default_rng(0)
    first, second = rng.normal(50, 20, (2, 400))
    second = first + 0.1 * second  # they go up and down together

    def scored(values, **changes):
        changes = {"score": float(values.mean()), "values": list(values), "count": 400, **changes}
        return skill_scores.score([dataclasses.replace(RESULT, **changes)])

    difference = scored(second) - scored(first)
    assert difference.value == pytest.approx((second - first).mean())
    assert difference.error == pytest.approx((second - first).std(ddof=1) / 20)
    assert difference.error < 0.2 * math.hypot(scored(first).error, scored(second).error)
    # Of other tasks' examples they are independent.
    other = scored(first) - scored(second, task="other")
    assert other.error == pytest.approx(math.hypot(scored(first).error, scored(second).error))
    half = skill_scores.mean([scored(first), scored(second, task="other")])
    assert half.error == pytest.approx(other.error / 2)
    # A likelihood's error is that of the exponential of the mean.
    logs = rng.normal(-1, 0.3, 400)
    likelihood = scored(logs, score=100 * math.exp(logs.mean()), metric="reference_likelihood")
    drawn = np.exp(rng.choice(logs, (2000, 400)).mean(1)) * 100
    assert likelihood.error == pytest.approx(drawn.std(), rel=0.1)


def test_the_frame_has_every_model_once_as_it_was_published(frame, skills_study, skills_records):
    made = [merge.model for merge in merge_to_learn.merges(skills_study)]
    trained = [model.name for model in merge_to_learn.trained_models(skills_study)]
    assert [name.removeprefix("models/") for name in frame["model"]] == [
        "pretrained",
        *trained,
        *made,
    ]
    again = skill_scores.models(skills_records())
    for column in frame:
        assert list(frame[column].fillna(-1)) == list(again[column].fillna(-1)), column


def test_scores_are_those_of_the_evaluations_tasks(frame):
    general = frame[frame["regime"] == "general"].iloc[0]
    assert (general["general"], general["science"], general["coding"]) == (60, 25, 5)
    # Thirty-one tasks, each a dataset, of error 8 / 3.92; and one alone.
    assert general["general_error"] == pytest.approx(8 / 3.92 / math.sqrt(31))
    assert general["coding_error"] == pytest.approx(8 / 3.92)


def test_a_model_costs_what_it_is_made_of_beyond_the_general_model(frame, skills_study):
    cost = frame.set_index("model")
    one = resources.step_flops(
        skills_study.model,
        32,
        skills_study.finetune.input_length,
        skills_study.finetune.target_length,
    )
    own = {name: merge_to_learn.steps(skills_study, n) for name, n in skills_study.examples.items()}
    for model, steps in (
        ("models/general", 0),
        ("models/ptm/science", own["skills_science"]),
        ("models/cft/science", own["skills_science"]),
        ("models/rt/science", round(2 * 16800 / 32)),
        ("merges/science/ptm/task_arithmetic-0.2", own["skills_science"]),
        ("merges/science/cft/wise_ft-0.2", own["skills_science"]),
        (
            "merges/science+safety/ptm/task_arithmetic-heuristic",
            own["skills_science"] + own["skills_safety"],
        ),
    ):
        assert cost.loc[model, "steps"] == steps
        assert cost.loc[model, "flops"] == pytest.approx(steps * one)
    assert cost.loc["merges/science+safety/ptm/task_arithmetic-heuristic", "seconds"] == 120


def test_one_model_is_asked_for_and_no_other_number_is_an_answer(frame):
    found = skill_scores.score_of_model(frame, "science", regime="cft", skills="science", part=100)
    assert found.value == 80
    for where in ({"regime": "cft", "skills": "science"}, {"regime": "cft", "skills": "art"}):
        with pytest.raises(ValueError, match="not one"):
            skill_scores.score_of_model(frame, "science", **where)


def test_results_as_the_paper_has_them_support_its_claims(frame, skills_study):
    found = findings.skills_findings(skills_study, frame)
    assert [finding.number for finding in found] == [1, 2, 3, 4, 5, 6]
    for finding in found:
        # What is made up is far worse without tuning, and than retraining, for safety.
        expected = "contradicted" if finding.number in (3, 5) else "supported"
        assert finding.verdict == expected, finding.sentence
    for finding in found:
        assert finding.interval[0] < finding.value < finding.interval[1]
        assert f"{finding.value:+.1f}" in finding.sentence


def test_the_statistic_of_forgetting_is_a_mean_of_differences(skills_records):
    arithmetic = {"task_arithmetic-heuristic": {"general": 50}, "task_arithmetic-": {"general": 50}}
    study, frame = changed(skills_records, **arithmetic, **{"models/cft": {"general": 38}})
    first = findings.skills_findings(study, frame)[0]
    assert first.value == 12
    # A score has an error of 8 / 3.92 / sqrt(31), a difference two, their mean over skills three.
    half = 1.96 * (8 / 3.92 / math.sqrt(31)) * math.sqrt(2) / math.sqrt(3)
    assert first.interval == pytest.approx((12 - half, 12 + half))


@pytest.mark.parametrize(
    "number, changes",
    [
        (1, {"models/cft": {"general": 75}}),
        (2, {"merges/": {"science": 30, "safety": 20, "coding": 10}}),
        (3, {"models/rt": {"general": 95, "science": 95, "safety": 95, "coding": 95}}),
        (4, {"models/rt": {"exaggerated_refusals": 99}, "merges/": {"exaggerated_refusals": 50}}),
        (5, {"-0.4": {"general": 99, "science": 99, "safety": 99, "coding": 99}}),
        # A merge that refuses nothing answers everything: that is no support.
        (4, {"merges/safety/": {"exaggerated_refusals": 100, "safety": 10}}),
        (6, {"merges/science+safety+coding": {"science": 0, "safety": 0, "coding": 0}}),
        (6, {"merges/science+safety+coding": {"general": 40}}),
    ],
)
def test_results_of_the_other_kind_contradict_a_claim(skills_records, number, changes):
    assert verdicts(*changed(skills_records, **changes))[number] == "contradicted"


def test_a_difference_within_its_error_is_undecided(skills_records):
    same = {"merges/": {"general": 50.0}, "models/cft": {"general": 49.8}}
    assert verdicts(*changed(skills_records, **same))[1] == "undecided"


def test_scores_without_intervals_test_nothing(frame, skills_study):
    unknown = frame.assign(science_error=math.nan)
    found = verdicts(skills_study, unknown)
    assert found[2] == "not tested" and found[1] == "supported"


def test_where_no_weight_adds_a_skill_none_is_called_good(skills_records):
    study, frame = changed(skills_records, **{"merges/": {"science": 20, "safety": 5, "coding": 5}})
    fifth = next(each for each in findings.skills_findings(study, frame) if each.number == 5)
    assert fifth.verdict == "not tested"
    assert all(f"{skill}: no w that was tried adds it" in fifth.sentence for skill in study.skills)
    added = {"merges/": {"science": 20, "safety": 5, "coding": 60}}
    assert verdicts(*changed(skills_records, **added))[5] == "supported"


def test_a_study_of_one_skill_that_is_not_safety_has_fewer_claims(skills_study, frame):
    alone = dataclasses.replace(skills_study, skills={"science": "skills_science"})
    assert list(verdicts(alone, frame)) == [1, 2, 3, 5]
