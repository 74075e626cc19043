"""Spaces of recipes."""

import pytest

from m2l.errors import M2LError
from m2l.merging import Recipe
from m2l.merging.search_space import SearchSpace

SPACE = SearchSpace(
    {
        "ties": {
            "density": (0.01, 1.0, "log"),
            "scale": {"encoder/*": (0.5, 2.0), "decoder/*": [0.5, 1.0], "*": 1.0},
            "weights": [(0, 1), 0.5],
            "consensus": ["mean", "sum"],
        },
        "dare": {"drop_rate": (0.1, 0.9, 0.2), "scale": ((0, 1), (1, 2))},
    }
)


def test_every_kind_of_values_becomes_a_part_of_the_recipe():
    drawn = {
        "method": "ties",
        "ties.density": 0.1,
        "ties.scale[encoder/*]": 0.75,
        "ties.scale[decoder/*]": 0.5,
        "ties.weights[0]": 0.25,
        "ties.consensus": "sum",
    }
    asked = []

    def draw(dimension):
        asked.append(dimension)
        return drawn[dimension.name]

    scale = [["encoder/*", 0.75], ["decoder/*", 0.5], ["*", 1.0]]
    expected = Recipe("ties", density=0.1, scale=scale, weights=[0.25, 0.5], consensus="sum")
    assert SPACE.recipe(draw) == expected
    assert [each.name for each in asked] == list(drawn)
    assert asked[0].choices == ("ties", "dare") and asked[1].log and asked[3].choices == (0.5, 1.0)
    drawn = {"method": "dare", "dare.drop_rate": 0.3, "dare.scale[0]": 0.1, "dare.scale[1]": 1.7}
    assert SPACE.recipe(draw) == Recipe("dare", drop_rate=0.3, scale="0.1..1.7")
    assert asked[-3].step == 0.2


def test_a_search_begins_with_points_that_are_spread_over_the_space():
    first, second, third = SPACE.spread(3)
    # The middle of each range; of a logarithm the geometric mean, of steps the one below.
    assert first == {
        "method": "ties",
        "ties.density": pytest.approx(0.1),
        "ties.scale[encoder/*]": 1.25,
        "ties.scale[decoder/*]": 1.0,
        "ties.weights[0]": 0.5,
        "ties.consensus": "sum",
    }
    assert second == {
        "method": "dare",
        "dare.drop_rate": 0.5,
        "dare.scale[0]": 0.5,
        "dare.scale[1]": 1.5,
    }
    # Sobol's second point is 0.75, 0.25, ...
    assert third["ties.scale[encoder/*]"] == 0.5 + 0.25 * 1.5
    only = SearchSpace({"ties": {"density": (0.3, 0.9, 0.4)}})
    assert only.spread(2) == [{"ties.density": 0.3}, {"ties.density": 0.7}]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({}, r"Search.methods: expected {METHOD: {SETTING: VALUES}}.*found {}"),
        ({"tise": {}}, "unknown merge method in Search.methods 'tise'; the nearest.*'ties'"),
        ({"ties": {"densty": (0, 1)}}, "unknown setting of ties 'densty'; the nearest.*'density'"),
        ({"ties": [0.1]}, r"ties: expected {SETTING: VALUES}, found \[0.1\]"),
        ({"ties": {"density": (0.5, 1.5)}}, "Search.methods: ties: density must be .*not 1.5"),
        ({"ties": {"density": [0.5, -1]}}, "Search.methods: ties: density must be .*not -1"),
        ({"ties": {"scale": {"*mlp*": (0, 1), "*": "x"}}}, "ties: scale of '\\*' must be a number"),
        (
            {"ties": {"density": (0.5, 0.1)}},
            r"ties.density: expected \(LOW, HIGH\), .*\(0.5, 0.1\)",
        ),
        ({"ties": {"density": (0.0, 1.0, "log")}}, "of a logarithm above 0"),
        ({"ties": {"density": (0.1, 0.5, 0.9)}}, "with LOW below HIGH"),
        ({"ties": {"density": ((0.1, 0.5),)}}, r"expected \(LOW, HIGH\), found"),
        ({"ties": {"density": []}}, "to choose from, found"),
        ({"ties": {"consensus": ["mean", "median"]}}, "unknown consensus 'median'"),
        ({"average": {"consensus": ["mean", "sum"]}}, "average has no consensus"),
        ({"ties": {"seed": [0.5]}}, "a seed is a whole number"),
        ({"dare": {"scale": (0, 1)}}, "dare: it needs a drop_rate"),
    ],
)
def test_a_space_that_holds_no_recipes_is_refused_in_one_line(methods, message):
    with pytest.raises(M2LError, match=message) as refused:
        SearchSpace(methods)
    assert "\n" not in str(refused.value)
