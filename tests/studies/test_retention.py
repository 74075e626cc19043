"""The prediction of what merges keep, against least squares and made-up studies."""

import json

import numpy as np
import pandas as pd
import pytest

from m2l.errors import ConfigError, DataError, EvaluationError
from m2l.merging import Recipe
from m2l.merging.interference import Measures
from m2l.studies import retention, study_results
from m2l.studies.retention import Retention


def law(measures):
    loss = 0.1 * np.log2(measures.experts)
    return 0.4 + (0.6 - loss) * measures.projection - 0.02 * measures.interference


def drawn(count=60, noise=0.0, sets=6):
    """Merges that a law made, of sets of experts of two studies."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        measures = Measures(2.0 + number % sets, 0.01, 0.2, 0.5, *rng.uniform(0, 1, 2))
        place = {"study": f"study_{number % 2}", "base": "1M/instruct", "method": "ties"}
        row = place | {"constituents": str(number % sets), **measures._asdict()}
        rows.append(row | {"held_in": law(measures) + noise * rng.standard_normal()})
    return pd.DataFrame(rows)


def test_ridge_is_least_squares_with_a_row_for_each_penalty():
    rng = np.random.default_rng(1)
    features, targets = rng.normal(2, [1, 5, 0], (40, 3)), rng.normal(size=40)
    intercept, coefficients = retention.ridge(features, targets)
    scaled = (features - features.mean(0)) / np.array([*features[:, :2].std(0), 1.0])
    rows = np.concatenate([scaled, np.sqrt(40 * retention.RIDGE) * np.eye(3)])
    wanted = np.concatenate([targets - targets.mean(), np.zeros(3)])
    weights = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    np.testing.assert_allclose(
        intercept + features @ coefficients, scaled @ weights + targets.mean(), atol=1e-12
    )
    assert coefficients[2] == 0  # It is constant.


def test_a_law_is_recovered_and_its_error_is_that_of_what_was_left_out():
    fitted = retention.fit(drawn())
    measures = Measures(4.0, 0.01, 0.2, 0.5, 0.5, 0.5)
    share, low, high = fitted.predict(measures)
    # The penalty shrinks coefficients by about a thousandth.
    assert share == pytest.approx(law(measures), abs=2e-3)
    assert low <= share <= high and high - low < 0.01

    frame = drawn(noise=0.05)
    fitted = retention.fit(frame)
    features = np.array([retention._features(row) for row in frame.itertuples()])
    errors, of_mean = [], []
    for label in frame["constituents"].unique():
        out = (frame["constituents"] == label).to_numpy()
        rest = frame["held_in"][~out]
        design = np.column_stack([features, np.ones(len(frame))])
        weights = np.linalg.lstsq(design[~out], rest, rcond=None)[0]
        errors += list(np.abs(frame["held_in"][out] - design[out] @ weights))
        of_mean += list(np.abs(frame["held_in"][out] - rest.mean()))
    error = fitted.errors["experts"]
    assert error.error == pytest.approx(np.mean(errors), rel=0.01)
    assert error.error_of_mean == pytest.approx(np.mean(of_mean), rel=1e-9)
    assert error.within == pytest.approx(np.quantile(errors, 0.9), rel=0.02)
    assert error.error < error.error_of_mean
    # Two bases and two studies are too few to take their error for the one to expect.
    assert {n: e.groups for n, e in fitted.errors.items()} == {"experts": 6, "base": 2, "study": 2}
    assert fitted.left_out == "experts"


def test_a_prediction_keeps_to_what_was_fitted_and_says_what_lies_outside():
    fitted = retention.fit(drawn())
    measures = Measures(40.0, 0.01, 0.2, 0.5, 1.0, 30.0)
    share, low, _ = fitted.predict(measures)
    assert share == drawn()["held_in"].min() and low >= 0
    outside = fitted.outside(measures)
    assert set(outside) == {"experts", "projection", "interference"}
    assert outside["experts"] == (40.0, 2.0, 7.0)


def test_merges_of_one_set_of_experts_are_refused():
    frame = drawn(sets=1).assign(study="one")
    with pytest.raises(EvaluationError, match="nothing could be left out"):
        retention.fit(frame)


def test_a_study_gives_each_merge_what_it_kept_and_the_recipe_it_was_made_by(
    finished_study, monkeypatch
):
    measured = []

    def measure(base, experts, recipes):
        measured.append((base.relative_to(finished_study).as_posix(), len(experts)))
        return [Measures(len(experts), 0, 0, 0, len(recipe.method), 0) for recipe in recipes]

    monkeypatch.setattr(retention, "measure", measure)
    frame, chosen = retention.collect(finished_study)
    # Experts are measured once for each set: of four experts there is one, for three seeds.
    assert len(measured) == len(set(frame["base"] + frame["constituents"]))
    assert {base for base, _ in measured} == {f"bases/{base}" for base in frame["base"]}
    for row in frame.itertuples():
        # "sentiment" keeps all, the others a half of what their expert has.
        kept = [1.0 if name == "sentiment" else 0.5 for name in row.constituents.split("+")]
        assert row.held_in == pytest.approx(np.mean(kept))
        assert row.experts == len(kept) and row.projection == len(row.method)
    whole = frame[frame["experts"] == 4].groupby(["base", "method"]).size()
    # The average of all is one model whatever the seed; drops at random are three.
    assert set(whole.xs("average", level="method")) == {1}
    assert set(whole.xs("dare_ties", level="method")) == {3}
    assert {method: set(by_count) for method, by_count in chosen.items()} == {
        "average": {"2", "4"},
        "dare_ties": {"2", "4"},
    }
    fitted = retention.fit(frame, chosen)
    assert fitted.recipes_for(9) == [Recipe("average"), Recipe("dare_ties", drop_rate=0.5)]


def test_settings_that_were_chosen_from_count_by_what_each_set_kept(study, finished_study):
    loaded = study_results.load(finished_study)
    swept = {"dare_ties": {"scale": (0.5, 2.0)}}
    points = [{"by_set": [0.3], "score": 0.3}, {"by_set": [0.7], "score": 0.7}]
    names = next(iter(retention._scored(loaded)[0]))
    record = {"dare_ties": {"points": points, "sets": [list(names[2])]}}
    import dataclasses

    changed = dataclasses.replace(
        loaded,
        study=dataclasses.replace(study, swept=swept),
        choices={f"choices/{names[0]}/{names[1]}/{len(names[2])}": record},
    )
    before, after = retention._scored(loaded)[0][names], retention._scored(changed)[0][names]
    added = [(recipe.scale, value) for recipe, value in after[len(before) :]]
    assert added == [(0.5, 0.3), (2.0, 0.7)]


def test_what_was_fitted_is_written_and_read(tmp_path):
    fitted = retention.fit(drawn(noise=0.05), {"average": {"2": Recipe("average").to_dict()}})
    fitted.write(tmp_path / "own.json")
    assert Retention.read(tmp_path / "own.json") == fitted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: {"kind": "recipe"}, "found another JSON object"),
        (lambda fields: fields | {"coefficients": {"norm": 1.0}}, "features, ranges or errors"),
        (lambda fields: fields | {"ranges": {"norm": [0, 1]}}, "features, ranges or errors"),
        (lambda fields: fields | {"errors": {}}, "features, ranges or errors"),
        (lambda fields: fields | {"errors": {"experts": {"error": 1}}}, "missing or wrong"),
        (lambda fields: fields | {"ranges": 3}, "missing or wrong"),
    ],
)
def test_a_file_that_is_no_prediction_is_refused(tmp_path, change, message):
    file = tmp_path / "own.json"
    retention.fit(drawn()).write(file)
    fields = json.loads(file.read_text())
    del fields["checksum"]
    file.write_text(json.dumps(change(fields)))
    with pytest.raises(DataError, match=message):
        Retention.read(file)


def test_studies_that_cannot_be_measured_are_refused(
    finished_study, skills_study, skills_records, tmp_path
):
    study_results.publish(study_results.load(finished_study), tmp_path / "published")
    with pytest.raises(DataError, match="without checkpoints to measure"):
        retention.collect(tmp_path / "published")
    with pytest.raises(DataError, match="holds no study"):
        retention.collect(tmp_path)
    study_results.publish(skills_records(), tmp_path / "skills")
    with pytest.raises(ConfigError, match="expected a study over numbers of experts"):
        retention.collect(tmp_path / "skills")


def test_the_prediction_that_ships_is_better_than_the_mean():
    fitted = Retention.read()
    error = fitted.errors["experts"]
    assert error.error < error.error_of_mean
    assert [recipe.method for recipe in fitted.recipes_for(3)] == [
        *("average", "task_arithmetic", "dare_ties", "ties")
    ]
