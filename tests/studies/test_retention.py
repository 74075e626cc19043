"""The prediction of what merges keep, against least squares and made-up studies."""

import dataclasses
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
    return 0.4 + (0.6 - loss) * measures.projection - 2 * measures.interference * measures.norm


def drawn(count=60, noise=0.0, sets=6):
    """Merges that a law made, of sets of experts of two bases."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        measures = Measures(2.0 + 2 * (number % 3), 0.01, 0.2, 0.5, *rng.uniform(0, 1, 2))
        place = {"study": "one", "base": f"{2 * number // count}M/instruct", "method": "ties"}
        row = place | {"constituents": str(number % sets), **measures._asdict()}
        rows.append(row | {"held_in": law(measures) + noise * rng.standard_normal()})
    return pd.DataFrame(rows)


def test_ridge_is_least_squares_with_a_row_for_each_penalty():
    rng = np.random.default_rng(1)
    features, targets = rng.normal(2, [1, 5, 0], (40, 3)), rng.normal(size=40)
    weights = rng.uniform(1, 3, 40)
    weights /= weights.sum()
    intercept, coefficients = retention.ridge(features, targets, weights)
    # NumPy's own weighted mean and covariance; the last column is constant.
    centre = np.average(features, axis=0, weights=weights)
    spread = np.sqrt(np.diagonal(np.cov(features.T, aweights=weights, ddof=0)))
    scaled = (features - centre) / np.array([*spread[:2], 1.0])
    middle, root = np.average(targets, weights=weights), np.sqrt(weights)
    rows = np.concatenate([root[:, None] * scaled, np.sqrt(retention.RIDGE) * np.eye(3)])
    wanted = np.concatenate([root * (targets - middle), np.zeros(3)])
    solved = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    fitted = intercept + features @ coefficients
    np.testing.assert_allclose(fitted, scaled @ solved + middle, atol=1e-12)
    assert coefficients[2] == pytest.approx(0, abs=1e-12)


def test_a_law_is_recovered_and_its_error_is_that_of_what_was_left_out(monkeypatch):
    monkeypatch.setattr(retention, "RIDGE", 1e-12)
    measures = Measures(4.0, 0.01, 0.2, 0.5, 0.5, 0.5)
    share, low, high = retention.fit(drawn()).predict(measures)
    assert share == pytest.approx(law(measures), abs=1e-6)
    assert low <= share <= high and high - low < 0.1

    frame = drawn(noise=0.05)
    fitted = retention.fit(frame)
    errors, mean_errors = [], []
    for _, left_out in frame.groupby(["base", "constituents"]):
        out = frame.index.isin(left_out.index)
        least, most = frame[~out].min(numeric_only=True), frame[~out].max(numeric_only=True)
        m = frame.select_dtypes("number").clip(least, most, axis=1)
        columns = [m.projection, m.projection * np.log2(m.experts), m.interference]
        design = np.column_stack([*columns, np.ones(len(m))])
        weights = np.linalg.lstsq(design[~out], frame["held_in"][~out], rcond=None)[0]
        predicted = np.clip(design[out] @ weights, least["held_in"], most["held_in"])
        errors += list(np.abs(frame["held_in"][out] - predicted))
        mean_errors += list(np.abs(frame["held_in"][out] - frame["held_in"][~out].mean()))
    error = fitted.errors["experts"]
    assert error.error == pytest.approx(np.mean(errors), rel=1e-6)
    assert error.error_of_mean == pytest.approx(np.mean(mean_errors), rel=1e-9)
    # Of 60 the 54th, or by rounding of weights the 55th.
    assert any(error.within == pytest.approx(value) for value in sorted(errors)[53:55])
    assert error.error < error.error_of_mean
    # Two bases are too few to take their error for the one to expect.
    assert {name: each.groups for name, each in fitted.errors.items()} == {"experts": 12, "base": 2}
    assert fitted.left_out == "experts"


def test_each_study_counts_the_same_however_many_merges_it_has():
    frame = drawn(noise=0.05)
    frame["study"] = frame["base"]
    twice = pd.concat([frame, frame[frame["base"] == "1M/instruct"]], ignore_index=True)
    once, again = retention.fit(frame), retention.fit(twice)
    assert again.coefficients == pytest.approx(once.coefficients)
    for name, error in once.errors.items():
        assert again.errors[name].error == pytest.approx(error.error)
        assert again.errors[name].error_of_mean == pytest.approx(error.error_of_mean)


def test_a_prediction_keeps_to_what_was_fitted_and_says_what_lies_outside():
    frame = drawn()
    fitted = retention.fit(frame)
    far = Measures(40.0, 0.01, 0.2, 0.5, frame["projection"].max(), 30.0)
    near = far._replace(experts=6.0, interference=frame["interference"].max())
    assert fitted.predict(far) == fitted.predict(near)
    assert fitted.outside(far) == {
        "experts": (40.0, 2.0, 6.0),
        "interference": (30.0, frame["interference"].min(), frame["interference"].max()),
    }
    # By less than a tenth nothing is said.
    assert fitted.outside(near._replace(experts=6.5)) == {}
    # No merge that was fitted has kept so little.
    least = near._replace(projection=0.0, experts=2.0)
    assert law(least) < frame["held_in"].min() == fitted.predict(least)[0]


def test_merges_of_one_set_of_experts_are_refused():
    frame = drawn(sets=1).assign(base="1M/instruct")
    with pytest.raises(EvaluationError, match="nothing could be left out"):
        retention.fit(frame)


def test_a_study_gives_each_merge_what_it_kept_and_the_recipe_it_was_made_by(
    finished_study, monkeypatch
):
    measured = []

    def measure(base, experts, recipes):
        measured.append((base.relative_to(finished_study).as_posix(), len(experts)))
        return [Measures(len(experts), 0.1, 0, 0, len(r.method), 0) for r in recipes]

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
