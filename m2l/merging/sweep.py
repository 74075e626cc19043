"""Many recipes for the same models: the best by a score, and the curve it came from."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

from m2l.errors import MergeError
from m2l.merging.engine import Model, merge
from m2l.merging.recipe import Recipe
from m2l.typing import Json, PyTree


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """A recipe and what its merge scores; more is better."""

    recipe: Recipe
    score: float


def grid(fixed: Mapping[str, Json], swept: Mapping[str, Sequence[float]]) -> list[Recipe]:
    """Returns a recipe for every combination of the swept settings' values, with what is fixed.

    Raises:
        MergeError: There is none, or a combination makes no recipe.
    """
    recipes = [
        Recipe(**fixed, **dict(zip(swept, values, strict=True)))
        for values in itertools.product(*swept.values())
    ]
    if not recipes:
        raise MergeError("nothing to sweep: a setting has no values")
    return recipes


def sweep(
    base: Model | None,
    experts: Sequence[Model],
    recipes: Iterable[Recipe],
    score: Callable[[PyTree, Recipe], float],
    statistics: Sequence[Model] = (),
) -> list[SweepPoint]:
    """Merges models by each recipe and scores what comes of it.

    Recipes that differ only in numbers share a compilation. In memory is one merge and, unless
    models are checkpoints, which are read by blocks for each recipe, all models.

    Args:
        base: The base, a checkpoint or parameters; None for methods that do not need it.
        experts: The experts.
        recipes: How to merge.
        score: Of the merged parameters; more is better.
        statistics: As `merge` takes them.

    Returns:
        A point for each recipe, in their order.
    """
    points: list[SweepPoint] = []
    for recipe in recipes:
        options = {"statistics": statistics, "verify": not points, "progress": False}
        points.append(SweepPoint(recipe, score(merge(base, experts, recipe, **options), recipe)))
    return points


def best(points: Sequence[SweepPoint]) -> SweepPoint:
    """Returns the point of the highest score; of equal ones the first.

    Raises:
        MergeError: There is none.
    """
    if not points:
        raise MergeError("nothing was swept")
    return max(points, key=lambda point: point.score)
