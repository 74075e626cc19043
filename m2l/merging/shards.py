"""Arrays whose shards are on several devices: where they go, and what is summed over each shard."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from m2l.typing import PyTree


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
