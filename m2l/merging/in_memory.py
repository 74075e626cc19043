"""Merging parameters in memory: on any devices, sharded in any way, inside jit, differentiably."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m2l import checkpoints
from m2l.errors import MergeError
from m2l.merging import compatibility, kernel, randomness, uint64
from m2l.merging.method import Consensus, Method
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
    wanted, first = _kinds(reference), "expert 0" if base is None else "base"
    for index, tree in enumerate(trees):
        if table := compatibility.differences(wanted, _kinds(tree), (first, f"expert {index}")):
            raise MergeError(
                f"expert {index} cannot be merged with {first}: other parameters", table
            )
    merge = _merge_on_host if method.whole else _merge_on_devices
    return checkpoints.unflatten(merge(reference, trees, beside, recipe))


def _kinds(tree: Arrays) -> dict[str, str]:
    return {
        name: compatibility.kind(jnp.shape(leaf), jnp.result_type(leaf))
        for name, leaf in tree.items()
    }


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
            name, [np.asarray(e[name]) for e in experts], grams, recipe.nondiagonal_scale
        )
        merged[name] = jnp.asarray(found).astype(recipe.dtype)
    return merged


def _merge_on_devices(
    reference: Arrays, experts: list[Arrays], statistics: list[Arrays], recipe: Recipe
) -> Arrays:
    """Compiled for what kind of recipe it is: its numbers are arguments."""
    names, n = _names(reference, recipe), len(experts)
    sizes = {name: int(np.prod(jnp.shape(reference[name]), dtype=np.int64)) for name in names}
    settings = {name: recipe.settings_for((name,), n) for name in names}
    groups = [names] if recipe.scope == "model" else [[name] for name in names]
    ranks: list[list[np.ndarray]] = []
    if METHODS[recipe.method].trims:
        wanted = [_ranks(recipe, sum(sizes[name] for name in group)) for group in groups]
        ranks = [[uint64.split(rank) for rank in pair] for pair in wanted]
    rate = recipe.drop_rate or 0.0
    numbers = {
        "settings": settings,
        "ranks": ranks,
        "cut": randomness.cut(rate),
        "rescale": np.float32(1 / (1 - rate) if recipe.rescale == "expectation" else 1),
        "hyper": {
            name: np.float32(getattr(recipe, name))
            for name in METHODS[recipe.method].hyper_parameters
            if isinstance(getattr(recipe, name), float)
        },
    }
    kind = _Kind(
        recipe.method,
        recipe.election,
        recipe.zero_sign,
        recipe.rescale,
        recipe.dtype,
        recipe.seed,
        tuple(map(tuple, groups)),
    )
    merged = _merge({name: reference[name] for name in names}, experts, statistics, numbers, kind)
    return _others(reference, names, recipe) | merged


class _Kind(NamedTuple):
    """What a merge is compiled for, beside the shapes of its parameters."""

    method: str
    election: Consensus
    zero_sign: str
    rescale: str
    dtype: str
    seed: int
    groups: tuple[tuple[str, ...], ...]


@functools.partial(jax.jit, static_argnames="kind")
def _merge(
    reference: Arrays,
    experts: list[Arrays],
    statistics: list[Arrays],
    numbers: Mapping[str, Any],
    kind: _Kind,
) -> Arrays:
    method, n = METHODS[kind.method], len(experts)
    given: dict[str, dict[str, Any]] = {}

    def parts(name: str) -> tuple[jax.Array | None, list[jax.Array]]:
        base = jnp.asarray(reference[name]) if method.needs_base else None
        return base, [jnp.asarray(expert[name]) for expert in experts]

    for name in reference:
        given[name] = dict(numbers["settings"][name])
        if method.elects:
            given[name]["zero_sign"] = np.float32(kind.zero_sign == "positive")
        if method.draws:
            keys = randomness.keys(kind.seed, n, name)
            given[name] |= {"keys": keys, "place": randomness.straight(0), "cut": numbers["cut"]}
            given[name]["rescale"] = jnp.full(n, numbers["rescale"])
            if kind.rescale == "norm":
                given[name]["rescale"] = _norms(method, *parts(name), given[name])
        if method.coefficients is not None:
            products = _products(*parts(name))
            hyper = numbers["hyper"]
            given[name]["coefficients"] = method.coefficients(products, **hyper, xp=jnp)
    if method.trims:
        for group, ranks in zip(kind.groups, numbers["ranks"], strict=True):
            found = [kernel.magnitudes(method, *parts(name), given[name]) for name in group]
            found = list(zip(*found, strict=True))
            limits = {"thresholds": _largest(found, ranks[0])}
            if "ceilings" in method.takes:
                limits["ceilings"] = _largest(found, ranks[1])
            for name in group:
                given[name] |= limits
    merged = {}
    for name in reference:
        beside = [jnp.asarray(statistic[name]) for statistic in statistics]
        block = kernel.merged(method, kind.election, *parts(name), beside, given[name])
        merged[name] = block.astype(kind.dtype)
    return merged


def _products(base: jax.Array | None, experts: Sequence[jax.Array]) -> jax.Array:
    vectors = kernel.float32(experts)
    if base is not None:
        vectors = [expert - base.astype(jnp.float32) for expert in vectors]
    return jnp.stack([jnp.stack([jnp.sum(a * b) for b in vectors]) for a in vectors])


def _norms(
    method: Method, base: jax.Array, experts: Sequence[jax.Array], given: kernel.Given
) -> list[jax.Array]:
    """What makes the L1 norm of each task vector what it was before entries were dropped."""
    sums = kernel.norms(method, base, experts, given)
    found = zip(sums["l1"], sums["l1_kept"], strict=True)
    return [jnp.where((b < 1e-7) | (k < 1e-7), 1, b / jnp.maximum(k, 1e-30)) for b, k in found]


def _ranks(recipe: Recipe, size: int) -> tuple[int, int]:
    """How many of the largest of `size` magnitudes thresholds keep, and ceilings leave out."""
    if recipe.density is None:
        return size, 0
    top = int(size * (recipe.gamma or 0))
    if recipe.density == 1 and not top:
        return size, 0
    return min(size, top + recipe.kept_of(size)), top


def _largest(experts: Sequence[Sequence[jax.Array]], rank: jax.Array) -> jax.Array:
    """The rank-th largest magnitude of each expert; infinity is before the first."""
    size = uint64.split(sum(array.size for array in experts[0]))
    found = kth_largest(experts, rank)
    found = jnp.where(uint64.at_least(rank, size), 0, found)
    return jnp.where((rank == 0).all(), jnp.inf, found).astype(jnp.float32)
