"""Merging parameters in memory: on any devices, sharded in any way, inside jit, differentiably."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2l import checkpoints
from m2l.errors import MergeError
from m2l.merging import compatibility, kernel, randomness
from m2l.merging.methods import METHODS
from m2l.merging.recipe import Recipe
from m2l.merging.statistics import kept_of, kth_largest


def merge_params(
    base: Mapping[str, Any] | None, experts: Sequence[Mapping[str, Any]], recipe: Recipe
) -> dict[str, Any]:
    """Merges nested dicts of arrays; the same bits as `merge` of their checkpoints.

    Differentiable in the parameters (thresholds and masks count as constants). NaN and infinity are
    not looked for.

    Args:
        base: The base's parameters; None for methods that do not need it.
        experts: The experts' parameters, in the order in which sums run.
        recipe: How to merge.

    Returns:
        A nested dict of arrays of the recipe's dtype, sharded as its inputs.

    Raises:
        MergeError: The parameters do not fit each other or the recipe.
    """
    compatibility.check_sources(base, experts, recipe)
    trees = [checkpoints.flatten(tree) for tree in experts]
    reference = trees[0] if base is None else checkpoints.flatten(base)
    shapes = {name: jnp.shape(leaf) for name, leaf in reference.items()}
    for index, tree in enumerate(trees):
        found = {name: jnp.shape(leaf) for name, leaf in tree.items()}
        for name in [*shapes, *found]:
            if shapes.get(name) != found.get(name):
                raise MergeError(
                    f"expert {index}: {name} has shape {found.get(name, 'none')} and not "
                    f"{shapes.get(name, 'none')}: these are not models of one kind"
                )
    return checkpoints.unflatten(_merge(reference, trees, recipe))


@functools.partial(jax.jit, static_argnames="recipe")
def _merge(
    reference: dict[str, jax.Array], experts: list[dict[str, jax.Array]], recipe: Recipe
) -> dict[str, jax.Array]:
    method = METHODS[recipe.method]
    dtypes = {name: jnp.result_type(leaf).name for name, leaf in reference.items()}
    names = compatibility.merged_names(dtypes, recipe.exclude)
    drawing = {
        name: {
            "drop_rate": recipe.drop_rate,
            "keys": randomness.keys(recipe.seed, len(experts), name) if method.draws else None,
            "offset": kernel.split(0),
        }
        for name in names
    }

    def parts(name: str) -> tuple[jax.Array | None, list[jax.Array]]:
        base = jnp.asarray(reference[name]) if method.needs_base else None
        return base, [jnp.asarray(expert[name]) for expert in experts]

    def thresholds(group: Sequence[str]) -> jax.Array | None:
        if not method.trims:
            return None
        found = [kernel.magnitudes(method, *parts(name), **drawing[name]) for name in group]
        size = sum(array[0].size for array in found)
        rank = kept_of(size, recipe.density)
        if rank in (0, size):
            return jnp.full(len(experts), 0 if rank else np.inf, jnp.float32)
        return kth_largest(list(zip(*found, strict=True)), rank)

    of_model = thresholds(names) if recipe.scope == "model" else None
    weights = recipe.weights_for(len(experts))
    merged = dict(reference)
    for name in reference:
        if name in names:
            merged[name] = kernel.merged(
                method,
                *parts(name),
                scale=recipe.scale,
                weights=weights,
                thresholds=of_model if recipe.scope == "model" else thresholds([name]),
                **drawing[name],
            ).astype(recipe.dtype)
        elif compatibility.is_float(dtypes[name]):
            merged[name] = jnp.asarray(merged[name]).astype(recipe.dtype)
    return merged
