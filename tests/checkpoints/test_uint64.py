"""Two words of 32 bits calculate as Python's integers do, modulo 2^64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l.checkpoints import uint64

EDGES = [0, 1, 2, 0xFFFF, 0x10000, 2**32 - 1, 2**32, 2**32 + 1, 2**48 + 3, 2**63, 2**64 - 1]
RANDOM = np.random.default_rng(0).integers(0, 2**64, 20, np.uint64).tolist()
PAIRS = [*itertools.product(EDGES, EDGES), *zip(RANDOM, RANDOM[::-1], strict=True)]


def words(numbers):
    return jnp.asarray(np.stack([uint64.split(number) for number in numbers], axis=1))


def integers(pair):
    high, low = (np.asarray(word).astype(object) for word in pair)
    return np.asarray(high * 2**32 + low, object).tolist()


@pytest.mark.parametrize(
    ("operation", "wanted"),
    [
        (uint64.add, lambda a, b: (a + b) % 2**64),
        (uint64.multiply, lambda a, b: a * b % 2**64),
    ],
    ids=["add", "multiply"],
)
def test_arithmetic_is_that_of_integers(operation, wanted):
    left, right = zip(*PAIRS, strict=True)
    result = integers(jax.jit(operation)(words(left), words(right)))
    assert result == [wanted(a, b) for a, b in PAIRS]


def test_comparison_is_that_of_integers():
    left, right = zip(*PAIRS, strict=True)
    result = np.asarray(jax.jit(uint64.at_least)(words(left), words(right)))
    assert result.tolist() == [a >= b for a, b in PAIRS]


@pytest.mark.parametrize(
    "numbers",
    [[], [7], [2**32 - 1], [2**32 - 1, 1], [2**32 - 1] * 65537, [2**31] * 6 + [1]],
    ids=lambda numbers: str(len(numbers)),
)
def test_a_total_of_words_carries(numbers):
    high, low = jax.jit(uint64.total)(jnp.array(numbers, jnp.uint32))
    assert (int(high) << 32) + int(low) == sum(numbers)


@pytest.mark.parametrize("length", [1, 2, 65536])
def test_a_sum_along_the_first_axis_carries(length):
    numbers = [(i << 32) + 2**32 - 1 - (i % 2) for i in range(length)]
    result = jax.jit(uint64.sum_leading)(words(numbers).T)
    assert (int(result[0]) << 32) + int(result[1]) == sum(numbers)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 5), (0, 4), (4, 0)])
def test_an_index_is_row_major(shape):
    result = jax.jit(uint64.iota, static_argnums=0)(shape)
    assert integers(result) == np.arange(np.prod(shape, dtype=int)).reshape(shape).tolist()


@pytest.mark.parametrize("shape", [(5, 2**31), (2**16, 2**17), (3 * 2**32 + 1,), (7, 1, 2**32)])
def test_the_last_index_of_more_elements_than_a_word_counts_is_right(shape):
    def last(shape):
        return [jnp.max(word, axis=tuple(range(word.ndim))) for word in uint64.iota(shape)]

    # Too large to compute: shapes alone, and then the last element of the same arithmetic.
    assert all(word.shape == () for word in jax.eval_shape(lambda: last(shape)))
    index = words([0])
    for length in shape:
        index = uint64.add(uint64.multiply(index, words([length])), words([length - 1]))
    assert integers(index) == [np.prod(shape, dtype=object) - 1]
