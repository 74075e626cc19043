"""Paper 2's ways to add a skill, against its equations and its published weights."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from m2l import configuration, tasks
from m2l.data import seqio_pipeline
from m2l.errors import ConfigError, UnknownNameError
from m2l.merging import merge_params
from m2l.studies import merge_to_learn, skill_scores, study_results
from m2l.training.settings import TrainSettings

# Of the paper's mixtures, and the weights that its repository has for them.
SIZES = {"science": 61_000, "safety": 66_161, "coding": 156_000}
GENERAL = 275_470
PUBLISHED = {
    "task_arithmetic": {"science": 0.22, "safety": 0.24, "coding": 0.57},
    "linear": {"science": 0.18, "safety": 0.19, "coding": 0.36},
}
# float32 sums of a few terms of size 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def params(seed):
    """A few numbers under two names."""
    draw = np.random.default_rng(seed)
    return {"layer": {"kernel": draw.normal(size=(6, 5))}, "bias": draw.normal(size=7)}


def flat(tree):
    """All of a model's numbers, in the order in which its names are sorted."""
    return np.concatenate([np.float64(leaf).ravel() for leaf in jax.tree.leaves(tree)])


BASE, GENERAL_MODEL, SCIENCE, SAFETY = (jax.tree.map(np.float32, params(seed)) for seed in range(4))
theta_pre, theta_g, theta_d, theta_s = map(flat, (BASE, GENERAL_MODEL, SCIENCE, SAFETY))


def merged(method, weights, experts, density=0.5):
    recipe = merge_to_learn.recipe(method, weights, density)
    base = None if recipe.method == "average" else BASE
    return flat(merge_params(base, [GENERAL_MODEL, *experts], recipe))


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0])
def test_task_arithmetic_adds_the_skills_vector_to_the_whole_general_model(weight):
    expected = theta_g + weight * (theta_d - theta_pre)
    np.testing.assert_allclose(merged("task_arithmetic", [weight], [SCIENCE]), expected, **CLOSE)


def test_several_skills_are_added_each_by_its_own_weight():
    expected = theta_g + 0.3 * (theta_d - theta_pre) + 0.6 * (theta_s - theta_pre)
    found = merged("task_arithmetic", [0.3, 0.6], [SCIENCE, SAFETY])
    np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("method", ["linear", "wise_ft"])
def test_linear_and_wise_ft_go_from_the_general_model_to_the_other(method, weight):
    """The other is theta_D of the one, theta_CFT of the other: here any model."""
    expected = (1 - weight) * theta_g + weight * theta_d
    np.testing.assert_allclose(merged(method, [weight], [SCIENCE]), expected, **CLOSE)


@pytest.mark.parametrize(
    ("method", "parts"),
    # The bias's 7 numbers and the kernel's 30 are trimmed apart, or all together.
    [("ties_mergekit", [slice(7), slice(7, None)]), ("ties", [slice(None)])],
)
def test_ties_sums_what_agrees_with_the_weighted_vote_trimmed_by_tensor_or_whole(method, parts):
    weights = np.array([1.0, 0.4])[:, None]
    taus = np.stack([theta_g - theta_pre, theta_d - theta_pre])
    for tau in taus:
        for part in (tau[each] for each in parts):
            part[np.argsort(np.abs(part))[: part.size - part.size // 2]] = 0
    weighted = weights * taus
    agreeing = np.sign(weighted) == np.sign(weighted.sum(0))
    expected = theta_pre + np.where(agreeing, weighted, 0).sum(0)
    np.testing.assert_allclose(merged(method, [0.4], [SCIENCE]), expected, **CLOSE)


def test_dare_drops_entries_of_both_vectors_rescales_and_adds():
    found = merged("dare", [0.4], [SCIENCE]) - theta_pre
    ours, theirs = 2 * (theta_g - theta_pre), 2 * 0.4 * (theta_d - theta_pre)
    outcomes = np.stack([np.zeros_like(ours), ours, theirs, ours + theirs])
    distance = np.abs(outcomes - found)
    assert distance.min(0).max() < 1e-5
    assert len(set(distance.argmin(0))) == 4


@pytest.mark.parametrize("method", PUBLISHED)
@pytest.mark.parametrize("skill", SIZES)
def test_the_heuristic_gives_the_papers_weights_for_the_papers_sizes(method, skill):
    found = merge_to_learn.heuristic(method, SIZES[skill], GENERAL)
    assert round(found, 2) == PUBLISHED[method][skill]


def test_each_regime_starts_where_the_paper_says_and_trains_on_what_it_says(skills_study):
    plan = skills_study.stage_graph()
    for stage, init, mixture, steps in (
        ("general", "pretrained", "skills_general", 2 * 9800 / 32),
        ("ptm/science", "pretrained", "skills_science", 2 * 7000 / 32),
        ("cft/science", "general", "skills_science", 2 * 7000 / 32),
        ("rt/science", "pretrained", "skills_general+skills_science", 2 * 16800 / 32),
        ("cft/science_20pct", "general", "skills_science_20pct", 2 * 1400 / 32),
        ("rt/safety_20pct", "pretrained", "skills_general+skills_safety_20pct", 2 * 10100 / 32),
        ("cft/all", "general", "skills_science+skills_safety+skills_coding", 2 * 11440 / 32),
        (
            *("rt/all", "pretrained"),
            *("skills_general+skills_science+skills_safety+skills_coding", 2 * 21240 / 32),
        ),
    ):
        planned = plan[f"models/{stage}"]
        assert planned.inputs == {"init": f"models/{init}"}
        assert planned.settings["settings"]["mixture"] == mixture
        assert planned.settings["settings"]["steps"] == round(steps)
    names = {stage.name for stage in plan}
    assert "models/cft/science_60pct" in names and "models/rt/science_60pct" not in names


def test_every_model_is_evaluated_on_everything(skills_study):
    plan = skills_study.stage_graph()
    trained = [stage.name for stage in plan if stage.kind == "train"]
    assert len(trained) == 2 + 3 * (3 + 2 * 2 + 1) + 2
    for name in trained:
        assert plan[f"results/{name}"].inputs == {"model": name}
    for stage in plan:
        if stage.kind != "train":
            assert stage.settings["categories"] == list(skills_study.evaluations.values())


def test_a_merge_reads_the_general_model_and_the_models_of_its_regime(skills_study):
    plan = skills_study.stage_graph()
    base = {"base": "models/pretrained", "expert/general": "models/general"}
    for group, experts in (
        ("science/ptm", {"expert/science": "models/ptm/science"}),
        ("science/cft", {"expert/science": "models/cft/science"}),
        ("coding_20pct/ptm", {"expert/coding_20pct": "models/ptm/coding_20pct"}),
        (
            "science+safety/ptm",
            {"expert/science": "models/ptm/science", "expert/safety": "models/ptm/safety"},
        ),
    ):
        assert plan[f"results/merges/{group}"].inputs == base | experts
    made = {merge.method for merge in merge_to_learn.merges(skills_study) if "/cft" in merge.group}
    assert made == {"wise_ft"}


def test_every_skill_is_merged_along_w_and_once_by_the_heuristics(skills_study):
    made = list(merge_to_learn.merges(skills_study))
    assert len({merge.model for merge in made}) == len(made)
    for skill in skills_study.skills:
        for method in merge_to_learn.METHODS:
            of = [m for m in made if m.skills == (skill,) and m.method == method and m.part == 100]
            weights = {merge.weights[0] for merge in of}
            # Of those that interpolate, w = 1 is the other end itself.
            ends = {1.0} if method in ("linear", "wise_ft") else set()
            assert set(skills_study.weights) - ends <= weights
            (chosen,) = [merge for merge in of if merge.heuristic]
            size = skills_study.examples[skills_study.skills[skill]]
            assert chosen.weights == (merge_to_learn.heuristic(method, size, 9800),)


def test_a_heuristics_weight_that_is_tried_as_well_is_made_once(skills_study):
    """2,940 of 9,800 is exactly 0.3."""
    study = dataclasses.replace(skills_study, weights=(0.3, 0.6))
    made = [m for m in merge_to_learn.merges(study) if m.skills == ("coding",) and m.part == 100]
    arithmetic = [(m.name, m.heuristic) for m in made if m.method == "task_arithmetic"]
    assert arithmetic == [("task_arithmetic-0.3", True), ("task_arithmetic-0.6", False)]


def test_pairs_are_added_by_arithmetic_and_all_skills_by_every_method_that_adds(skills_study):
    study = dataclasses.replace(skills_study, methods=("ties", "task_arithmetic", "linear"))
    together = {}
    for merge in merge_to_learn.merges(study):
        if len(merge.skills) > 1:
            together.setdefault("+".join(merge.skills), []).append(merge.method)
            sizes = [study.examples[study.skills[skill]] for skill in merge.skills]
            assert merge.weights == tuple(size / 9800 for size in sizes) and merge.heuristic
    assert together.pop("science+safety+coding") == ["ties", "task_arithmetic"]
    assert set(together) == {"science+safety", "science+coding", "safety+coding"}
    assert set(map(tuple, together.values())) == {("task_arithmetic",)}


def test_the_shipped_studys_mixtures_are_there_and_have_the_sizes_it_says():
    asked, _ = configuration.load("Study", ["experiments/merge_to_learn.gin"], [])
    study = asked.of
    study.check_mixtures()
    tasks.register(vocabulary=study.vocabulary, source=study.source)
    for mixture, count in study.examples.items():
        found = seqio_pipeline.find("mixture", mixture, "train")
        records = 31_800 if mixture == study.general else count  # An epoch draws a part of it.
        assert sum(found.get_rate(task) for task in found.tasks) == records >= count, mixture


def test_settings_survive_the_disk(skills_study):
    fields = json.loads(json.dumps(study_results.describe(skills_study)))
    assert fields.pop("kind") == "skills"
    assert merge_to_learn.SkillsStudy.from_dict(fields) == skills_study


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"model": "t5"}, "expected a model"),
        ({"pretrain": 3}, "expected @Train()"),
        ({"skills": {}}, "expected a dict"),
        ({"skills": {"all": "skills_science"}}, "none may be called"),
        ({"skills": {"a+b": "skills_science"}}, "none may be called"),
        ({"evaluations": {"general": "skills_general_eval"}}, "nothing measures 'science'"),
        ({"examples": {"skills_general": 10}}, "'skills_science' has is missing"),
        ({"methods": ("slerp",)}, "slerp"),
        ({"methods": ("linear",)}, "task_arithmetic"),
        ({"weights": (0.0,)}, "not all in"),
        ({"weights": 0.5}, "expected a list"),
        ({"parts": (120,)}, "percents below 100"),
        ({"retrained_parts": (50,)}, "among the parts"),
        ({"epochs": 0}, "a positive integer"),
        ({"density": 1.0}, "less than 1"),
        ({"generative_score": "rouge"}, "rouge"),
    ],
)
def test_bad_settings_are_refused_by_name(skills_study, fields, said):
    with pytest.raises((ConfigError, UnknownNameError)) as refused:
        dataclasses.replace(skills_study, **fields)
    assert said in str(refused.value)


def test_the_papers_unit_of_cost_gives_the_papers_number_of_steps(skills_study):
    """517 steps for safety alone; retraining is five of the general mixture with it."""
    study = dataclasses.replace(
        skills_study,
        finetune=TrainSettings(mixture="any", steps=1, batch_size=128),
        skills={"safety": "skills_safety"},
        examples={"skills_general": GENERAL, "skills_safety": SIZES["safety"]},
        parts=(),
        retrained_parts=(),
    )
    (row,) = skill_scores.papers_steps(study).to_dict("records")
    assert row["ptm"] == row["cft"] and round(row["ptm"]) == 517
    assert math.isclose(row["rt"], (GENERAL + SIZES["safety"]) / 128)
    study = dataclasses.replace(study, parts=(20, 40, 60, 80))
    (row,) = skill_scores.papers_steps(study).to_dict("records")
    # 20 to 100 % of the data are three times all of it.
    assert math.isclose(row["rt"], (5 * GENERAL + 3 * SIZES["safety"]) / 128, rel_tol=1e-5)
    assert round(row["rt"]) == 12_311
