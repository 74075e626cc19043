"""Merging parameters in memory: on any devices, sharded in any way, inside jit, differentiably.

A program is compiled per kind of parameter (shapes, dtypes, sharding) and called for each: a model
of a hundred layers compiles as fast as one of two. These programs do not communicate: sums over
parameters are taken over each shard, and those of all parameters and shards added by one program.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from m2l.checkpoints.tensor_kinds import has_output_rows, is_float
from m2l.errors import MergeError
from m2l.merging import kernel, layerwise, spectral
from m2l.merging.inputs import (
    array_kind,
    check_counts,
    check_matrices,
    differences,
    select_names,
)
from m2l.merging.method_registry import METHODS
from m2l.merging.recipe import Recipe
from m2l.merging.requirements import Array, Requirements
from m2l.merging.shards import (
    Program,
    Row,
    ShardedAnalysis,
    constrained,
    placed_on,
    widest_sharding,
)
from m2l.typing import PyTree

Leaves = dict[str, PyTree]


def merge_params(
    base: PyTree | None,
    experts: Sequence[PyTree],
    recipe: Recipe,
    statistics: Sequence[PyTree] = (),
) -> PyTree:
    """Merges pytrees of parameters; the same bits as `merge` of their checkpoints.

    But for methods of coefficients, as slerp, whose inner products are summed in float32 in an
    order of their own, and for rescale "norm". Differentiable in the parameters (thresholds and
    masks count as constants), but for regmean and methods of matrices, which are computed on the
    host. NaN and infinity are not looked for.

    A leaf is named by its keys, attributes and indices joined by "/": patterns of the recipe match
    these names, and random draws depend on them. Leaves that are no real numbers (integers,
    booleans, PRNG keys) are those of the base or, without a base, of the first expert.

    Args:
        base: The base's parameters, any pytree of arrays and numbers: nested dicts, lists, a
            TrainState, an NNX State; None for methods that do not need it.
        experts: The experts' parameters, in the order in which sums run. Containers of other types
            are accepted where the leaves have the same names.
        recipe: How to merge.
        statistics: A statistic of each expert, for the methods that need them; before them that of
            the base, if there is one.

    Returns:
        A pytree of the base's (without one, the first expert's) structure; arrays of the recipe's
        dtype, sharded as the inputs.

    Raises:
        MergeError: The parameters do not fit each other or the recipe.
    """
    return merge_each(base, experts, [recipe], statistics)[0]


def merge_each(
    base: PyTree | None,
    experts: Sequence[PyTree],
    recipes: Sequence[Recipe],
    statistics: Sequence[PyTree] = (),
) -> list[PyTree]:
    """Merges pytrees by several recipes: returns what `merge_params` does of each, the same bits.

    Recipes that follow one another and differ in numbers alone are merged by one program,
    vectorized over them: what they have in common, as thresholds of one density, is computed once.
    All results are in memory at a time.
    """
    results = []
    for _, group in itertools.groupby(recipes, key=_form):
        results += _merge_alike(base, experts, list(group), statistics)
    return results


def _form(recipe: Recipe) -> tuple[object, ...]:
    """Returns what of a recipe decides which program merges by it: all but numbers."""
    fields = vars(recipe) | {"hyper_parameters": (), "seed": ()}
    kinds = [(pattern, type(value)) for pattern, value in recipe.scales]
    kinds += [bool(layerwise.lists(value)) for value in recipe.hyper_parameters.values()]
    return tuple((fields | {"scales": tuple(kinds)}).values())


def _merge_alike(
    base: PyTree | None,
    experts: Sequence[PyTree],
    recipes: Sequence[Recipe],
    statistics: Sequence[PyTree],
) -> list[PyTree]:
    """Merges by recipes of one form."""
    recipe = recipes[0]
    for each in recipes:
        if each.tokenizer is not None:
            raise MergeError("parameters in memory have no tokenizers: merge checkpoints")
        check_counts(base is not None, len(experts), len(statistics), each)
    method = METHODS[recipe.method]
    expert_labels = [f"expert {index}" for index in range(len(experts))]
    label = expert_labels[0] if base is None else "base"
    reference, treedef = _flatten(experts[0] if base is None else base, label)
    expert_leaves = [_flatten(*pair)[0] for pair in zip(experts, expert_labels, strict=True)]
    kinds = _kinds(reference, label)
    for other, leaves in zip(expert_labels, expert_leaves, strict=True):
        if table := differences(kinds, _kinds(leaves, other), (label, other)):
            raise MergeError(f"{other} cannot be merged with {label}: other parameters", table)
    names = select_names(
        {name: (name,) for name in reference}, {n: _dtype(x) for n, x in reference.items()}, recipe
    )
    labels = [f"statistics {index}" for index in range(len(statistics))]
    statistic_leaves = [_flatten(*pair)[0] for pair in zip(statistics, labels, strict=True)]
    if not method.whole:
        numeric = {name: kinds[name] for name in kinds if is_float(_dtype(reference[name]))}
        for other, leaves in zip(labels, statistic_leaves, strict=True):
            compared = {n: leaf for n, leaf in leaves.items() if n in numeric or n not in kinds}
            if table := differences(numeric, _kinds(compared, other), (label, other)):
                raise MergeError(f"{other} cannot be merged with {label}: other leaves", table)
    rows = {
        name: Row(
            reference[name] if method.needs_base else None,
            [leaves[name] for leaves in expert_leaves],
            [leaves[name] for leaves in statistic_leaves if name in leaves],
        )
        for name in names
    }
    unmerged = _unmerged(reference, rows, recipe)
    known = {name: (name,) for name in reference}
    needs = [Requirements(each, len(experts), known) for each in recipes]
    for each in needs:
        each.resolved(rows)
    if method.whole:
        merges = [_merge_on_host(rows, each) for each in needs]
    else:
        merges = _merge_on_devices(rows, needs)
    return [
        jax.tree.unflatten(treedef, [(unmerged | merged)[name] for name in reference])
        for merged in merges
    ]


def _flatten(tree: PyTree, label: str) -> tuple[Leaves, jax.tree_util.PyTreeDef]:
    """Returns a pytree's leaves by name, in its order, and its structure."""
    try:
        pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
    except ValueError as error:  # Keys of a dict that cannot be sorted, such as 0 and "a".
        reason = str(error).split("\n")[0]
        raise MergeError(f"{label}: cannot flatten its tree of parameters: {reason}") from error
    leaves, paths = {}, {}
    for path, leaf in pairs:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "value"
        if name in paths:
            both = " and ".join(jax.tree_util.keystr(each) for each in (paths[name], path))
            raise MergeError(f"{label}: {both} have one name, {name!r}: rename one of the keys")
        leaves[name], paths[name] = leaf, path
    return leaves, treedef


def _is_key(leaf: ArrayLike) -> bool:
    """Returns whether a leaf is an array of typed PRNG keys, whose dtype is none of NumPy's."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _dtype(leaf: ArrayLike) -> np.dtype:
    return np.dtype(np.uint32) if _is_key(leaf) else jnp.result_type(leaf)


def _kinds(leaves: Leaves, label: str) -> dict[str, str]:
    kinds = {}
    for name, leaf in leaves.items():
        dtype = getattr(leaf, "dtype", np.dtype(type(leaf)) if np.isscalar(leaf) else object)
        if not isinstance(leaf, jax.Array) and np.dtype(dtype).kind in "OSU":
            raise MergeError(
                f"{label}: {name} is a {type(leaf).__name__}; expected an array or a number"
            )
        kind = array_kind(np.shape(leaf), _dtype(leaf))
        kinds[name] = f"{leaf.dtype}{list(leaf.shape)}" if _is_key(leaf) else kind
    return kinds


def _unmerged(reference: Leaves, merged: Mapping[str, Row], recipe: Recipe) -> Leaves:
    """Returns the leaves that are not merged: real numbers in the recipe's dtype."""
    return {
        name: jnp.asarray(leaf).astype(recipe.dtype) if is_float(_dtype(leaf)) else leaf
        for name, leaf in reference.items()
        if name not in merged
    }


def _merge_on_host(rows: Mapping[str, Row], needs: Requirements) -> Leaves:
    merged, method = {}, needs.method
    check_matrices(method, {name: np.shape(row.experts[0]) for name, row in rows.items()})
    for name, row in rows.items():
        result = spectral.merged(
            method,
            name,
            None if row.base is None else _float32_on_host(name, row.base),
            [functools.partial(_float32_on_host, name, leaf) for leaf in row.experts],
            has_output_rows(name, False, {}),
            needs.arguments(name, np.float64),
            [_float32_on_host(name, leaf) for leaf in row.statistics] or None,
        )
        result = result.astype(jnp.dtype(needs.recipe.dtype))
        sharding = widest_sharding(row.experts)
        merged[name] = (
            jnp.asarray(result)
            if sharding is None
            else jax.make_array_from_callback(result.shape, sharding, result.__getitem__)
        )
    return merged


def _float32_on_host(name: str, leaf: ArrayLike) -> np.ndarray:
    """Returns all of an array on this host, also where other processes store parts of it."""
    if isinstance(leaf, jax.core.Tracer):
        raise MergeError(
            f"{name}: this method is computed on the host, not inside jit, grad or vmap"
        )
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf).astype(np.float32, copy=False)


def _merge_on_devices(rows: Mapping[str, Row], needs: Sequence[Requirements]) -> list[Leaves]:
    recipe = needs[0].recipe
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(dict(rows)))
    method, programs, placed = METHODS[recipe.method], {}, {}
    for name, row in rows.items():
        sharding = None if traced else widest_sharding(jax.tree.leaves(row))
        put = jnp.asarray if sharding is None else functools.partial(placed_on, sharding=sharding)
        placed[name] = jax.tree.map(put, row)
        sharding = sharding if isinstance(sharding, NamedSharding) else None
        programs[name] = Program(method, recipe.election, recipe.dtype, sharding)
    analysis = ShardedAnalysis(placed, programs, traced)
    inputs = [analysis.inputs(each) for each in needs]
    copies: dict[object, jax.Array] = {}
    merges: list[Leaves] = [{} for _ in needs]
    for name, row in placed.items():
        program = programs[name]
        each = [_replicated_once(every[name], program, copies) for every in inputs]
        shared, varied = _divided(each)
        if varied and method.coefficients is None:
            arrays = _merged_each(row, shared, varied, program)
        else:
            # Vectorized, the functions that coefficients are made by would be rounded otherwise.
            alone = each if varied else each[:1]
            arrays = [_merged(row, arguments, program) for arguments in alone]
        for index, merged in enumerate(merges):
            merged[name] = arrays[index % len(arrays)]
            if needs[index].copies(name) and row.experts[0].dtype == recipe.dtype:
                # With numbers that XLA rounds to 0 on a CPU; an array of its own, to be donated.
                merged[name] = row.experts[0] if traced else row.experts[0].copy()
    return merges


def _divided(
    inputs: Sequence[Mapping[str, Array]],
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns what all recipes take alike, and what not, stacked."""
    shared, varied = {}, {}
    for name, first in inputs[0].items():
        values = [each[name] for each in inputs]
        if all(_is_same(value, first) for value in values):
            shared[name] = first
        else:
            xp = jnp if any(isinstance(value, jax.Array) for value in values) else np
            varied[name] = xp.stack(values)
    return shared, varied


def _is_same(value: Array, other: Array) -> bool:
    on_device = isinstance(value, jax.Array) or isinstance(other, jax.Array)
    return value is other or (not on_device and np.array_equal(value, other))


def _replicated_once(
    inputs: Mapping[str, Array], program: Program, copies: dict[object, jax.Array]
) -> dict[str, Array]:
    """Returns inputs whose NumPy arrays are copied to all devices once, not for each parameter."""
    if program.sharding is None:
        return dict(inputs)
    sharding = NamedSharding(program.sharding.mesh, PartitionSpec())

    def copied(value: Array) -> jax.Array:
        if isinstance(value, jax.Array):
            return value
        key = (sharding, value.dtype, value.shape, value.tobytes())
        if key not in copies:
            copies[key] = jax.device_put(value, sharding)
        return copies[key]

    return jax.tree.map(copied, dict(inputs))


@functools.partial(jax.jit, static_argnames="program")
def _merged_each(
    row: Row, shared: Mapping[str, Array], varied: Mapping[str, Array], program: Program
) -> list[jax.Array]:
    """Merges a parameter by each recipe: the inputs that vary have a first axis of recipes."""
    merge = jax.vmap(lambda inputs: _merged(row, {**shared, **inputs}, program))
    return list(merge(dict(varied)))


@functools.partial(jax.jit, static_argnames="program")
def _merged(row: Row, inputs: Mapping[str, Array], program: Program) -> jax.Array:
    method, inputs = program.method, dict(inputs)
    if method.coefficients is not None:
        values = {name: inputs[name] for name in method.hyper_parameters}
        inputs["coefficients"] = method.coefficients(inputs.pop("products"), **values, xp=jnp)
    block = kernel.merged(method, program.election, *row, inputs)
    return constrained(block.astype(program.dtype), program.sharding)
