import collections
import dataclasses
import json

import pytest

from m2l import checkpoints, models
from m2l.data.shots import Shots
from m2l.errors import ConfigError, UnknownNameError
from m2l.merging import Recipe
from m2l.studies import merging_at_scale
from m2l.studies.run import StudyEvaluator


def kinds(plan):
    return collections.Counter(stage.kind for stage in plan)


def test_constituents_are_the_same_for_every_size_base_and_method(study):
    drawn = {}
    for merge in merging_at_scale.merges(study):
        drawn.setdefault((merge.count, merge.seed), set()).add(merge.categories)
    assert all(len(sets) == 1 for sets in drawn.values())
    assert all(len(c) == count for (count, _), sets in drawn.items() for c in sets)
    assert len({c for (count, _), sets in drawn.items() if count == 2 for c in sets}) > 1


def test_every_cell_of_the_grid_is_there(study):
    cells = {
        (m.size, m.base, m.recipe.method, m.count, m.seed) for m in merging_at_scale.merges(study)
    }
    assert len(cells) == 2 * 2 * 2 * 2 * 3


def test_merges_of_the_same_experts_in_the_same_way_are_made_once(study):
    made = {}
    for merge in merging_at_scale.merges(study):
        key = merge.size, merge.base, merge.recipe.method, merge.count
        made.setdefault(key, set()).add(merge.model)
    assert len(made["0.1M", "instruct", "average", 4]) == 1
    # Its draws of what to drop differ by seed.
    assert len(made["0.1M", "instruct", "dare_ties", 4]) == 3


def test_all_merges_of_a_set_of_experts_are_one_stage_that_reads_them_once(study):
    plan = study.stage_graph()
    stages = [stage for stage in plan if stage.kind == "merge"]
    read = [tuple(sorted(stage.inputs.values())) for stage in stages]
    assert len(set(read)) == len(read)
    planned = {f"{stage.name}/{name}" for stage in stages for name in stage.settings["recipes"]}
    assert planned == {f"results/{merge.model}" for merge in merging_at_scale.merges(study)}


def test_the_plan_reads_what_the_paper_compares(study):
    plan = study.stage_graph()
    assert kinds(plan)["train"] == 2 * (2 + 2 * (4 + 1))
    for merge in merging_at_scale.merges(study):
        stage = plan[merge.stage]
        assert stage.inputs["base"] == f"bases/{merge.size}/{merge.base}"
        # A merge of sentiment and another is not evaluated on what neither was trained on.
        expected = [*merge.categories, "natural_language_inference"]
        assert stage.settings["categories"] == expected


def test_settings_survive_the_disk(study):
    swept = dataclasses.replace(study, swept={"dare_ties": {"scale": (0.5, 1.0)}})
    for one in (study, swept):
        described = json.loads(json.dumps(one.to_dict()))
        assert merging_at_scale.ScalingStudy.from_dict(described) == one


def test_what_is_swept_is_chosen_by_a_stage_that_the_merges_read(study):
    swept = {"dare_ties": {"scale": (0.5, 1.0), "drop_rate": (0.1, 0.9)}}
    study = dataclasses.replace(study, swept=swept)
    plan = study.stage_graph()
    assert kinds(plan)["choose"] == 2 * 2 * 2
    for merge in merging_at_scale.merges(study):
        choice = plan[plan[merge.stage].inputs["choice"]]
        assert choice.name == f"choices/{merge.size}/{merge.base}/{merge.count}"
        assert list(merge.categories) in choice.settings["sets"]
        assert set(choice.settings["candidates"]) == {"dare_ties"}
    recipes = merging_at_scale.candidates(study, study.recipes[1])
    assert [(r.scale, r.drop_rate) for r in recipes] == [(0.5, 0.1), (0.5, 0.9), (1, 0.1), (1, 0.9)]
    assert merging_at_scale.candidates(study, study.recipes[0]) == [study.recipes[0]]


def test_a_changed_sweep_changes_choices_and_merges_and_nothing_trained(study):
    before = dataclasses.replace(study, swept={"dare_ties": {"scale": (0.5, 1.0)}}).stage_graph()
    after = dataclasses.replace(study, swept={"dare_ties": {"scale": (0.5, 2.0)}}).stage_graph()
    changed = {s.kind for s in after if after.digest(s.name) != before.digest(s.name)}
    same = {s.kind for s in after if after.digest(s.name) == before.digest(s.name)}
    assert (changed, same) == ({"choose", "merge"}, {"train", "evaluate"})


def test_a_size_more_changes_no_stage_of_the_others(study, tiny_config):
    larger = {**study.models, "1M": dataclasses.replace(tiny_config, d_model=64)}
    before, after = (
        dataclasses.replace(study, models=m).stage_graph() for m in (study.models, larger)
    )
    assert len(after) == len(before) * 3 // 2
    assert all(after.digest(stage.name) == before.digest(stage.name) for stage in before)


def test_a_given_checkpoint_takes_a_stages_place(study, road):
    name = "experts/0.1M/instruct/sentiment"
    trained = checkpoints.read_manifest(checkpoints.resolve(road / "sentiment")).model
    sized = dataclasses.replace(study, models={"0.1M": models.from_dict(trained)})
    given = dataclasses.replace(sized, given={name: str(road / "sentiment")}).resolved()
    given.check_mixtures()
    plan = given.stage_graph()
    assert plan[name].kind == "given" and not plan[name].inputs
    assert plan[name].settings["digest"]
    wrong = dataclasses.replace(study, given={"experts/0.1M/sentiment": str(road / "sentiment")})
    with pytest.raises(UnknownNameError, match=r"experts/0\.1M/"):
        wrong.check_mixtures()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"expert_counts": (5,)}, "5 experts"),
        ({"categories": ()}, "expected a list"),
        ({"seeds": (1, 1)}, "twice"),
        ({"seeds": (-1,)}, "0 or more"),
        ({"expert_counts": (2.5,)}, "list of integers"),
        ({"expert_counts": (2, 2)}, "twice"),
        ({"recipes": (Recipe(method="ties"), Recipe(method="ties", scale=0.5))}, "twice"),
        ({"recipes": ("ties",)}, "list of Recipe"),
        ({"pretrain": "quick"}, "expected @Train"),
        ({"split": 3}, "expected a string"),
        ({"models": {}}, "configurations by size"),
        ({"models": {"1M": "t5"}}, "not a model"),
        ({"max_prompts": -1}, "max_prompts"),
        ({"swept": {"dare_ties": {"drop_rate": (1.5,)}}}, "drop_rate must be"),
        ({"swept": {"dare_ties": {}}}, "values by setting"),
        ({"swept": {"dare_ties": {"scale": ()}}}, "no values"),
    ],
)
def test_a_bad_setting_is_refused(study, change, said):
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(study, **change)


@pytest.mark.parametrize(
    ("swept", "said"),
    [
        ({"tyes": {"scale": (1.0,)}}, "'tyes'"),
        ({"average": {"scale": (1.0,)}}, "'scale'"),
        ({"dare_ties": {"drop_rates": (0.5,)}}, "'drop_rate'"),
    ],
)
def test_an_unknown_name_in_a_sweep_is_refused(study, swept, said):
    with pytest.raises(UnknownNameError, match=said):
        dataclasses.replace(study, swept=swept)


def test_what_stands_for_free_text_is_known_and_decides_evaluations_alone(study):
    with pytest.raises(UnknownNameError, match=r"generative_score 'decode'.*'decoding'"):
        dataclasses.replace(study, generative_score="decode")
    assert study.generative_score == "decoding"
    before = study.stage_graph()
    for settings in ({"generative_score": "likelihood"}, {"shots": 2}):
        after = dataclasses.replace(study, **settings).stage_graph()
        changed = {s.kind for s in after if after.digest(s.name) != before.digest(s.name)}
        same = {s.kind for s in after if after.digest(s.name) == before.digest(s.name)}
        assert (changed, same) == ({"evaluate", "merge"}, {"train"})


@pytest.mark.filterwarnings("ignore:.*shots are left out")
def test_shots_of_a_study_are_written_where_there_are_any_and_read_by_its_evaluations(study):
    assert "shots" not in study.to_dict()
    with_shots = dataclasses.replace(study, shots=2, shots_seed=1)
    assert merging_at_scale.ScalingStudy.from_dict(with_shots.to_dict()) == with_shots
    with pytest.raises(ConfigError, match="without shots none are drawn"):
        dataclasses.replace(study, shots_seed=1)
    graph = dataclasses.replace(with_shots, max_prompts=1, max_examples=2).stage_graph()
    [stage, *_] = [stage for stage in graph if stage.kind == "evaluate"]
    described = models.to_dict(study.models["0.1M"])
    evaluator = StudyEvaluator(stage.settings, described, choosing=False)
    loaded = evaluator._evaluator.tasks
    assert {task.shots for task in loaded} == {Shots(2, 1)}
    assert any(example.shots for task in loaded for example in task.examples)


def test_names_are_looked_up_before_anything_is_trained(study):
    study.check_mixtures()
    with pytest.raises(UnknownNameError, match="'sentiment'"):
        dataclasses.replace(study, held_out=("sentimant",)).check_mixtures()
    with pytest.raises(ConfigError, match="'imdb' is not a task category"):
        dataclasses.replace(study, categories=("imdb", "sentiment", *"ab")).check_mixtures()
