"""What a merge in memory counts of whole models, over each shard of their arrays, and adds up.

No program communicates but those that add up what was counted: of each parameter, or of all.
"""

import collections
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from m2l.checkpoints import uint64
from m2l.merging import kernel, randomness, thresholds
from m2l.merging.method_registry import Method
from m2l.merging.methods import Consensus, task_vectors
from m2l.merging.requirements import TABLE, Array, Requirements, host_counts, norm_rescale
from m2l.typing import PyTree

_SMALL = 1 << 16
"""Elements: the magnitudes of smaller parameters are stacked before they are counted."""
_COUNTABLE = 1 << 31
_STACKED = 16
"""Parameters in a stack, at most: what compiles takes longer the more arguments there are."""


class Row(NamedTuple):
    """One parameter of every model, or a stack of such parameters."""

    base: jax.Array | None
    experts: list[jax.Array]
    statistics: list[jax.Array]


class Program(NamedTuple):
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


_Source = list[jax.Array] | tuple[Row, Mapping[str, Array]]


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
    program: Program


class ShardedAnalysis:
    """The counts of whole models that come before a merge in memory.

    Args:
        rows: The parameters by name, on the devices where they are merged.
        programs: What is compiled for each.
        traced: Whether any array is a tracer.
    """

    def __init__(self, rows: Mapping[str, Row], programs: Mapping[str, Program], traced: bool):
        self._rows, self._programs, self._traced = rows, programs, traced
        self._constants = jax.lax.stop_gradient(rows) if traced else rows
        # The limits that were searched, by what decides them.
        self._searched: dict[object, Inputs] = {}

    def inputs(self, needs: Requirements) -> Inputs:
        """Returns what a recipe's method takes for each parameter."""
        inputs: Inputs = {name: needs.inputs(name) for name in self._rows}
        if needs.method.draws:
            for row_inputs in inputs.values():
                row_inputs["place"] = randomness.straight(0)
        if needs.method.ranks:
            self._add_tables(inputs, needs)
        if needs.norms:
            for name, sums in self._summed(inputs).items():
                inputs[name]["rescale"] = norm_rescale(**sums, xp=jnp)
        if needs.bounds is not None:
            # Of the same task vectors, whatever is done with them.
            method = needs.bounds.method
            bounding = {n: p._replace(method=method) for n, p in self._programs.items()}
            nothing: Inputs = {name: {} for name in self._rows}
            key = "bounds", needs.recipe.scope
            self._add_limits(inputs, key, nothing, bounding, needs.bounds)
        if needs.limits:
            late = {"scale", "weights"}  # They come after trimming, unless magnitudes take them.
            if needs.method.magnitudes is not None:
                late -= {*inspect.signature(needs.method.magnitudes).parameters}
            numbers = needs.recipe.hyper_parameters.items()
            scales = needs.recipe.scales if len(late) < 2 else ()
            key = needs.recipe.seed, scales, *((k, v) for k, v in numbers if k not in late)
            self._add_limits(inputs, key, inputs, self._programs, needs)
        if needs.products:
            sums = self._summed(inputs)
            if needs.pooled:
                xp = jnp if self._traced else np
                total = {"products": sum(xp.asarray(each["products"]) for each in sums.values())}
                sums = dict.fromkeys(sums, total)
            for name, each in sums.items():
                inputs[name] |= each
        if needs.majority:
            self._add_zero_sign(inputs, needs)
        return inputs

    def _summed(self, inputs: Inputs) -> dict[str, dict[str, jax.Array]]:
        """Returns what `_sums` adds up, of each whole parameter."""
        programs = self._programs
        parts = [_sums(row, inputs[name], programs[name]) for name, row in self._rows.items()]
        totals = _totals(parts, tuple(programs[name].sharding for name in self._rows))
        return dict(zip(self._rows, totals, strict=True))

    def _add_tables(self, inputs: Inputs, needs: Requirements) -> None:
        """Adds the drop rates by rank to the inputs."""
        rows = self._constants
        counts = {name: _histogram(row, self._programs[name]) for name, row in rows.items()}
        by_model = needs.recipe.scope == "model"
        groups = needs.alike(rows) if by_model else [[name] for name in rows]
        shape = (needs.experts, TABLE)
        table = {name: jax.ShapeDtypeStruct(shape, dtype)
                 for name, dtype in (("cuts", np.uint32), ("rescales", np.float32))}  # fmt: skip
        for names in groups:
            inputs_by_rank = self._on_host(
                lambda *words, name=names[0]: needs.table(sum(map(host_counts, words)), name),
                table,
                [counts[name] for name in (rows if by_model else names)],
            )
            for name in names:
                inputs[name] |= inputs_by_rank

    def _add_zero_sign(self, inputs: Inputs, needs: Requirements) -> None:
        """Adds the sign of the majority of all masses to the inputs."""

        def elect(*words: np.ndarray) -> np.float32:
            positive, negative = sum(map(host_counts, words))
            return needs.zero_sign(int(positive) - int(negative))

        rows, programs = self._constants.items(), self._programs
        counts = [_signs(row, inputs[name], programs[name]) for name, row in rows]
        zero_sign = self._on_host(elect, jax.ShapeDtypeStruct((), np.float32), counts)
        for row_inputs in inputs.values():
            row_inputs["zero_sign"] = zero_sign

    def _on_host(
        self, function: Callable[..., PyTree], result: PyTree, arrays: Sequence[jax.Array]
    ) -> PyTree:
        """Calls a NumPy function of arrays, also within a program; `result` has its shapes."""
        if self._traced:
            return jax.pure_callback(function, result, *arrays, vmap_method="sequential")
        return function(*map(np.asarray, arrays))

    def _add_limits(
        self,
        inputs: Inputs,
        key: object,
        former: Inputs,
        programs: Mapping[str, Program],
        needs: Requirements,
    ) -> None:
        """Adds limits to the inputs; they are searched once for a key, of the former inputs."""
        if key not in self._searched:
            self._searched[key] = self._limits(former, programs, needs)
        for name, limits in self._searched[key].items():
            inputs[name] |= limits

    def _limits(
        self, inputs: Inputs, programs: Mapping[str, Program], needs: Requirements
    ) -> Inputs:
        """Returns the limits of each parameter: thresholds, and what `needs.untrimmed` names."""
        sizes = {name: row.base.size for name, row in self._rows.items()}
        scopes = needs.scopes(sizes)
        limits: Inputs = {name: {} for name in sizes}
        if needs.recipe.scope == "tensor":
            # A program for all, whose counts are of each.
            counted = self._counted(sizes, inputs, programs)
            ranks = {scope.names[0]: scope.ranks for scope in scopes}
            names = [name for part in counted for name in part.names]
            for limit in scopes[0].ranks:
                rows_of = [ranks[name][limit] for name in names]
                largest = self._largest(counted, rows_of, [sizes[n] for n in names], needs)
                for name, row in zip(names, largest, strict=True):
                    limits[name][limit] = row
            return limits
        xp = jnp if self._traced else np
        for scope in scopes:
            counted = self._counted(scope.names, inputs, programs)
            size = sum(sizes[name] for name in scope.names)
            members = np.isin(np.arange(needs.experts), scope.experts)
            for limit, own in scope.ranks.items():
                (row,) = self._largest(counted, [own], [size], needs)
                for name in scope.names:
                    former = limits[name].get(limit)
                    limits[name][limit] = row if former is None else xp.where(members, row, former)
        return limits

    def _counted(
        self,
        names: Iterable[str],
        inputs: Inputs,
        programs: Mapping[str, Program],
    ) -> list[_Counted]:
        """Returns parameters with the bits of their magnitudes, small ones of a kind together."""
        kinds, rows = collections.defaultdict(list), self._constants
        for name in names:
            row = rows[name]
            # A trace does not say whether parameters of one shape are sharded alike.
            small = not self._traced and row.base.size <= _SMALL
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
        self,
        counted: Sequence[_Counted],
        ranks: Sequence[Sequence[int]],
        sizes: Sequence[int],
        needs: Requirements,
    ) -> Array:
        """Finds the rank-th largest magnitude of each expert; infinity is before the first.

        Args:
            counted: All parameters.
            ranks: Of each expert; one row for all parameters together, or one for each, in the
                order of `counted`.
            sizes: Likewise, of how many; the last is taken to be 0, unless the minimum is needed.
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
                _counts(
                    part.source, candidates[place] if len(ranks) > 1 else candidates, part.program
                )
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
        xp = jnp if self._traced else np
        largest = thresholds.kth_largest(step, limits.shape, self._traced)
        if needs.method.magnitudes is not None:
            largest = xp.maximum(largest, thresholds.LEAST)
        return xp.where(searched, largest, limits)


@functools.partial(jax.jit, static_argnames="program")
def _sums(row: Row, inputs: Mapping[str, Array], program: Program) -> dict[str, jax.Array]:
    """Sums over each shard: products [shards, experts, experts]; or l1, l1_kept [shards, experts].

    As `kernel.sums` and `kernel.norms` return them; "products" are the method's own sums if any.
    """
    method = program.method
    vectors = kernel.float32(row.experts)
    if row.base is not None:
        vectors = task_vectors(row.base.astype(jnp.float32), vectors)
    if method.sums is not None:
        named = kernel.named(method.sums, inputs)

        def summed(vectors: Sequence[jax.Array], *values: jax.Array) -> jax.Array:
            return method.sums(vectors, **dict(zip(named, values, strict=True)))

        return {"products": per_shard(summed, program.sharding, vectors, *named.values())}
    if method.coefficients is not None:
        return {"products": per_shard(_products, program.sharding, vectors)}
    magnitudes = kernel.magnitudes(method, row.base, row.experts, inputs)
    return {
        "l1": per_shard(_norms, program.sharding, vectors),
        "l1_kept": per_shard(_norms, program.sharding, magnitudes),
    }


def _products(vectors: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.stack([jnp.sum(a * b) for b in vectors]) for a in vectors])


def _norms(vectors: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.sum(jnp.abs(vector)) for vector in vectors])


@functools.partial(jax.jit, static_argnames="shardings")
def _totals(
    parts: Sequence[dict[str, jax.Array]], shardings: Sequence[NamedSharding | None]
) -> list[dict[str, jax.Array]]:
    """Adds up, for each parameter, what `_sums` returned for its shards."""
    return [
        {name: replicated(array.sum(0), sharding) for name, array in sums.items()}
        for sums, sharding in zip(parts, shardings, strict=True)
    ]


@functools.partial(jax.jit, static_argnames="program")
def _histogram(row: Row, program: Program) -> jax.Array:
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
def _signs(row: Row, inputs: Mapping[str, Array], program: Program) -> jax.Array:
    """Counts the masses that are positive, and that are negative: words, uint32 [2, 2]."""
    mass = kernel.mass(program.method, program.election, row.base, row.experts, inputs)
    signs = [(mask.astype(jnp.uint32))[None] for mask in (mass > 0, mass < 0)]
    ones = jnp.ones((1, 2, 1), jnp.uint32)
    counts = per_shard(thresholds.count_at_least, program.sharding, signs, ones, stacked=True)
    return _total_words(counts.reshape(len(counts), 2, 2), program)


def _float32(row: Row) -> tuple[jax.Array, list[jax.Array]]:
    return row.base.astype(jnp.float32), kernel.float32(row.experts)


def _total_words(words: jax.Array, program: Program) -> jax.Array:
    """Adds up words, uint32 [shards, 2, ...]."""
    return replicated(jnp.stack(uint64.sum_leading(words)), program.sharding)


@functools.partial(jax.jit, static_argnames="program")
def _stacked_bits(
    sources: Sequence[tuple[Row, Mapping[str, Array]]], program: Program
) -> list[jax.Array]:
    """Returns the bits of the magnitudes of parameters of one kind, see `_Counted`."""
    stack = jax.tree.map(lambda *arrays: jnp.stack(arrays), *sources)
    # Fused into what follows, copies of many arrays are branches of its loop and slow to compile.
    stack = jax.lax.optimization_barrier(stack)
    return jax.vmap(lambda row, inputs: _bits(row, inputs, program))(*stack)


def _bits(row: Row, inputs: Mapping[str, Array], program: Program) -> list[jax.Array]:
    magnitudes = kernel.magnitudes(program.method, row.base, row.experts, inputs)
    return [kernel.bits(magnitude) for magnitude in magnitudes]


@functools.partial(jax.jit, static_argnames="program")
def _counts(source: _Source, candidates: jax.Array, program: Program) -> jax.Array:
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


def widest_sharding(arrays: Sequence[ArrayLike]) -> jax.sharding.Sharding | None:
    """Returns the sharding of the array on the most devices; None where no array has one."""
    shardings = [
        array.sharding
        for array in arrays
        if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)
    ]
    return max(shardings, key=lambda each: len(each.device_set), default=None)


def placed_on(array: ArrayLike, sharding: jax.sharding.Sharding) -> jax.Array:
    """Returns an array on the devices of a sharding: itself where it is there already."""
    same = isinstance(array, jax.Array) and array.sharding == sharding
    return array if same else jax.device_put(array, sharding)


def per_shard(
    function: Callable[..., PyTree],
    sharding: NamedSharding | None,
    arrays: Sequence[jax.Array],
    *operands: jax.Array,
    stacked: bool = False,
) -> PyTree:
    """Computes sums over each shard of arrays, without any communication.

    Args:
        function: Sums of (arrays, *operands).
        sharding: Of each parameter; None: one shard.
        arrays: Of one shape.
        operands: Replicated.
        stacked: Whether the first axis of the arrays is one of parameters.

    Returns:
        The function's results, with a leading axis of shards.
    """

    def sums(*operands: PyTree) -> PyTree:
        return jax.tree.map(lambda array: array[None], function(*operands))

    spec = () if sharding is None else sharding.spec
    axes = [axis for entry in spec if entry is not None for axis in np.atleast_1d(entry).tolist()]
    if not axes or not arrays[0].size:
        return sums(arrays, *operands)
    return jax.shard_map(
        sums,
        mesh=sharding.mesh,
        in_specs=(
            PartitionSpec(*(None,) * stacked, *spec),
            *(PartitionSpec(),) * len(operands),
        ),
        out_specs=PartitionSpec(tuple(axes)),
    )(arrays, *operands)


def replicated(array: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """Returns an array of a program on every device of a sharding's mesh, whole."""
    return constrained(array, sharding and NamedSharding(sharding.mesh, PartitionSpec()))


def constrained(array: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """Returns an array of a program, sharded so; as it is where there is no sharding."""
    # The axes of an Explicit mesh follow from the types of the operands.
    if sharding is None or AxisType.Explicit in sharding.mesh.axis_types:
        return array
    return jax.lax.with_sharding_constraint(array, sharding)
