"""Digests of arrays that do not depend on who computes them, in which pieces, or in what order.

The digest of an array is a sum over its elements, modulo 2^32 in each of four words, of a mix of
the element's bits and its row-major position. Sums of parts add up to the digest of the whole, so
shards are digested where they are, blocks while they are merged, and chunks as they are read.

What it detects: for one position, the first word is a bijection of the bits, so a change of one
element is always detected. Other damage (elements exchanged or shifted, blocks of zeros, several
flipped bits) changes a sum of well mixed words; two arrays that differ by accident have equal
digests with a probability of about 2^-128. It is no cryptographic hash: whoever may choose both
arrays can make two of one digest. Shape and dtype are not part of it; a manifest records them.
"""

import functools
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from m2l.checkpoints import uint64
from m2l.checkpoints.spans import Span, TensorReader, cut, cut_box, in_parallel

NOTHING = np.zeros(4, np.uint32)
"""The digest of no elements."""

_NO_MESH = jax.sharding.Mesh(np.empty((), object), ())
_BLOCKS = 1 << 18, 1 << 16, 1 << 14
_BLOCK = _BLOCKS[0]
_COLUMNS = 256
_PATTERN = re.compile("[0-9a-f]{32}")

# Odd constants with well spread bits, and shifts, of known good 32-bit mixers (Steele et al. 2014,
# doi:10.1145/2660193.2660195; Wellons, "Prospecting for Hash Functions", 2018).
_LOW, _HIGH = np.uint32(0x9E3779B1), np.uint32(0x85EBCA77)
_MIX = np.uint32(0x7FEB352D), np.uint32(0x846CA68B), np.uint32(0x2C1B3C6D)

WIDE = {"xla_cpu_prefer_vector_width": 512}
"""For compiling what works on each element by itself: wider than XLA's choice on a CPU that can;
the numbers are the same."""


def is_digest(value: object) -> bool:
    """Returns whether a value is a digest as `to_hex` writes it."""
    return isinstance(value, str) and _PATTERN.fullmatch(value) is not None


def to_hex(words: np.ndarray | jax.Array) -> str:
    """Returns the text of a digest, 32 hexadecimal digits, of its words, uint32 [4]."""
    return "".join(f"{int(word):08x}" for word in np.asarray(words))


def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the digest of an array of those of two disjoint parts: uint32 [4] each."""
    return np.add(a, b, dtype=np.uint32)


def bits(array: jax.Array) -> jax.Array:
    """Returns the bits of elements of at most 4 bytes, uint32, of the array's shape."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    return jax.lax.bitcast_convert_type(array, kind).astype(jnp.uint32)


def mixed(words: jax.Array, low: jax.Array, high: jax.Array) -> list[jax.Array]:
    """Returns what each element adds to the four words of a digest.

    Args:
        words: The elements' `bits`, uint32.
        low: Their positions modulo 2^32, uint32, broadcast to the shape of `words`.
        high: The positions divided by 2^32, uint32, broadcast likewise.
    """
    place = low * _LOW + high * _HIGH
    place = place ^ (place >> np.uint32(15))
    x = words + place
    x = (x ^ (x >> np.uint32(16))) * _MIX[0]
    x = (x ^ (x >> np.uint32(15))) * _MIX[1]
    x = x ^ (x >> np.uint32(16))
    y = (x ^ _rotated(place, 13)) * _MIX[2]
    y = y ^ (y >> np.uint32(15))
    z = x * (y | np.uint32(1))
    return [x, y, z ^ (z >> np.uint32(16)), x ^ _rotated(y, 16)]


def _rotated(words: jax.Array, count: int) -> jax.Array:
    return (words << np.uint32(count)) | (words >> np.uint32(32 - count))


def of_elements(
    elements: jax.Array, positions: uint64.Words, counted: jax.Array | None = None
) -> jax.Array:
    """Returns the digest of some elements of an array; for use under jit.

    Args:
        elements: Of any shape and a dtype of at most 4 bytes.
        positions: Their positions in the array: (high, low) words, uint32, broadcast to the shape.
        counted: Which of them count, boolean; None: all.

    Returns:
        uint32 [4].
    """
    parts = mixed(bits(elements), positions[1], positions[0])
    if counted is not None:
        parts = [jnp.where(counted, part, 0) for part in parts]
    if elements.ndim == 1 and elements.size % _COLUMNS == 0 and elements.size:
        # Four sums in one loop, by columns, which XLA vectorizes on a CPU.
        rows = [part.reshape(-1, _COLUMNS) for part in parts]
        parts = list(jax.lax.reduce(rows, [np.uint32(0)] * 4, _add_all, (0,)))
    return jnp.stack([jnp.sum(part, dtype=jnp.uint32) for part in parts])


def _add_all(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
    return [x + y for x, y in zip(a, b, strict=True)]


def of_arrays(arrays: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Returns the digests, uint32 [4], of arrays by name, computed where their shards are.

    Of arrays that are sharded over several processes each computes its own shards' part, and the
    words are gathered once for all arrays: every process must call it.
    """
    digests: dict[str, np.ndarray] = dict.fromkeys(arrays, NOTHING)

    def compute(name: str) -> None:
        digests[name] = of_shards(arrays[name])

    in_parallel(compute, arrays)
    distributed = [name for name, array in arrays.items() if not array.is_fully_addressable]
    return digests | sum_over_processes({name: digests[name] for name in distributed})


def of_shards(array: jax.Array) -> np.ndarray:
    """Returns the part, uint32 [4], that this process's shards have in an array's digest.

    Of equal shards the first counts. Shards in the memory of this host are digested without
    compiling for their shapes; others on their devices.
    """
    return deferred(array)()


def deferred(array: jax.Array) -> Callable[[], np.ndarray]:
    """Returns what computes the part that `of_shards` returns, for any thread to call later.

    It is of the values as they are now, although the array is donated meanwhile: shards in the
    memory of this host stay there until then, others are digested now.
    """
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    on_host = [
        (np.asarray(shard.data), shard.index) for shard in shards if shard.device.platform == "cpu"
    ]
    # Each shard is computed on its own device, whatever mesh the caller has entered.
    with jax.set_mesh(_NO_MESH):
        parts = [
            _of_shard(shard.data, _origin(shard.index, array.ndim), tuple(array.shape))
            for shard in shards
            if shard.device.platform != "cpu"
        ]
    shape = array.shape

    def compute() -> np.ndarray:
        words = [of_box(elements, index, shape) for elements, index in on_host]
        return functools.reduce(add, words + jax.device_get(parts), NOTHING)

    return compute


def of_box(elements: np.ndarray, index: Sequence[slice], shape: Sequence[int]) -> np.ndarray:
    """Returns the part, uint32 [4], that a box has in the digest of an array of a shape.

    Args:
        elements: Those of the box, in this host's memory.
        index: Where the box is in the array, a slice per axis.
        shape: The array's.
    """
    ends = zip(_origin(index, len(shape)).tolist(), elements.shape, strict=True)
    box = tuple(slice(start, start + length) for start, length in ends)
    total = NOTHING
    if not elements.size:
        return total
    for span in cut_box("", tuple(shape), box, elements.size):
        part = elements
        if span.index is not None:
            axes = zip(span.index, box, strict=True)
            part = elements[tuple(slice(a.start - b.start, a.stop - b.start) for a, b in axes)]
        total = add(total, of_span(np.ascontiguousarray(part).reshape(-1), span))
    return total


def sum_over_processes(parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the digests, uint32 [4], of arrays by name of the parts that each process has.

    Every process must call it, with the same names.
    """
    if not parts:
        return {}
    everywhere = multihost_utils.process_allgather(np.stack(list(parts.values())))
    sums = np.asarray(everywhere).reshape(-1, len(parts), 4).sum(0, dtype=np.uint32)
    return dict(zip(parts, sums, strict=True))


def _origin(index: Sequence[slice], axes: int) -> np.ndarray:
    return np.array([axis.start or 0 for axis in index], np.uint32).reshape(axes)


@functools.partial(jax.jit, static_argnames="shape")
def _of_shard(data: jax.Array, origin: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the digest of a shard whose first element is at `origin` of an array of a shape."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    along = [
        jax.lax.broadcasted_iota(jnp.uint32, data.shape, axis) + origin[axis]
        for axis in range(data.ndim)
    ]
    if math.prod(shape) < 1 << 32:
        low = jnp.zeros(data.shape, jnp.uint32)
        for index, stride in zip(along, strides, strict=True):
            low += index * np.uint32(stride)
        return of_elements(data, (jnp.uint32(0), low))
    zero = jnp.zeros(data.shape, jnp.uint32)
    positions = (zero, zero)
    for index, stride in zip(along, strides, strict=True):
        positions = uint64.add(positions, uint64.multiply((zero, index), uint64.split(stride)))
    return of_elements(data, positions)


def of_numpy(array: np.ndarray, start: int = 0) -> np.ndarray:
    """Returns the digest, uint32 [4], of elements that follow one another in an array.

    Args:
        array: The elements, of any shape and dtype; those of 8 bytes or more count as several.
        start: The position of the first.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    return of_span(flat, Span("", start, max(1, flat.size)))


def of_span(elements: np.ndarray, span: Span) -> np.ndarray:
    """Returns the digest, uint32 [4], of the elements of a span, 1-D and contiguous."""
    words = max(1, elements.dtype.itemsize // 4)
    if words > 1:
        elements = elements.view(np.uint32)
    start, columns, stride = span.start * words, span.columns * words, span.stride * words
    if span.rows == 1 or columns > _BLOCK:
        rows = elements.reshape(span.rows, -1)
        parts = [_of_consecutive(row, start + i * stride) for i, row in enumerate(rows)]
        return functools.reduce(add, parts, NOTHING)
    total, step = NOTHING, min(_BLOCK // columns, max(1, (1 << 32) // stride - 1))
    offsets, row = _row_offsets(step, columns, stride), 0
    while row < span.rows:
        block = elements[row * columns : min(row + step, span.rows) * columns]
        rows = max(1, min(block.size, _block_size(block.size)) // columns)
        block = _padded(block[: rows * columns])
        place = uint64.split(start + row * stride)
        part = _of_offsets(block, np.int32(rows * columns), place, offsets[: block.size])
        total, row = add(total, np.asarray(part)), row + rows
    return total


def _of_consecutive(elements: np.ndarray, start: int) -> np.ndarray:
    total, first = NOTHING, 0
    while first < elements.size:
        block = elements[first : first + _block_size(elements.size - first)]
        part = _of_run(_padded(block), np.int32(block.size), uint64.split(start + first))
        total, first = add(total, np.asarray(part)), first + block.size
    return total


def _block_size(size: int) -> int:
    """Returns the largest size of a block that so many elements fill, or the smallest there is."""
    return next((block for block in _BLOCKS if block <= size), _BLOCKS[-1])


def _padded(block: np.ndarray) -> np.ndarray:
    """Returns a block with zeros up to a size that is compiled for."""
    size = next(each for each in reversed(_BLOCKS) if each >= block.size)
    if block.size == size:
        return block
    return np.concatenate([block, np.zeros(size - block.size, block.dtype)])


@functools.lru_cache(16)
def _row_offsets(rows: int, columns: int, stride: int) -> np.ndarray:
    """Returns where the elements of rows are, counted from the first, uint32 [_BLOCK].

    On the host, once for all arrays of a shape: XLA divides integers slowly on a CPU.
    """
    offsets = np.zeros(_BLOCK, np.uint32)
    starts = np.arange(rows, dtype=np.uint32) * np.uint32(stride if rows > 1 else 0)
    offsets[: rows * columns] = np.add.outer(starts, np.arange(columns, dtype=np.uint32)).ravel()
    return offsets


def of_stored(tensor: TensorReader, block: int = _BLOCK) -> np.ndarray:
    """Returns the digest, uint32 [4], of an array in storage, read in blocks of elements."""
    total = NOTHING
    for span in cut(tensor.name, tuple(tensor.shape), tensor.chunk, block):
        elements = np.empty(span.size, tensor.dtype)
        tensor.read_span(span, elements)
        total = add(total, of_span(elements, span))
    return total


def sha256_of_stored(tensor: TensorReader) -> str:
    """Returns the SHA-256, in hex, of an array in storage, row-major, read in blocks."""
    sha256, block = hashlib.sha256(), np.empty(min(_BLOCK, max(1, tensor.size)), tensor.dtype)
    for start in range(0, tensor.size, block.size):
        part = block[: tensor.size - start]
        tensor.read_span(Span(tensor.name, start, part.size), part)
        sha256.update(part.view(np.uint8))
    return sha256.hexdigest()


@functools.partial(jax.jit, compiler_options=WIDE)
def _of_run(block: jax.Array, size: jax.Array, start: jax.Array) -> jax.Array:
    index = jax.lax.iota(jnp.uint32, block.size)
    positions = uint64.add((jnp.uint32(0), index), start)
    return of_elements(block, positions, index < size.astype(jnp.uint32))


@functools.partial(jax.jit, compiler_options=WIDE)
def _of_offsets(
    block: jax.Array, size: jax.Array, start: jax.Array, offsets: jax.Array
) -> jax.Array:
    index = jax.lax.iota(jnp.uint32, block.size)
    positions = uint64.add((jnp.uint32(0), offsets), start)
    return of_elements(block, positions, index < size.astype(jnp.uint32))
