"""Many recipes for the same models."""

import numpy as np
import pytest

from m2l.errors import MergeError
from m2l.merging import best, grid, in_memory, merge_params, sweep

from .conftest import whole


def test_a_sweep_scores_every_recipe_and_finds_the_best(models, paths):
    base, experts = models
    recipes = grid({"method": "ties"}, {"density": [0.2, 0.5], "scale": [0.0, 0.5, 1.0]})
    assert [(r.density, r.scale) for r in recipes][:4] == [(0.2, 0), (0.2, 0.5), (0.2, 1), (0.5, 0)]
    wanted = whole(merge_params(base, experts, recipes[4]))
    programs = (in_memory._counts, in_memory._next_prefixes, in_memory._merged)
    compiled = [program._cache_size() for program in programs]

    def score(params, recipe):
        return -float(np.abs(whole(params) - wanted).sum())

    points = sweep(base, experts, recipes, score)
    assert [program._cache_size() for program in programs] == compiled
    assert [point.recipe for point in points] == recipes
    assert best(points) == points[4]
    assert best(points).score == 0
    for point in points:
        np.testing.assert_array_equal(
            score(merge_params(base, experts, point.recipe), point.recipe), point.score
        )
    assert sweep(*paths, recipes, score) == points
    with pytest.raises(MergeError, match="no values"):
        grid({"method": "ties"}, {"scale": []})
