"""Results that are read back are those that were written, or are refused in one line."""

import dataclasses
import json

import pytest

from m2l.errors import EvaluationError
from m2l.evaluation import results

RESULT = results.Result(
    task="rte_gpt3",
    dataset="rte",
    category="natural_language_inference",
    held_out=True,
    kind="rank",
    metric="accuracy",
    score=62.5,
    metrics={"accuracy": 62.5, "chance": 50.0},
    count=8,
    ties=1,
    truncated=0,
    seconds=1.5,
    model_digest="a" * 64,
    task_digest="b" * 64,
    interval=[25.0, 87.5],
    tokens=100,
    padding=0.25,
)
FIELDS = {field.name for field in dataclasses.fields(results.Result)}


@pytest.fixture
def file(tmp_path):
    results.write_result(tmp_path, RESULT)
    return tmp_path / "rte_gpt3.json"


def refused(file, message):
    with pytest.raises(EvaluationError, match=message) as caught:
        results.read_results(file.parent)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_a_result_is_read_as_it_was_written(file):
    assert results.read_results(file.parent) == {"rte_gpt3": RESULT}


@pytest.mark.parametrize("field", sorted(FIELDS | {"checksum"}))
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_any_damage_to_a_field_is_refused(file, field, damage):
    fields = json.loads(file.read_text())
    value = fields.pop(field)
    if damage == "changed":
        fields[field] = (value + 1) if type(value) in (int, float) else "x"
    file.write_text(json.dumps(fields))
    refused(file, "does not match its checksum|format_version")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '"x"', "[" * 100_000])
def test_a_file_that_is_no_result_is_refused(file, text):
    file.write_text(text)
    refused(file, "damaged|format_version")


OLD = {
    name: value
    for name, value in (dataclasses.asdict(RESULT) | {"format_version": 2}).items()
    if name not in ("tokens", "padding", "interval")
}


def test_a_result_of_the_version_without_checksums_is_read(file):
    file.write_text(json.dumps(OLD))
    read = results.read_result(file)
    assert read == dataclasses.replace(
        RESULT, format_version=2, interval=None, tokens=0, padding=0.0
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": 63.0}, "score is 63.0, but metrics does not have it"),
        ({"metrics": {"accuracy": 63.0}}, "metrics does not have it"),
        ({"metrics": {}}, "metrics does not have it"),
        ({"metrics": []}, "expected finite numbers by name"),
        ({"metrics": {"accuracy": "62.5"}}, "expected finite numbers by name"),
        ({"score": "62.5"}, "score is '62.5', expected a finite number"),
        ({"score": None}, "expected a finite number"),
        ({"score": [62.5]}, "expected a finite number"),
        ({"score": float("nan")}, "NaN is not a finite number"),
        ({"score": float("inf")}, "Infinity is not a finite number"),
        ({"score": 1e9, "metrics": {"accuracy": 1e9}}, "score is 1000000000.0, which is out of"),
        ({"score": -1.0, "metrics": {"accuracy": -1.0}}, "score is -1.0, which is out of range"),
        ({"score": 10**400, "metrics": {"accuracy": 10**400}}, "expected a finite number"),
        ({"metric": "fluency"}, "metrics does not have it for 'fluency'"),
        ({"metric": ["accuracy"]}, "expected str"),
        ({"interval": [25.0]}, "expected two numbers"),
        ({"interval": [87.5, 25.0]}, "expected two numbers in order"),
        ({"interval": ["a", "b"]}, "expected two numbers"),
        ({"interval": {"low": 1}}, "expected two numbers"),
        ({"count": 0}, "count is 0, which is out of range"),
        ({"count": True}, "count is True, expected int"),
        ({"count": 8.0}, "count is 8.0, expected int"),
        ({"ties": 9}, "ties is 9, which is out of range"),
        ({"truncated": -1}, "truncated is -1, which is out of range"),
        ({"seconds": -1.0}, "seconds is -1.0, which is out of range"),
        ({"padding": 1.5}, "padding is 1.5, which is out of range"),
        ({"held_out": 1}, "held_out is 1, expected bool"),
        ({"model_digest": None}, "model_digest is None, expected str"),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"format_version": "2"}, "no format_version"),
        ({"format_version": [2]}, "no format_version"),
    ],
)
def test_fields_without_a_checksum_are_refused_where_they_cannot_be(file, changes, message):
    file.write_text(json.dumps(OLD | changes))
    refused(file, message)
