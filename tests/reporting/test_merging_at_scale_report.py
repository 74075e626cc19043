"""From a study's published results to its report, with scores that can be divided by hand."""

import csv
import dataclasses

import pytest

from m2l.errors import DataError
from m2l.evaluation.results import Result
from m2l.merging import Recipe
from m2l.reporting import page
from m2l.studies import merging_at_scale, study_results
from m2l.training.settings import TrainSettings

CATEGORIES, HELD_OUT = ("sentiment", "summarization", "paraphrase"), ("coreference",)
RECIPES = (Recipe(method="average"), Recipe(method="task_arithmetic", scale=0.4))
EXPERT, BASE = 80.0, 40.0


def result(task, category, score, digest):
    return Result(
        task=task,
        dataset=task,
        category=category,
        held_out=category in HELD_OUT,
        kind="rank",
        metric="accuracy",
        score=score,
        metrics={"accuracy": score, "chance": 25.0},
        count=1,
        ties=0,
        truncated=0,
        seconds=0.0,
        model_digest=digest,
        task_digest=task,
    )


def scored(model, held_in, held_out=None, categories=CATEGORIES):
    """Results by task: one score on every held-in category, another on the held-out one."""
    found = {name: result(name, name, held_in, model) for name in categories}
    if held_out is not None:
        found |= {name: result(name, name, held_out, model) for name in HELD_OUT}
    return found


def merged_score(merge):
    """40 % for average, 60 % for task arithmetic; 10 more if instruction-tuned; 5 more if large."""
    score = 40.0 if merge.recipe.method == "average" else 60.0
    return score + 10 * (merge.base == "instruct") + 5 * (merge.size == "2M")


@pytest.fixture(scope="module")
def published(tiny_config, tmp_path_factory):
    settings = TrainSettings(mixture="t0_held_in", steps=3)
    study = merging_at_scale.ScalingStudy(
        models={"1M": tiny_config, "2M": dataclasses.replace(tiny_config, d_ff=64)},
        **dict.fromkeys(("pretrain", "instruct", "expert", "multitask"), settings),
        categories=CATEGORIES,
        held_out=HELD_OUT,
        recipes=RECIPES,
        swept={"task_arithmetic": {"scale": (0.4, 0.8)}},
        expert_counts=(2, 3),
        seeds=(0, 1),
    )
    results, recipes, choices = {}, {}, {}
    for size in study.models:
        for base in merging_at_scale.BASES:
            results[f"bases/{size}/{base}"] = scored("base", 20.0, BASE)
            results[f"multitask/{size}/{base}"] = scored("together", 72.0, 60.0)
            for name in CATEGORIES:
                expert = scored("expert", EXPERT, categories=(name,))
                results[f"experts/{size}/{base}/{name}"] = expert
            for count in study.expert_counts:
                points = [{"settings": {"scale": s}, "score": s} for s in (0.4, 0.8)]
                record = {"points": points, "chosen": {"scale": 0.8}}
                choices[f"choices/{size}/{base}/{count}"] = {"task_arithmetic": record}
    for merge in merging_at_scale.merges(study):
        score = merged_score(merge)
        results[merge.model] = scored("merge", score, BASE + 4, merge.categories)
        recipes[merge.model] = merge.recipe.to_dict()
    out = tmp_path_factory.mktemp("published")
    seconds = {"bases/1M/pretrained": 90.0}
    study_results.publish(
        study_results.StudyResults(study, results, recipes, choices, seconds), out
    )
    return out


@pytest.fixture(scope="module")
def report(published):
    return page.write(published).parent


def rows(report, name):
    with (report / "tables" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_performance_is_in_units_of_the_expert_and_of_the_base(report):
    expected = {"average": 40.0, "task_arithmetic": 60.0, "multitask": 72.0}
    table = rows(report, "performance")
    assert len(table) == 2 * 2 * 3 * 2
    for row in table:
        score = expected[row["method"]]
        if row["method"] != "multitask":
            score += 10 * (row["base"] == "instruct") + 5 * (row["size"] == "2M")
        assert float(row["held_in"]) == pytest.approx(score / EXPERT)
        ratio = 60.0 / BASE if row["method"] == "multitask" else (BASE + 4) / BASE
        assert float(row["held_out"]) == pytest.approx(ratio)
        # Every dataset says the same, so there is nothing uncertain.
        assert float(row["held_in_low"]) == pytest.approx(float(row["held_in_high"]))


def test_the_papers_tables_hold_the_same_numbers_side_by_side(report):
    table = {row["method"]: row for row in rows(report, "table1_held_in_instruct")}
    assert list(table) == ["Average", "Task Arithmetic", "Multitask"]
    assert list(table["Average"])[1:] == ["1M, 2", "1M, 3", "2M, 2", "2M, 3"]
    assert float(table["Average"]["2M, 3"]) == pytest.approx(55 / EXPERT)


def test_the_page_tells_findings_choices_and_models(report):
    html = (report / "index.html").read_text().replace("<wbr>", "")
    assert html.count('<section id="finding-') == 5
    assert "bases/2M/instruct" in html and "scale 0.4" in html
    assert 'id="figure-sweeps_instruct"' in html
    for name in ("study.json", "results.parquet", "records.json"):
        assert f'href="../{name}"' in html


def test_the_command_prints_a_table_and_writes_the_same_bytes_again(
    published, report, run_m2l, capfd
):
    before = {p: p.read_bytes() for p in report.rglob("*") if p.is_file()}
    (report / "index.html").unlink()
    assert run_m2l("report", published) == 0
    assert {p: p.read_bytes() for p in report.rglob("*") if p.is_file()} == before
    printed = capfd.readouterr().out
    assert "Task Arithmetic" in printed and "held-out, 3" in printed


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"study\.json is missing"):
        page.write(tmp_path)
