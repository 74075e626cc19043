"""Unsigned 64-bit integers as two words of 32 bits, which JAX has under jit without x64.

Arithmetic is modulo 2^64. A number is (high word, low word): uint32 arrays that broadcast.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Words = Sequence[jax.Array]


def split(number: int) -> np.ndarray:
    """Returns the words of a Python integer, uint32 [2]."""
    return np.array([number >> 32, number & 0xFFFFFFFF], np.uint32)


def add(a: Words, b: Words) -> tuple[jax.Array, jax.Array]:
    """Returns a + b."""
    low = a[1] + b[1]
    return a[0] + b[0] + (low < b[1]).astype(jnp.uint32), low


def multiply(a: Words, b: Words) -> tuple[jax.Array, jax.Array]:
    """Returns a b."""
    half, sixteen = np.uint32(0xFFFF), np.uint32(16)
    (a_high, a_low), (b_high, b_low) = [(w >> sixteen, w & half) for w in (a[1], b[1])]
    # The high word of the product of the low words, by halves: no sum here exceeds 32 bits.
    first = a_high * b_low + ((a_low * b_low) >> sixteen)
    second = a_low * b_high + (first & half)
    high = a_high * b_high + (first >> sixteen) + (second >> sixteen)
    return high + a[0] * b[1] + a[1] * b[0], a[1] * b[1]


def at_least(a: Words, b: Words) -> jax.Array:
    """Returns a >= b, boolean."""
    return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))


def total(numbers: jax.Array, axes: Sequence[int] | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of a uint32 array along axes, by default along all."""
    zero, axes = jnp.uint32(0), tuple(range(numbers.ndim) if axes is None else axes)
    if all(numbers.shape[axis] == 1 for axis in axes):
        low = jnp.squeeze(numbers, axes)
        return jnp.zeros_like(low), low
    axes = tuple(axis % numbers.ndim for axis in axes)
    return jax.lax.reduce((jnp.zeros_like(numbers), numbers), (zero, zero), add, axes)


def sum_leading(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of up to 65,536 numbers, as uint32 [numbers, 2, ...].

    By plain sums of half words, which a sharded first axis turns into an all-reduce.
    """
    half, sixteen = np.uint32(0xFFFF), np.uint32(16)
    (high, low), zero = words.swapaxes(0, 1), jnp.uint32(0)
    upper, lower = (low >> sixteen).sum(0, dtype=jnp.uint32), (low & half).sum(0, dtype=jnp.uint32)
    carried = add((upper >> sixteen, upper << sixteen), (zero, lower))
    return add((high.sum(0, dtype=jnp.uint32), zero), carried)


def iota(shape: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Returns the row-major index of each entry of an array of that shape."""
    index: Words = (jnp.zeros((), jnp.uint32), jnp.zeros((), jnp.uint32))
    for length in shape:
        # A word counts so far along an axis.
        starts = range(0, length, 1 << 32)
        parts = [jax.lax.iota(jnp.uint32, min(length - start, 1 << 32)) for start in starts]
        highs = [jnp.full_like(part, number) for number, part in enumerate(parts)]
        along = [jnp.concatenate(words) if parts else jnp.zeros(0, jnp.uint32)
                 for words in (highs, parts)]  # fmt: skip
        rows = multiply(index, split(length))
        index = add([row[..., None] for row in rows], along)
    return index[0], index[1]
