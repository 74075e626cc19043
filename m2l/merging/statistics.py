"""The k-th largest magnitude of a whole model, exactly, in two readings and a few megabytes.

The bits of a non-negative float32, read as an integer, are in the order of the numbers. So a
histogram of the upper 16 bits finds the bin that the k-th largest lies in, and one of the lower 16
bits within that bin finds the number itself: a radix select. Any number of densities share the two
readings.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

_BINS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Trimming:
    """What trimming one task vector to a density comes to.

    Attributes:
        threshold: Entries of at least this magnitude are kept: 0 keeps all, infinity none.
        kept: How many those are; ties at the threshold make it more than was asked for.
        size: Of how many.
    """

    threshold: np.float32
    kept: int
    size: int


def kept_of(size: int, density: float) -> int:
    """How many of `size` entries a density keeps: rounded down, as in the TIES paper's code."""
    return int(size * density)


def trimmings(
    read: Callable[[], Iterable[Sequence[np.ndarray]]], experts: int, densities: Sequence[float]
) -> list[list[Trimming]]:
    """Finds the exact thresholds of every expert for every density.

    Args:
        read: Starts a reading: blocks, each with one array per expert of magnitudes as the uint32
            bits of float32. Called twice.
        experts: How many there are.
        densities: The shares of entries to keep, each in (0, 1].

    Returns:
        A list per expert of a Trimming per density.
    """
    upper = np.zeros((experts, _BINS), np.int64)
    for block in read():
        for counts, bits in zip(upper, block, strict=True):
            counts += np.bincount(bits >> np.uint32(16), minlength=_BINS)
    size = int(upper[0].sum())
    ranks = [kept_of(size, density) for density in densities]
    lower = [
        {_bin_of(counts, rank)[0]: np.zeros(_BINS, np.int64) for rank in ranks if rank}
        for counts in upper
    ]
    for block in read():
        for bins, bits in zip(lower, block, strict=True):
            high = bits >> np.uint32(16)
            for bin_, counts in bins.items():
                within = bits[high == bin_] & np.uint32(_BINS - 1)
                counts += np.bincount(within, minlength=_BINS)

    def trimming(expert: int, rank: int) -> Trimming:
        if rank == size or rank == 0:
            return Trimming(np.float32(0 if rank else np.inf), rank, size)
        high, above = _bin_of(upper[expert], rank)
        low, above_low = _bin_of(lower[expert][high], rank - above)
        kept = above + above_low + int(lower[expert][high][low])
        return Trimming(np.uint32(high << 16 | low).view(np.float32), kept, size)

    return [[trimming(expert, rank) for rank in ranks] for expert in range(experts)]


def _bin_of(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th largest (from 1), and how many lie in the bins above it."""
    at_least = np.cumsum(counts[::-1])
    index = int(np.searchsorted(at_least, rank))
    return len(counts) - 1 - index, int(at_least[index] - counts[::-1][index])


def kth_largest(experts: Sequence[Sequence[jax.Array]], k: int) -> jax.Array:
    """The k-th largest (from 1) of all entries of each expert's arrays, exactly.

    For arrays in memory, wherever they are sharded: bit by bit, the largest number that at least k
    entries reach; 31 counts, no sort and no copy. Jittable; no gradient flows through it.

    Args:
        experts: Per expert, non-negative float32 arrays of any shapes, together of less than 2^32
            entries.
        k: The rank.

    Returns:
        float32 [experts].
    """
    bits = [[jax.lax.bitcast_convert_type(a, jnp.uint32) for a in arrays] for arrays in experts]

    def reached(arrays: Sequence[jax.Array], candidate: jax.Array) -> jax.Array:
        return sum(jnp.sum(array >= candidate, dtype=jnp.uint32) for array in arrays)

    def set_bit(step: jax.Array, found: jax.Array) -> jax.Array:
        candidates = found | (jnp.uint32(1) << (30 - step).astype(jnp.uint32))
        counts = jnp.stack([reached(*pair) for pair in zip(bits, candidates, strict=True)])
        return jnp.where(counts >= np.uint32(k), candidates, found)

    found = jax.lax.fori_loop(0, 31, set_bit, jnp.zeros(len(bits), jnp.uint32))
    return jax.lax.bitcast_convert_type(found, jnp.float32)
