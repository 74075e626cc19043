"""One reading of the experts, many recipes: the best by a score, and the curve it came from."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from m2l.errors import MergeError
from m2l.merging.in_memory import merge_params
from m2l.merging.recipe import Recipe

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Point:
    """A recipe and what its merge scores; more is better."""

    recipe: Recipe
    score: float


def grid(fixed: Mapping[str, Any], swept: Mapping[str, Sequence[float]]) -> list[Recipe]:
    """Every combination of the swept settings' values, with what is fixed.

    Raises:
        MergeError: There is none, or a combination makes no recipe.
    """
    found = [
        Recipe(**fixed, **dict(zip(swept, values, strict=True)))
        for values in itertools.product(*swept.values())
    ]
    if not found:
        raise MergeError("nothing to sweep: a setting has no values")
    return found


def sweep(
    base: Params | None,
    experts: Sequence[Params],
    recipes: Iterable[Recipe],
    score: Callable[[Params, Recipe], float],
    statistics: Sequence[Params] = (),
) -> list[Point]:
    """Merges parameters by each recipe and scores what comes of it.

    Recipes that differ only in numbers share a compilation. In memory are the models and one merge.

    Args:
        base: The base's parameters; None for methods that do not need it.
        experts: The experts' parameters.
        recipes: How to merge.
        score: Of the merged parameters; more is better.
        statistics: As `merge_params` takes them.

    Returns:
        A point for each recipe, in their order.
    """
    return [
        Point(recipe, score(merge_params(base, experts, recipe, statistics), recipe))
        for recipe in recipes
    ]


def best(points: Sequence[Point]) -> Point:
    """The point of the highest score; of equal ones the first.

    Raises:
        MergeError: There is none.
    """
    if not points:
        raise MergeError("nothing was swept")
    return max(points, key=lambda point: point.score)
