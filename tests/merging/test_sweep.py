"""Many recipes for the same models."""

import numpy as np
import pytest

from m2l.errors import MergeError
from m2l.merging import (
    METHODS,
    Recipe,
    best,
    grid,
    in_memory,
    merge_each,
    merge_params,
    shards,
    sweep,
)

from .conftest import whole


def test_a_sweep_scores_every_recipe_and_finds_the_best(models, paths):
    base, experts = models
    recipes = grid({"method": "ties"}, {"density": [0.2, 0.5], "scale": [0.0, 0.5, 1.0]})
    assert [(r.density, r.scale) for r in recipes][:4] == [(0.2, 0), (0.2, 0.5), (0.2, 1), (0.5, 0)]
    wanted = whole(merge_params(base, experts, recipes[4]))
    programs = (shards._counts, shards._next_prefixes, in_memory._merged)
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


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("average", [{"weights": (1, 2, 3)}, {}]),
        ("task_arithmetic", [{"scale": 0.3}, {"scale": 0.7}, {"scale": 0.3}]),
        ("ties", [{"density": d, "scale": s} for d in (0.2, 0.5, 1.0) for s in (0.3, 1.0)]),
        ("ties", [{"keep": "floor"}, {"keep": "one_more"}, {"zero_sign": "majority"}]),
        ("dare_ties", [{"drop_rate": p, "seed": s} for p in (0.2, 0.9) for s in (0, 1)]),
        ("dare", [{"drop_rate": 0.5, "scales": (("*", s),)} for s in (0.1, 0.2)]),
        ("della", [{"drop_rate": 0.5, "epsilon": e} for e in (0.1, 0.2)]),
        ("breadcrumbs", [{"gamma": g} for g in (0.0, 0.01, 0.05)]),
        ("pcb", [{"density": d, "weights": (1, 2, w)} for d in (0.2, 0.5) for w in (1, 3)]),
        ("model_stock", [{}, {}]),
    ],
)
def test_merges_by_several_recipes_at_once_are_those_by_each(models, method, settings):
    base, experts = models
    recipes = [Recipe(method, **each) for each in settings]
    base = base if METHODS[method].needs_base else None
    for recipe, merged in zip(recipes, merge_each(base, experts, recipes), strict=True):
        np.testing.assert_array_equal(whole(merged), whole(merge_params(base, experts, recipe)))
