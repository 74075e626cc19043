import dataclasses

import pytest

from m2l import models, tasks
from m2l.studies import run
from m2l.training import resources


@pytest.fixture(scope="module")
def plan(study):
    tasks.use("microworld")
    swept = {"dare_ties": {"scale": (0.5, 1.0)}}
    return dataclasses.replace(study, swept=swept, max_prompts=2, max_examples=10).stage_graph()


def test_training_costs_its_steps_and_the_disk_of_what_it_keeps(plan, study):
    config, settings = study.models["0.4M"], study.expert
    cost = run.stage_cost(plan["experts/0.4M/instruct/sentiment"], plan)
    rows = settings.batch_size, settings.input_length, settings.target_length
    assert cost.flops == 3 * resources.step_flops(config, *rows)
    assert cost.disk == 4 * models.parameters(config) * settings.keep


def test_scoring_costs_a_third_of_a_training_step_on_the_same_tokens(study):
    config = study.models["0.4M"]
    assert resources.evaluation_flops(config, 8, 96, 32) == pytest.approx(
        resources.step_flops(config, 8, 96, 32) / 3
    )


def test_evaluations_cost_by_their_tasks_and_examples(plan, study):
    lengths = study.expert.input_length, study.expert.target_length
    one = resources.evaluation_flops(study.models["0.1M"], 1, *lengths, choices=4)
    # Sentiment has two datasets.
    expert = run.stage_cost(plan["results/experts/0.1M/instruct/sentiment"], plan)
    assert expert.flops == pytest.approx(one * 10 * 4)
    merge = next(stage for stage in plan if stage.kind == "merge" and "0.1M" in stage.name)
    made = run.stage_cost(merge, plan)
    per_model = run.stage_cost(
        dataclasses.replace(merge, settings={**merge.settings, "recipes": {"one": {}}}), plan
    )
    assert made.flops == pytest.approx(per_model.flops * len(merge.settings["recipes"]))


def test_choosing_costs_by_its_candidates(plan):
    stage = plan["choices/0.1M/instruct/2"]
    cost = run.stage_cost(stage, plan)
    candidates = stage.settings["candidates"]
    twice = {**stage.settings, "candidates": {**candidates, "ties": candidates["dare_ties"]}}
    assert len(candidates["dare_ties"]) == 2
    more = run.stage_cost(dataclasses.replace(stage, settings=twice), plan)
    assert more.flops == pytest.approx(2 * cost.flops)


def test_time_is_arithmetic_over_the_share_of_the_peak_that_is_reached():
    assert run.cost_seconds(run.Cost(flops=8e12, disk=0), peak=1e12) == pytest.approx(8 / 0.4)


@pytest.mark.parametrize(("limit", "share"), [(1, 1 / 3), (2, 2 / 3), (3, 1), (4, 1), (0, 1)])
def test_prompts_are_dealt_over_the_parts_of_a_dataset(limit, share):
    tasks.use("microworld")
    dealt = run.prompts("anli", limit)
    assert list(dealt.values()) == pytest.approx([share] * len(dealt))
    rounds = [name.rsplit("_", 1)[1] for name in dealt]
    assert rounds[:3] == ["r1", "r2", "r3"]
    # Different prompts, as long as there are any.
    assert len({name.rsplit("_", 1)[0] for name in list(dealt)[:3]}) == 3
    every = [name for name in tasks.tasks_in("anli") if tasks.info(name).kind != "train"]
    assert len(dealt) == (max(limit, 3) if limit else len(every)) and set(dealt) <= set(every)


def test_a_dataset_without_parts_has_its_first_prompts():
    tasks.use("microworld")
    dealt = run.prompts("imdb", 2)
    assert list(dealt) == list(tasks.tasks_in("imdb"))[:2] and set(dealt.values()) == {1.0}
