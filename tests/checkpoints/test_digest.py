import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from m2l.checkpoints import digest, uint64
from m2l.checkpoints.spans import boxes, cut

MASK = 0xFFFFFFFF


def oracle(array: np.ndarray, start: int = 0) -> list[int]:
    """The sum, from the formula, in Python's integers."""
    width = min(array.dtype.itemsize, 4)
    words = np.ascontiguousarray(array).reshape(-1).view(f"u{width}")
    if array.dtype.itemsize > 4:
        start *= array.dtype.itemsize // 4
    sums = [0, 0, 0, 0]
    for index, word in enumerate(words.tolist(), start):
        place = (index % 2**32 * 0x9E3779B1 + index // 2**32 * 0x85EBCA77) & MASK
        place ^= place >> 15
        x = (word + place) & MASK
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
        x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
        x ^= x >> 16
        y = ((x ^ rotated(place, 13)) * 0x2C1B3C6D) & MASK
        y ^= y >> 15
        z = (x * (y | 1)) & MASK
        parts = (x, y, z ^ (z >> 16), x ^ rotated(y, 16))
        sums = [(a + b) & MASK for a, b in zip(sums, parts, strict=True)]
    return sums


def rotated(word: int, by: int) -> int:
    return ((word << by) | (word >> (32 - by))) & MASK


DTYPES = [
    np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.int8, np.bool_, np.float64, np.int64,
    ml_dtypes.float8_e4m3fn,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5, 2), (300,)])
def test_the_digest_is_the_sum_of_the_formula(shape, dtype):
    array = (np.random.default_rng(0).normal(size=shape) * 9).astype(dtype)
    assert digest.of_numpy(array).tolist() == oracle(array)
    if np.dtype(dtype).itemsize <= 4:
        assert np.asarray(digest.of_shards(jnp.asarray(array))).tolist() == oracle(array)


@pytest.mark.parametrize("start", [0, 5, 2**32 - 3, 2**40 + 11])
def test_positions_beyond_32_bits_count(start):
    array = np.arange(9, dtype=np.float32)
    assert digest.of_numpy(array, start).tolist() == oracle(array, start)


def test_digests_of_parts_add_up_to_that_of_the_whole():
    array = np.random.default_rng(1).normal(size=(1 << 18) + 77).astype(ml_dtypes.bfloat16)
    cuts = [0, 1, 1000, 1 << 17, array.size]
    parts = [digest.of_numpy(array[a:b], a) for a, b in itertools.pairwise(cuts)]
    assert functools.reduce(digest.add, parts).tolist() == digest.of_numpy(array).tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.int64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("chunk", [None, (2, 6, 10), (4, 6, 3), (3, 2, 10)])
def test_digests_of_spans_add_up_to_that_of_the_whole(chunk, dtype):
    array = (np.random.default_rng(5).normal(size=(4, 6, 10)) * 9).astype(dtype)
    total = np.zeros(4, np.uint32)
    for span in cut("a", array.shape, chunk, 17):
        flat = array.reshape(-1)[[span.position(i) for i in range(span.size)]]
        total = digest.add(total, digest.of_span(flat, span))
    assert total.tolist() == oracle(array)


@pytest.mark.parametrize("dtype", [np.float32, np.int64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("sides", [(4, 6, 10), (1, 3, 10), (2, 6, 5), (3, 2, 7), (1, 1, 4)])
def test_digests_of_boxes_add_up_to_that_of_the_whole(sides, dtype):
    array = (np.random.default_rng(6).normal(size=(4, 6, 10)) * 9).astype(dtype)
    parts = [digest.of_box(array[box], box, array.shape) for box in boxes(array.shape, sides)]
    assert functools.reduce(digest.add, parts).tolist() == oracle(array)


@pytest.mark.parametrize("shape", [(1 << 20, 1 << 14), (4, 1 << 31), (4, 1 << 33)])
def test_the_digest_of_a_box_is_that_of_its_rows(shape):
    data = np.arange(6, dtype=np.float32).reshape(2, 3)
    parts = [digest.of_numpy(row, (1 + i) * shape[1] + 5) for i, row in enumerate(data)]
    box = slice(1, 3), slice(5, 8)
    assert np.array_equal(digest.of_box(data, box, shape), digest.add(*parts))


def test_two_word_positions_give_the_digest_of_one_word_positions():
    array = jnp.asarray(np.random.default_rng(2).normal(size=(6, 5)), jnp.float32)
    words = jax.jit(lambda a: digest.of_elements(a, uint64.iota(a.shape)))(array)
    assert np.array_equal(words, digest.of_shards(array))


@pytest.mark.parametrize("spec", [(), ("x",), (None, "x")])
def test_a_sharded_array_has_the_digest_of_the_whole_without_a_collective(spec):
    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    array = np.random.default_rng(3).normal(size=(64, 48)).astype(np.float32)
    placed = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    with jax.set_mesh(mesh):  # as in a training loop
        assert np.array_equal(digest.of_shards(placed), digest.of_numpy(array))
    # As on accelerators, whose shards are digested where they are.
    shards = [shard for shard in placed.addressable_shards if shard.replica_id == 0]
    origins = [np.array([axis.start or 0 for axis in each.index], np.uint32) for each in shards]
    parts = [
        digest._of_shard(shard.data, origin, placed.shape)
        for shard, origin in zip(shards, origins, strict=True)
    ]
    assert functools.reduce(digest.add, parts).tolist() == digest.of_numpy(array).tolist()
    lowered = digest._of_shard.lower(shards[-1].data, origins[-1], placed.shape)
    assert "all-" not in lowered.compile().as_text()


def test_each_of_several_arrays_has_its_own_digest_whatever_their_order():
    arrays = {name: np.full((3, 2), number, np.float32) for number, name in enumerate("cab")}
    digests = digest.of_arrays({name: jnp.asarray(array) for name, array in arrays.items()})
    assert list(digests) == list("cab")
    for name, array in arrays.items():
        assert digests[name].tolist() == oracle(array)


def test_the_digest_of_a_shard_beyond_32_bits_is_that_of_its_positions():
    data = np.arange(6, dtype=np.float32).reshape(2, 3)
    shape, origin = (1 << 20, 1 << 14), (1 << 19, 5)
    words = digest._of_shard(data, np.array(origin, np.uint32), shape)
    box = tuple(slice(o, o + n) for o, n in zip(origin, data.shape, strict=True))
    assert np.array_equal(words, digest.of_box(data, box, shape))
    rows = [(origin[0] + row) * shape[1] + origin[1] for row in range(2)]
    parts = [digest.of_numpy(data[row], start) for row, start in enumerate(rows)]
    assert np.array_equal(words, digest.add(*parts))


def damaged(array: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    changed, words = array.copy(), array.view(np.uint32)
    i, j = (int(k) for k in rng.choice(array.size, 2, replace=False))
    if kind == "bit":
        changed.view(np.uint32)[i] ^= np.uint32(1 << int(rng.integers(32)))
    elif kind == "two bits":
        bit = np.uint32(1 << int(rng.integers(32)))
        changed.view(np.uint32)[i] ^= bit
        changed.view(np.uint32)[j] ^= bit
    elif kind == "exchange":
        changed.view(np.uint32)[[i, j]] = words[[j, i]]
    elif kind == "shift":
        changed = np.roll(array, 1 + i)
    elif kind == "zeros":
        first = min(i, array.size - 8)
        changed[first : first + 8] = 0
    return changed


@pytest.mark.parametrize("kind", ["bit", "two bits", "exchange", "shift", "zeros"])
def test_damage_changes_every_word_of_the_digest(kind):
    rng = np.random.default_rng(4)
    array = rng.normal(size=512).astype(np.float32)
    before = digest.of_numpy(array)
    for _ in range(200):
        after = digest.of_numpy(damaged(array, kind, rng))
        assert (after != before).all()
    assert len({digest.to_hex(digest.of_numpy(damaged(array, kind, rng))) for _ in range(20)}) > 10


def test_a_digest_is_written_as_32_hexadecimal_digits():
    words = np.array([1, 2, 0xFFFFFFFF, 0xABC], np.uint32)
    assert digest.to_hex(words) == "0000000100000002ffffffff00000abc"
    assert digest.is_digest(digest.to_hex(words)) and not digest.is_digest("0" * 64)
