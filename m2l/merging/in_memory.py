"""Merging parameters in memory: on any devices, sharded in any way, inside jit, differentiably.

A program is compiled per kind of parameter (shapes, dtypes, sharding) and called for each: a model
of a hundred layers compiles as fast as one of two. These programs do not communicate: sums over
parameters are taken over each shard, and those of all parameters and shards added by one program.
"""

import collections
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from m2l.checkpoints import uint64
from m2l.checkpoints.tensor_kinds import has_output_rows, is_float
from m2l.errors import MergeError
from m2l.merging import kernel, layerwise, randomness, spectral, thresholds
from m2l.merging.inputs import (
    array_kind,
    check_counts,
    check_matrices,
    differences,
    select_names,
)
from m2l.merging.method_registry import METHODS, Method
from m2l.merging.methods import Consensus, task_vectors
from m2l.merging.recipe import Recipe
from m2l.merging.requirements import TABLE, Array, Requirements, host_counts, norm_rescale
from m2l.merging.shards import (
    constrained,
    per_shard,
    placed_on,
    replicated,
    widest_sharding,
)
from m2l.typing import PyTree

Leaves = dict[str, PyTree]

_SMALL = 1 << 16
"""Elements: the magnitudes of smaller parameters are stacked before they are counted."""
_COUNTABLE = 1 << 31
_STACKED = 16
"""Parameters in a stack, at most: what compiles takes longer the more arguments there are."""


class _Row(NamedTuple):
    """One parameter of every model, or a stack of such parameters."""

    base: jax.Array | None
    experts: list[jax.Array]
    statistics: list[jax.Array]


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
        name: _Row(
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


def _unmerged(reference: Leaves, merged: Mapping[str, _Row], recipe: Recipe) -> Leaves:
    """Returns the leaves that are not merged: real numbers in the recipe's dtype."""
    return {
        name: jnp.asarray(leaf).astype(recipe.dtype) if is_float(_dtype(leaf)) else leaf
        for name, leaf in reference.items()
        if name not in merged
    }


def _merge_on_host(rows: Mapping[str, _Row], needs: Requirements) -> Leaves:
    merged, method = {}, needs.method
    check_matrices(method, {name: np.shape(row.experts[0]) for name, row in rows.items()})
    for name, row in rows.items():
        values = needs.arguments(name, np.float64)
        if method.of_matrices:
            base = None if row.base is None else _float32_on_host(name, row.base)
            reads = [functools.partial(_float32_on_host, name, leaf) for leaf in row.experts]
            has_rows = has_output_rows(name, False, {})
            result = spectral.merged(method, name, base, reads, has_rows, values)
        else:
            grams = [_whole(name, leaf) for leaf in row.statistics]
            experts = [_whole(name, leaf) for leaf in row.experts]
            values |= {} if row.base is None else {"base": _whole(name, row.base)}
            result = method.function(name=name, experts=experts, grams=grams or None, **values)
        result = result.astype(jnp.dtype(needs.recipe.dtype))
        sharding = widest_sharding(row.experts)
        merged[name] = (
            jnp.asarray(result)
            if sharding is None
            else jax.make_array_from_callback(result.shape, sharding, result.__getitem__)
        )
    return merged


def _float32_on_host(name: str, leaf: ArrayLike) -> np.ndarray:
    return _whole(name, leaf).astype(np.float32, copy=False)


def _whole(name: str, leaf: ArrayLike) -> np.ndarray:
    """Returns all of an array on this host, also where other processes store parts of it."""
    if isinstance(leaf, jax.core.Tracer):
        raise MergeError(
            f"{name}: this method is computed on the host, not inside jit, grad or vmap"
        )
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


class _Program(NamedTuple):
    """What a merge is compiled for, besides the kinds of its parameters.

    Attributes:
        method: The method.
        election: How signs are elected.
        dtype: Of the result.
        sharding: Of the parameter's arrays; None on one device, or where it is not known.
    """

    method: Method
    election: Consensus
    dtype: str
    sharding: NamedSharding | None


Inputs = dict[str, dict[str, Array]]
"""Of each parameter, by name: what the method takes besides it, see `kernel.Inputs`."""


def _merge_on_devices(rows: Mapping[str, _Row], needs: Sequence[Requirements]) -> list[Leaves]:
    recipe = needs[0].recipe
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(dict(rows)))
    method, programs, placed = METHODS[recipe.method], {}, {}
    for name, row in rows.items():
        sharding = None if traced else widest_sharding(jax.tree.leaves(row))
        put = jnp.asarray if sharding is None else functools.partial(placed_on, sharding=sharding)
        placed[name] = jax.tree.map(put, row)
        sharding = sharding if isinstance(sharding, NamedSharding) else None
        programs[name] = _Program(method, recipe.election, recipe.dtype, sharding)
    searched: dict[object, Inputs] = {}
    inputs = [_inputs(placed, programs, each, searched, traced) for each in needs]
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


def _inputs(
    rows: Mapping[str, _Row],
    programs: Mapping[str, _Program],
    needs: Requirements,
    searched: dict[object, Inputs],
    traced: bool,
) -> Inputs:
    """Returns what a recipe's method takes for each parameter.

    Args:
        rows: The parameters.
        programs: What is compiled for each.
        needs: What the recipe needs.
        searched: The limits of other recipes, by what decides them; those of this one are added.
        traced: Whether any array is a tracer.
    """
    inputs: Inputs = {name: needs.inputs(name) for name in rows}
    if needs.method.draws:
        for row_inputs in inputs.values():
            row_inputs["place"] = randomness.straight(0)
    constants = jax.lax.stop_gradient(rows) if traced else rows
    if needs.method.ranks:
        _add_tables(constants, inputs, programs, needs, traced)
    if needs.norms:
        for name, sums in _summed(rows, inputs, programs).items():
            inputs[name]["rescale"] = norm_rescale(**sums, xp=jnp)
    if needs.bounds is not None:
        # Of the same task vectors, whatever is done with them.
        bounding = {name: p._replace(method=needs.bounds.method) for name, p in programs.items()}
        key = "bounds", needs.recipe.scope
        if key not in searched:
            nothing: Inputs = {name: {} for name in rows}
            searched[key] = _limits(constants, nothing, bounding, needs.bounds, traced)
        for name, limits in searched[key].items():
            inputs[name] |= limits
    if needs.limits:
        late = {"scale", "weights"}  # They come after trimming, unless magnitudes take them.
        if needs.method.magnitudes is not None:
            late -= {*inspect.signature(needs.method.magnitudes).parameters}
        numbers = needs.recipe.hyper_parameters.items()
        scales = needs.recipe.scales if len(late) < 2 else ()
        key = needs.recipe.seed, scales, *((k, v) for k, v in numbers if k not in late)
        if key not in searched:
            searched[key] = _limits(constants, inputs, programs, needs, traced)
        for name, limits in searched[key].items():
            inputs[name] |= limits
    if needs.products:
        sums = _summed(rows, inputs, programs)
        if needs.pooled:
            xp = jnp if traced else np
            total = {"products": sum(xp.asarray(each["products"]) for each in sums.values())}
            sums = dict.fromkeys(sums, total)
        for name, each in sums.items():
            inputs[name] |= each
    if needs.majority:
        _add_zero_sign(constants, inputs, programs, needs, traced)
    return inputs


def _summed(
    rows: Mapping[str, _Row], inputs: Inputs, programs: Mapping[str, _Program]
) -> dict[str, dict[str, jax.Array]]:
    """Returns what `_sums` adds up, of each whole parameter."""
    parts = [_sums(row, inputs[name], programs[name]) for name, row in rows.items()]
    totals = _totals(parts, tuple(programs[name].sharding for name in rows))
    return dict(zip(rows, totals, strict=True))


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


def _add_tables(
    rows: Mapping[str, _Row],
    inputs: Inputs,
    programs: Mapping[str, _Program],
    needs: Requirements,
    traced: bool,
) -> None:
    """Adds the drop rates by rank to the inputs."""
    counts = {name: _histogram(row, programs[name]) for name, row in rows.items()}
    by_model = needs.recipe.scope == "model"
    groups = needs.alike(rows) if by_model else [[name] for name in rows]
    shape = (needs.experts, TABLE)
    table = {name: jax.ShapeDtypeStruct(shape, dtype)
             for name, dtype in (("cuts", np.uint32), ("rescales", np.float32))}  # fmt: skip
    for names in groups:
        inputs_by_rank = _on_host(
            lambda *words, name=names[0]: needs.table(sum(map(host_counts, words)), name),
            table,
            [counts[name] for name in (rows if by_model else names)],
            traced,
        )
        for name in names:
            inputs[name] |= inputs_by_rank


def _add_zero_sign(
    rows: Mapping[str, _Row],
    inputs: Inputs,
    programs: Mapping[str, _Program],
    needs: Requirements,
    traced: bool,
) -> None:
    """Adds the sign of the majority of all masses to the inputs."""

    def elect(*words: np.ndarray) -> np.float32:
        positive, negative = sum(map(host_counts, words))
        return needs.zero_sign(int(positive) - int(negative))

    counts = [_signs(row, inputs[name], programs[name]) for name, row in rows.items()]
    zero_sign = _on_host(elect, jax.ShapeDtypeStruct((), np.float32), counts, traced)
    for row_inputs in inputs.values():
        row_inputs["zero_sign"] = zero_sign


def _on_host(
    function: Callable[..., PyTree], result: PyTree, arrays: Sequence[jax.Array], traced: bool
) -> PyTree:
    """Calls a NumPy function of arrays, also within a program; its result has shapes `result`."""
    if traced:
        return jax.pure_callback(function, result, *arrays, vmap_method="sequential")
    return function(*map(np.asarray, arrays))


def _replicated_once(
    inputs: Mapping[str, Array], program: _Program, copies: dict[object, jax.Array]
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
    row: _Row, shared: Mapping[str, Array], varied: Mapping[str, Array], program: _Program
) -> list[jax.Array]:
    """Merges a parameter by each recipe: the inputs that vary have a first axis of recipes."""
    merge = jax.vmap(lambda inputs: _merged(row, {**shared, **inputs}, program))
    return list(merge(dict(varied)))


@functools.partial(jax.jit, static_argnames="program")
def _merged(row: _Row, inputs: Mapping[str, Array], program: _Program) -> jax.Array:
    method, inputs = program.method, dict(inputs)
    if method.coefficients is not None:
        values = {name: inputs[name] for name in method.hyper_parameters}
        inputs["coefficients"] = method.coefficients(inputs.pop("products"), **values, xp=jnp)
    block = kernel.merged(method, program.election, *row, inputs)
    return constrained(block.astype(program.dtype), program.sharding)


@functools.partial(jax.jit, static_argnames="program")
def _sums(row: _Row, inputs: Mapping[str, Array], program: _Program) -> dict[str, jax.Array]:
    """Sums over each shard: products [shards, experts, experts]; or l1, l1_kept [shards, experts].

    As `kernel.sums` and `kernel.norms` return them; "products" are the method's own sums if any.
    """
    method = program.method
    vectors = kernel.float32(row.experts)
    if row.base is not None:
        vectors = task_vectors(row.base.astype(jnp.float32), vectors)
    if method.sums is not None:
        named = kernel.named(method.sums, inputs)
        summed = functools.partial(_by_name, method.sums, tuple(named))
        return {"products": per_shard(summed, program.sharding, vectors, *named.values())}
    if method.coefficients is not None:
        return {"products": per_shard(_products, program.sharding, vectors)}
    magnitudes = kernel.magnitudes(method, row.base, row.experts, inputs)
    return {
        "l1": per_shard(_norms, program.sharding, vectors),
        "l1_kept": per_shard(_norms, program.sharding, magnitudes),
    }


def _by_name(
    function: Callable[..., jax.Array],
    names: Sequence[str],
    vectors: Sequence[jax.Array],
    *values: jax.Array,
) -> jax.Array:
    return function(vectors, **dict(zip(names, values, strict=True)))


def _products(vectors: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.stack([jnp.sum(a * b) for b in vectors]) for a in vectors])


def _norms(vectors: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.sum(jnp.abs(vector)) for vector in vectors])


@functools.partial(jax.jit, static_argnames="shardings")
def _totals(
    parts: Sequence[dict[str, jax.Array]], shardings: Sequence[NamedSharding | None]
) -> list[dict[str, jax.Array]]:
    """Adds up, for each parameter, what `_sums` returned for its"""
    return [
        {name: replicated(array.sum(0), sharding) for name, array in sums.items()}
        for sums, sharding in zip(parts, shardings, strict=True)
    ]


@functools.partial(jax.jit, static_argnames="program")
def _histogram(row: _Row, program: _Program) -> jax.Array:
    """Counts the entries with each upper 16 bits: words, uint32 [2, experts, TABLE]."""
    bits = [kernel.bits(tau) for tau in task_vectors(*_float32(row))]
    return _total_words(per_shard(_bins, program.sharding, bits), program)


def _bins(bits: Sequence[jax.Array]) -> jax.Array:
    """Returns words, uint32 [2, experts, TABLE], of the bits of each expert's magnitudes."""
    counts = []
    for array in bits:
        flat = (array >> np.uint32(16)).reshape(-1)
        # As many entries at once as a word counts for sure.
        parts = [flat[start : start + _COUNTABLE] for start in range(0, flat.size, _COUNTABLE)]
        zeros = jnp.zeros(TABLE, jnp.uint32)
        counts.append(jnp.stack([zeros, *(zeros.at[part].add(jnp.uint32(1)) for part in parts)]))
    return jnp.stack(uint64.total(jnp.stack(counts), axes=(1,)))


@functools.partial(jax.jit, static_argnames="program")
def _signs(row: _Row, inputs: Mapping[str, Array], program: _Program) -> jax.Array:
    """Counts the masses that are positive, and that are negative: words, uint32 [2, 2]."""
    mass = kernel.mass(program.method, program.election, row.base, row.experts, inputs)
    signs = [(mask.astype(jnp.uint32))[None] for mask in (mass > 0, mass < 0)]
    ones = jnp.ones((1, 2, 1), jnp.uint32)
    counts = per_shard(thresholds.count_at_least, program.sharding, signs, ones, stacked=True)
    return _total_words(counts.reshape(len(counts), 2, 2), program)


def _float32(row: _Row) -> tuple[jax.Array, list[jax.Array]]:
    return row.base.astype(jnp.float32), kernel.float32(row.experts)


def _total_words(words: jax.Array, program: _Program) -> jax.Array:
    """Adds up words, uint32 [shards, 2, ...]."""
    return replicated(jnp.stack(uint64.sum_leading(words)), program.sharding)


_Source = list[jax.Array] | tuple[_Row, Mapping[str, Array]]


class _Counted(NamedTuple):
    """Parameters whose magnitudes one call counts.

    Attributes:
        names: Theirs.
        source: The bits of their magnitudes, per expert uint32 [parameters, ...]; or, of one
            parameter, its arrays and inputs, of which they are computed at each count.
        program: What to compile.
    """

    names: list[str]
    source: _Source
    program: _Program


def _limits(
    rows: Mapping[str, _Row],
    inputs: Mapping[str, Mapping[str, Array]],
    programs: Mapping[str, _Program],
    needs: Requirements,
    traced: bool,
) -> Inputs:
    """Returns the limits of each parameter: thresholds, and what else `needs.untrimmed` names."""
    scopes = needs.scopes({name: row.base.size for name, row in rows.items()})
    limits: Inputs = {name: {} for name in rows}
    if needs.recipe.scope == "tensor":
        # A program for all, whose counts are of each.
        counted = _counted(rows, inputs, programs, traced)
        ranks = {scope.names[0]: scope.ranks for scope in scopes}
        for limit in scopes[0].ranks:
            names = [name for part in counted for name in part.names]
            sizes = [rows[name].base.size for name in names]
            rows_of = [ranks[name][limit] for name in names]
            largest = _largest(counted, rows_of, sizes, traced, needs)
            for name, row in zip(names, largest, strict=True):
                limits[name][limit] = row
        return limits
    for scope in scopes:
        part = {name: rows[name] for name in scope.names}
        counted = _counted(part, inputs, programs, traced)
        size = sum(row.base.size for row in part.values())
        members = np.isin(np.arange(needs.experts), scope.experts)
        for limit, own in scope.ranks.items():
            (row,) = _largest(counted, [own], [size], traced, needs)
            for name in scope.names:
                former = limits[name].get(limit)
                xp = jnp if traced else np
                limits[name][limit] = row if former is None else xp.where(members, row, former)
    return limits


def _counted(
    rows: Mapping[str, _Row],
    inputs: Mapping[str, Mapping[str, Array]],
    programs: Mapping[str, _Program],
    traced: bool,
) -> list[_Counted]:
    """Returns parameters with the bits of their magnitudes, small ones of a kind together."""
    kinds = collections.defaultdict(list)
    for name, row in rows.items():
        # A trace does not say whether parameters of one shape are sharded alike.
        small = not traced and row.base.size <= _SMALL
        specs = tuple((array.shape, array.dtype) for array in jax.tree.leaves(row))
        kinds[(specs, programs[name]) if small else name].append(name)
    parts = [
        names[start : start + _STACKED]
        for names in kinds.values()
        for start in range(0, len(names), _STACKED)
    ]
    counted = []
    for names in parts:
        sources = [(rows[name], jax.lax.stop_gradient(inputs[name])) for name in names]
        program = programs[names[0]]
        source = sources[0] if len(names) == 1 else _stacked_bits(sources, program)
        counted.append(_Counted(names, source, program))
    return counted


def _largest(
    counted: Sequence[_Counted],
    ranks: Sequence[Sequence[int]],
    sizes: Sequence[int],
    traced: bool,
    needs: Requirements,
) -> Array:
    """Finds the rank-th largest magnitude of each expert; infinity is before the first.

    Args:
        counted: All parameters.
        ranks: Of each expert; one row for all parameters together, or one for each, in the order
            of `counted`.
        sizes: Likewise, of how many; the last is taken to be 0, unless the minimum is needed.
        traced: Whether any array is a tracer.
        needs: What the recipe needs.

    Returns:
        float32 [ranks, experts].
    """
    shardings = tuple(part.program.sharding for part in counted)
    words = np.stack([[uint64.split(rank) for rank in row] for row in ranks])
    stops = np.cumsum([len(part.names) for part in counted]).tolist()
    places = [slice(stop - len(p.names), stop) for p, stop in zip(counted, stops, strict=True)]

    def step(prefixes: jax.Array, shift: jax.Array, width: int) -> jax.Array:
        candidates = thresholds.candidates(prefixes, shift, width)
        counts = [
            _counts(part.source, candidates[place] if len(ranks) > 1 else candidates, part.program)
            for part, place in zip(counted, places, strict=True)
        ]
        return _next_prefixes(counts, prefixes, words, shift, shardings)

    limits = np.where(np.array(ranks) == 0, np.float32(np.inf), np.float32(0))
    searched = np.array(
        [
            [0 < k < size + needs.minimum for k in row]
            for row, size in zip(ranks, sizes, strict=True)
        ]
    )
    if not searched.any():
        return limits
    xp = jnp if traced else np
    largest = thresholds.kth_largest(step, limits.shape, traced)
    if needs.method.magnitudes is not None:
        largest = xp.maximum(largest, thresholds.LEAST)
    return xp.where(searched, largest, limits)


@functools.partial(jax.jit, static_argnames="program")
def _stacked_bits(
    sources: Sequence[tuple[_Row, Mapping[str, Array]]], program: _Program
) -> list[jax.Array]:
    """Returns the bits of the magnitudes of parameters of one kind, see `_Counted`."""
    stack = jax.tree.map(lambda *arrays: jnp.stack(arrays), *sources)
    # Fused into what follows, copies of many arrays are branches of its loop and slow to compile.
    stack = jax.lax.optimization_barrier(stack)
    return jax.vmap(lambda row, inputs: _bits(row, inputs, program))(*stack)


def _bits(row: _Row, inputs: Mapping[str, Array], program: _Program) -> list[jax.Array]:
    magnitudes = kernel.magnitudes(program.method, row.base, row.experts, inputs)
    return [kernel.bits(magnitude) for magnitude in magnitudes]


@functools.partial(jax.jit, static_argnames="program")
def _counts(source: _Source, candidates: jax.Array, program: _Program) -> jax.Array:
    """Counts the magnitudes of each shard that reach candidates.

    Args:
        source: Of the parameters, see `_Counted`.
        candidates: uint32 [parameters or 1, experts, candidates].
        program: What is compiled.

    Returns:
        Words, uint32 [shards, 2, parameters, experts, candidates].
    """
    bits = source
    if not isinstance(source, list):
        bits = [array[None] for array in _bits(*source, program)]
    return per_shard(thresholds.count_at_least, program.sharding, bits, candidates, stacked=True)


@functools.partial(jax.jit, static_argnames="shardings")
def _next_prefixes(
    counts: Sequence[jax.Array],
    prefixes: jax.Array,
    ranks: jax.Array,
    shift: jax.Array,
    shardings: Sequence[NamedSharding | None],
) -> jax.Array:
    """Adds the next digit to prefixes [groups, experts]: one group is all parameters together."""
    words = []
    pairs = zip(shardings, counts, strict=True)
    for sharding, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        shards = jnp.concatenate([part for _, part in group], axis=2)
        words.append(replicated(jnp.stack(uint64.sum_leading(shards)), sharding))
    totals = jnp.concatenate(words, axis=1)
    if len(ranks) == 1:
        totals = jnp.stack(uint64.sum_leading(totals.swapaxes(0, 1)))[:, None]
    return thresholds.next_prefixes(totals, prefixes, ranks, shift)
