"""From results to normalised frame: by hand, and against the definition written out."""

import dataclasses
import itertools
from statistics import fmean

import numpy as np
import pandas as pd
import pytest

from m2l.errors import DataError, EvaluationError
from m2l.evaluation.results import normalized
from m2l.studies import findings, merging_at_scale, normalized_performance, study_results


@pytest.fixture(scope="module")
def found(finished_study):
    return study_results.load(finished_study)


@pytest.fixture(scope="module")
def replicates(found):
    return normalized_performance.Replicates(normalized_performance.grid(found))


def test_held_in_is_in_units_of_the_expert_and_held_out_of_the_base(found):
    cells = normalized_performance.cells(normalized_performance.grid(found))
    assert len(cells) == 2 * 2 * (2 * 2 * 3 + 2 * 3)
    for row in cells.itertuples():
        names = row.constituents.split("+")
        if row.method == "multitask":
            assert row.held_in == pytest.approx(60 / 80)
            assert row.held_out == pytest.approx(75 / 50)
        else:
            with_sentiment = "sentiment" in names
            expected = ((len(names) - with_sentiment) * 0.5 + with_sentiment) / len(names)
            assert row.held_in == pytest.approx(expected)
            assert row.held_out == pytest.approx(1.02 if row.base == "instruct" else 1.0)


def test_performance_is_the_mean_over_seeds(found, replicates):
    cells = normalized_performance.cells(normalized_performance.grid(found))
    frame = normalized_performance.performance(replicates)
    assert len(frame) == 2 * 2 * 3 * 2
    for row in frame.itertuples():
        here = cells
        for name in normalized_performance.CELL:
            here = here[here[name] == getattr(row, name)]
        assert row.held_in == pytest.approx(fmean(here["held_in"]))
        assert row.held_in_low - 1e-9 <= row.held_in <= row.held_in_high + 1e-9
        # Every held-out ratio is the same, so no draw of datasets and seeds can change it.
        assert row.held_out_low == pytest.approx(row.held_out_high)


def test_the_papers_definition_worked_by_hand():
    """Two categories of two and one datasets, two prompts of the first: means of means."""
    # a: prompts 30 and 50 of the expert's 80 and 80 -> 40/80; b: 90/60; category: mean 1.0
    # c: 20/80; over categories: (1.0 + 0.25) / 2
    ratios = {("x", "a"): 0.5, ("x", "b"): 1.5, ("y", "c"): 0.25}
    units = normalized_performance.Units.from_cells([ratios, {("y", "c"): 0.5}])
    once = units.performance(np.ones((1, 3)))
    np.testing.assert_allclose(once, [[0.625, 0.5]])
    # If b is drawn twice and a not at all, x has b alone, with the weight of two datasets.
    drawn = units.performance(np.array([[0, 2, 1]]))
    np.testing.assert_allclose(drawn[0, 0], (2 * 0.5 * 1.5 + 0.25) / 2)
    assert np.isinf(units.performance(np.array([[2, 1, 0]]))[0, 1])


def test_units_agree_with_normalized_of_the_same_results(found):
    study = found.study
    merge = next(iter(merging_at_scale.merges(study)))
    reference = {
        result.task: result
        for category in study.categories
        for result in found.of(f"experts/{merge.size}/{merge.base}/{category}")
    }
    expected = normalized(found.of(merge.model, merge.categories), reference)
    cells = normalized_performance.cells(normalized_performance.grid(found))
    assert cells.iloc[0]["held_in"] == pytest.approx(expected)


def test_a_bootstrap_of_datasets_has_the_error_of_their_mean():
    rng = np.random.default_rng(1)
    values = rng.normal(1, 0.2, 400)
    ratios = {("x", str(i)): value for i, value in enumerate(values)}
    frame = pd.DataFrame(
        {"size": "1M", "base": "instruct", "method": "ties", "experts": [2], "seed": 0}
    )
    units = normalized_performance.Units.from_cells([ratios])
    of = normalized_performance.Replicates(normalized_performance.Grid(frame, units, units))
    low, high = normalized_performance.interval(of.held_in[:, 0, 0, 0, 0])
    error = 1.96 * values.std() / np.sqrt(len(values))
    assert of.held_in[0, 0, 0, 0, 0] == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.003)


def test_a_ratio_to_nothing_is_told_and_not_left_out(found):
    results = {model: dict(of) for model, of in found.results.items()}
    name = "experts/0.1M/instruct/sentiment"
    results[name] = {
        task: dataclasses.replace(result, score=0.0) for task, result in results[name].items()
    }
    cells = normalized_performance.cells(
        normalized_performance.grid(dataclasses.replace(found, results=results))
    )
    here = cells[(cells["size"] == "0.1M") & (cells["base"] == "instruct")]
    with_it = here["constituents"].str.contains("sentiment")
    assert here[with_it]["held_in"].isna().all() and here[~with_it]["held_in"].notna().all()


def test_what_stands_beside_the_grid(found):
    experts = normalized_performance.experts(found)
    assert len(experts) == 2 * 2 * 4
    instruct = experts[experts["base"] == "instruct"]
    assert set(zip(instruct["before"], instruct["expert"], instruct["multitask"], strict=True)) == {
        (40.0, 80.0, 60.0)
    }
    held_out = normalized_performance.held_out(found)
    assert set(held_out["chance"]) == {50.0} and set(held_out["multitask"]) == {75.0}
    lineage = study_results.lineage(found).set_index("model")
    merge = next(m for m in merging_at_scale.merges(found.study) if m.recipe.method == "dare_ties")
    assert lineage.loc[merge.model, "recipe"]["drop_rate"] == 0.5
    assert lineage.loc[merge.model, "made_of"][0] == f"bases/{merge.size}/{merge.base}"
    assert len(lineage) == len(found.results)


def test_a_published_study_says_what_the_study_says(found, tmp_path):
    study_results.publish(found, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "records.json",
        "results.parquet",
        "study.json",
    ]
    again = study_results.load(tmp_path)
    assert again.study == found.study and again.recipes == found.recipes
    pd.testing.assert_frame_equal(
        normalized_performance.cells(normalized_performance.grid(again)),
        normalized_performance.cells(normalized_performance.grid(found)),
    )
    before = {
        task: dataclasses.asdict(r) for of in found.results.values() for task, r in of.items()
    }
    after = {task: dataclasses.asdict(r) for of in again.results.values() for task, r in of.items()}
    assert before == after


def test_a_study_that_is_not_finished_is_refused(found, tmp_path):
    with pytest.raises(DataError, match="holds no study"):
        study_results.load(tmp_path)
    study_results.publish(found, tmp_path)
    (tmp_path / "results.parquet").unlink()
    with pytest.raises(DataError, match="stages are not done"):
        study_results.load(tmp_path)
    with pytest.raises(EvaluationError, match="no results of"):
        found.of("merges/none")


# --- the findings ---


def made_up(held_in, held_out=lambda *cell: 1.0, noise=0.0):
    """A grid of 3 sizes, 2 bases, 2 methods (and multitask), 3 counts: scores by a function."""
    rng = np.random.default_rng(0)
    rows, of_in, of_out = [], [], []
    grid = itertools.product(range(3), (0, 1), range(3), range(3), range(3))
    for size, base, method, count, seed in grid:
        name = ("average", "ties", "multitask")[method]
        rows.append(
            {
                "size": f"{size}M",
                "base": merging_at_scale.BASES[base],
                "method": name,
                "experts": 2 + 2 * count,
                "seed": seed,
            }
        )
        for found, score in ((of_in, held_in), (of_out, held_out)):
            value = score(size, base, method, count)
            draws = rng.normal(0, noise, 8) if noise else np.zeros(8)
            found.append({("x", str(i)): value + draws[i] for i in range(8)})
    frame = pd.DataFrame(rows)
    units = (
        normalized_performance.Units.from_cells(of_in),
        normalized_performance.Units.from_cells(of_out),
    )
    grid = normalized_performance.Replicates(normalized_performance.Grid(frame, *units))
    return findings.scaling_findings(grid, {"0M": 10**6, "1M": 3 * 10**6, "2M": 9 * 10**6})


def verdicts(found):
    return [finding.verdict for finding in found]


def test_a_world_like_the_papers_supports_its_findings():
    def held_in(size, base, method, count):
        return (
            0.6 + 0.2 * base + 0.05 * size - 0.1 * count / (1 + size) + 0.02 * method / (1 + size)
        )

    def held_out(size, base, method, count):
        return 1.05 + 0.01 * count

    found = made_up(held_in, held_out)
    assert verdicts(found) == ["supported"] * 5
    assert found[0].value == pytest.approx(0.2)
    assert found[1].value == pytest.approx(0.05 + 0.1 * 1 / 3 - 0.01 / 3)
    assert found[2].value == pytest.approx(0.06)
    # Slopes of -0.05, -0.025 and -0.0167 an expert at the three sizes.
    assert found[3].value == pytest.approx((0.05 - 0.05 / 3) / 2)
    assert found[4].value == pytest.approx(0.02 - 0.02 / 3)
    assert "36 of 36" not in found[0].sentence and "18 of 18" in found[0].sentence


def test_a_world_upside_down_contradicts_them():
    def held_in(size, base, method, count):
        return 0.9 - 0.2 * base - 0.05 * size - 0.01 * count * (1 + size) + 0.02 * method * size

    found = made_up(held_in, lambda *cell: 0.9)
    assert verdicts(found) == ["contradicted"] * 5


def test_noise_decides_nothing():
    found = made_up(lambda *cell: 0.8, lambda *cell: 1.0, noise=0.1)
    assert "undecided" in verdicts(found)
    for finding in found[:4]:
        low, high = finding.interval
        assert low < finding.value < high


def test_a_study_of_one_size_says_what_it_cannot_test(study, finished_study):
    found = study_results.load(finished_study)
    one = dict(list(study.models.items())[:1])
    found = dataclasses.replace(found, study=dataclasses.replace(study, models=one))
    grid = normalized_performance.Replicates(normalized_performance.grid(found))
    assert verdicts(findings.scaling_findings(grid, {"0.1M": 10**5})) == [
        *("undecided", "not tested", "supported", "not tested", "not tested")
    ]
