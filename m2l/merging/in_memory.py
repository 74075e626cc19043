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
from m2l.merging.results import is_float
from m2l.merging.thresholds import kth_largest

Arrays = dict[str, jax.Array]


def merge_params(
    base: Mapping[str, Any] | None,
    experts: Sequence[Mapping[str, Any]],
    recipe: Recipe,
    statistics: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Merges nested dicts of arrays; the same bits as `merge` of their checkpoints.

    But for slerp and model_stock, whose inner products are summed in float32 in an order of their
    own, and for rescale "norm". Differentiable in the parameters (thresholds and masks count as
    constants), but for regmean, which is computed on the host. NaN and infinity are not looked for.

    Args:
        base: The base's parameters; None for methods that do not need it.
        experts: The experts' parameters, in the order in which sums run.
        recipe: How to merge.
        statistics: A statistic of each expert, for the methods that need them.

    Returns:
        A nested dict of arrays of the recipe's dtype, sharded as its inputs.

    Raises:
        MergeError: The parameters do not fit each other or the recipe, or the recipe needs what
            only a merge of checkpoints can count: the zero_sign of a majority, drop rates by rank.
    """
    compatibility.check_counts(base is not None, len(experts), len(statistics), recipe)
    method = METHODS[recipe.method]
    if method.ranks or recipe.zero_sign.startswith("majority"):
        what = "drop rates by rank" if method.ranks else "the sign of the majority"
        raise MergeError(f"{what} are found by merging checkpoints, not in memory")
    trees = [checkpoints.flatten(tree) for tree in experts]
    beside = [checkpoints.flatten(tree) for tree in statistics]
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
    merge = _merge_on_host if method.whole else _merge
    return checkpoints.unflatten(merge(reference, trees, beside, recipe))


def _names(reference: Arrays, recipe: Recipe) -> list[str]:
    dtypes = {name: jnp.result_type(leaf).name for name, leaf in reference.items()}
    return compatibility.select_names({name: (name,) for name in reference}, dtypes, recipe)


def _others(reference: Arrays, names: Sequence[str], recipe: Recipe) -> Arrays:
    """What is not merged: real numbers in the recipe's dtype."""
    return {
        name: jnp.asarray(leaf).astype(recipe.dtype)
        if is_float(jnp.result_type(leaf)) and name not in names
        else leaf
        for name, leaf in reference.items()
    }


def _merge_on_host(
    reference: Arrays, experts: list[Arrays], statistics: list[Arrays], recipe: Recipe
) -> Arrays:
    names = _names(reference, recipe)
    merged = _others(reference, names, recipe)
    for name in names:
        grams = [np.asarray(s[name]) for s in statistics] if name in statistics[0] else None
        found = METHODS[recipe.method].function(
            [np.asarray(e[name]) for e in experts], grams, recipe.nondiagonal_scale
        )
        merged[name] = jnp.asarray(found).astype(recipe.dtype)
    return merged


@functools.partial(jax.jit, static_argnames="recipe")
def _merge(
    reference: Arrays, experts: list[Arrays], statistics: list[Arrays], recipe: Recipe
) -> Arrays:
    method, n = METHODS[recipe.method], len(experts)
    names = _names(reference, recipe)
    given: dict[str, dict[str, Any]] = {}

    def parts(name: str) -> tuple[jax.Array | None, list[jax.Array]]:
        base = jnp.asarray(reference[name]) if method.needs_base else None
        return base, [jnp.asarray(expert[name]) for expert in experts]

    for name in names:
        given[name] = recipe.settings_for((name,), n)
        if method.elects:
            given[name]["zero_sign"] = np.float32(recipe.zero_sign == "positive")
        if method.draws:
            keys = randomness.keys(recipe.seed, n, name)
            given[name] |= {"keys": keys, "offset": kernel.split(0)}
            given[name]["cut"] = randomness.cut(recipe.drop_rate)
            given[name]["rescale"] = _rescale(recipe, n, parts(name), given[name])
        if method.coefficients is not None:
            products = _products(*parts(name))
            hyper = {key: getattr(recipe, key) for key in method.hyper_parameters}
            given[name]["coefficients"] = method.coefficients(products, **hyper, xp=jnp)
    if method.trims:
        groups = [names] if recipe.scope == "model" else [[name] for name in names]
        for group in groups:
            found = [kernel.magnitudes(method, *parts(name), given[name]) for name in group]
            limits = _limits(recipe, list(zip(*found, strict=True)), "ceilings" in method.takes)
            for name in group:
                given[name] |= limits
    merged = _others(reference, names, recipe)
    for name in names:
        beside = [jnp.asarray(statistic[name]) for statistic in statistics]
        block = kernel.merged(method, recipe.election, *parts(name), beside, given[name])
        merged[name] = block.astype(recipe.dtype)
    return merged


def _products(base: jax.Array | None, experts: Sequence[jax.Array]) -> jax.Array:
    vectors = kernel.float32(experts)
    if base is not None:
        vectors = [expert - base.astype(jnp.float32) for expert in vectors]
    return jnp.stack([jnp.stack([jnp.sum(a * b) for b in vectors]) for a in vectors])


def _rescale(recipe: Recipe, n: int, parts: Any, given: kernel.Given) -> Any:
    if recipe.rescale == "expectation":
        return np.full(n, 1 / (1 - recipe.drop_rate), np.float32)
    ones = np.ones(n, np.float32)
    if recipe.rescale == "none":
        return ones
    kept = kernel.magnitudes(METHODS[recipe.method], *parts, {**given, "rescale": ones})
    before = [jnp.sum(jnp.abs(e.astype(jnp.float32) - parts[0])) for e in parts[1]]
    found = [(b, jnp.sum(k)) for b, k in zip(before, kept, strict=True)]
    return [jnp.where((b < 1e-7) | (k < 1e-7), 1, b / jnp.maximum(k, 1e-30)) for b, k in found]


def _limits(recipe: Recipe, experts: Any, outliers: bool) -> dict[str, jax.Array]:
    """Thresholds and, where there are outliers, ceilings of each expert's magnitudes."""
    size, n = sum(array.size for array in experts[0]), len(experts)

    def largest(rank: int) -> jax.Array:
        if rank in (0, size):
            return jnp.full(n, 0 if rank else np.inf, jnp.float32)
        return kth_largest(experts, rank)

    if not outliers:
        rank = size if recipe.density == 1 else recipe.kept_of(size)
        return {"thresholds": largest(rank)}
    top = int(size * recipe.gamma)
    lower = largest(min(size, top + recipe.kept_of(size)))
    return {"thresholds": lower, "ceilings": largest(top)}
