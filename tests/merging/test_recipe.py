"""A recipe checks itself and survives its own description."""

import dataclasses
import json

import pytest

from m2l.errors import MergeError, UnknownNameError
from m2l.merging import Recipe


def test_defaults_are_filled_in():
    assert Recipe("ties").density == 0.2
    assert Recipe("ties").scale == 1.0
    assert Recipe("task_arithmetic").scale == 1.0
    assert Recipe("dare_ties", drop_rate=0.5).density == 1.0
    assert Recipe("average").weights == ()


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("average", weights=[1, 2.5], exclude=["token_embedder", "*norm"]),
        Recipe("task_arithmetic", scale=-1, dtype="bfloat16"),
        Recipe("ties", density=1, scope="tensor"),
        Recipe("dare_ties", drop_rate=0, seed=3),
    ],
)
def test_a_recipe_comes_back_from_its_description(recipe):
    fields = json.loads(json.dumps(recipe.to_dict()))
    assert Recipe(**fields) == recipe
    assert hash(dataclasses.replace(recipe, seed=9)) != hash(recipe)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "tise"}, "unknown merge method 'tise'; the nearest known one is 'ties'"),
        ({"method": "ties", "scope": "modell"}, "unknown scope 'modell'.*'model'"),
        ({"method": "ties", "dtype": "float23"}, "unknown dtype"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(fields, message):
    with pytest.raises(UnknownNameError, match=message):
        Recipe(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"method": "average", "density": 0.2},
            "average has no density; its settings are: weights",
        ),
        ({"method": "average", "scale": 1.0}, "average has no scale"),
        ({"method": "ties", "drop_rate": 0.5}, "ties has no drop_rate"),
        ({"method": "linear", "weights": [1, 1]}, "linear has no weights"),
        ({"method": "della", "drop_rate": 0.1}, "the rates from -0.05 to 0.25"),
        (
            {"method": "sce", "weighted_signs": True, "zero_sign": "majority_or_none"},
            "sce has no zero_sign majority_or_none with weighted_signs",
        ),
        ({"method": "dare", "drop_rate": 0.5, "zero_sign": "positive"}, "dare has no zero_sign"),
        ({"method": "ties", "weighted_signs": 1}, "weighted_signs must be true or false"),
        ({"method": "ties", "scales": ["a"]}, "pairs of a pattern and a scale"),
        ({"method": "average", "scales": [["a", 0.5]]}, "average has no scale"),
        ({"method": "fisher", "weights": [1, 0]}, r"weights\[1\] must be above 0"),
        ({"method": "dare_ties"}, "dare_ties needs a drop_rate"),
        ({"method": "ties", "density": 20}, "density must be above 0 and at most 1"),
        ({"method": "ties", "density": 0}, "density must be above 0"),
        ({"method": "ties", "density": "0.2"}, "density must be a number"),
        ({"method": "ties", "density": True}, "density must be a number"),
        ({"method": "ties", "density": float("nan")}, "density must be above 0"),
        ({"method": "ties", "scale": float("inf")}, "scale must be finite"),
        ({"method": "dare_ties", "drop_rate": 1.0}, "drop_rate must be at least 0 and below 1"),
        ({"method": "dare_ties", "drop_rate": -0.1}, "drop_rate must be"),
        ({"method": "average", "weights": []}, "weights must be a list of numbers"),
        ({"method": "average", "weights": "11"}, "weights must be a list of numbers"),
        ({"method": "average", "weights": [1, "1"]}, r"weights\[1\] must be a number"),
        ({"method": "average", "weights": [1, -1]}, "weights must not sum to zero"),
        ({"method": "task_arithmetic", "scope": "tensor"}, "task_arithmetic has no scope"),
        ({"method": "ties", "seed": 1.5}, "seed must be a whole number"),
        ({"method": "ties", "exclude": "*"}, "exclude must be a list of patterns"),
        ({"method": "ties", "exclude": 3}, "exclude must be a list of patterns"),
        ({"method": []}, r"unknown merge method '\[\]'"),
        ({"method": "ties", "dtype": ["float32"]}, "unknown dtype"),
        ({"method": "ties", "scope": {}}, "unknown scope"),
    ],
)
def test_bad_settings_are_refused_by_name(fields, message):
    with pytest.raises((MergeError, UnknownNameError), match=message):
        Recipe(**fields)
