"""Exact radix selection of the k-th largest magnitude of arrays in memory.

The bits of a non-negative float32, read as an integer, are in the order of the numbers. A digit of
the result is found at a time: candidates for it share a reading of the arrays, which are neither
sorted nor copied. Counts are unsigned 64-bit integers as two words (see uint64.py).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from m2l.checkpoints import uint64

_WORD = 1 << 32
# The last two digits overlap: no number in question reaches the upper candidates of the last.
_SHIFTS = {1: range(30, -1, -1), 3: (*range(28, 0, -3), 0)}


def candidates(prefixes: jax.Array, shift: jax.Array, width: int) -> jax.Array:
    """Returns lower bounds with each digit but 0 added: uint32 [..., 2^width - 1] of [...]."""
    return prefixes[..., None] + (np.arange(1, 1 << width, dtype=np.uint32) << shift)


def count_at_least(bits: Sequence[jax.Array], candidates: jax.Array) -> jax.Array:
    """Counts the entries of each array that reach each candidate.

    Args:
        bits: Per expert, uint32 [arrays, ...], as `kernel.bits` returns them.
        candidates: uint32 [arrays, experts, candidates]; one row for all arrays will do.

    Returns:
        Words, uint32 [2, arrays, experts, candidates].
    """
    counts = []
    for expert, array in enumerate(bits):
        limits = candidates[:, expert].reshape(
            len(candidates), candidates.shape[-1], *(1,) * (array.ndim - 1)
        )
        masks = [(array >= limits[:, i]).astype(jnp.uint32) for i in range(limits.shape[1])]
        # One reduction of several operands: one loop over the array counts for all candidates.
        parts = jax.lax.reduce(
            masks, [jnp.uint32(0)] * len(masks), _add_pairs, _countable_axes(array.shape)
        )
        counts.append(jnp.stack([part.reshape(len(array), -1) for part in parts], axis=1))
    return jnp.stack(uint64.total(jnp.stack(counts, axis=1), axes=(-1,)))


def _add_pairs(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
    return [x + y for x, y in zip(a, b, strict=True)]


def _countable_axes(shape: Sequence[int]) -> tuple[int, ...]:
    """As many of the last axes, without the first, as a uint32 counts for sure."""
    axis, size = len(shape), 1
    while axis > 1 and size * shape[axis - 1] < _WORD:
        axis -= 1
        size *= shape[axis]
    return tuple(range(axis, len(shape)))


def next_prefixes(
    counts: uint64.Words, prefixes: jax.Array, ranks: np.ndarray, shift: jax.Array
) -> jax.Array:
    """Adds the next digit to the lower bounds of the k-th largest.

    Args:
        counts: Words of [groups, experts, candidates].
        prefixes: The lower bounds so far, uint32 [groups, experts].
        ranks: k of each group, from 1: uint32 [groups, 2], as `uint64.split` returns it.
        shift: The position of the digit.
    """
    ranks = [ranks[:, word, None, None] for word in (0, 1)]
    digits = uint64.at_least(counts, ranks).sum(-1, dtype=jnp.uint32)
    return prefixes + (digits << shift)


def kth_largest(
    step: Callable[[jax.Array, jax.Array, int], jax.Array], shape: tuple[int, int], traced: bool
) -> jax.Array:
    """Finds the k-th largest magnitude of each group of arrays and expert.

    Args:
        step: Makes the next prefixes of (prefixes, shift, width of a digit), as `next_prefixes`
            does of the counts of `candidates`.
        shape: How many groups, how many experts.
        traced: Whether to loop under a trace. Digits are bits then: of a reduction of several
            operands whose sharding is left to the compiler it gathers partial results. Otherwise
            prefixes are NumPy arrays between steps, so that each calls the same programs.

    Returns:
        float32 of that shape.
    """
    width = 1 if traced else 3
    shifts, prefixes = np.array(_SHIFTS[width], np.uint32), np.zeros(shape, np.uint32)
    if traced:
        prefixes = jax.lax.fori_loop(
            0,
            len(shifts),
            lambda i, prefixes: step(prefixes, jnp.asarray(shifts)[i], width),
            jnp.asarray(prefixes),
        )
        return jax.lax.bitcast_convert_type(prefixes, jnp.float32)
    for shift in shifts:
        prefixes = np.asarray(step(prefixes, shift, width))
    return prefixes.view(np.float32)
