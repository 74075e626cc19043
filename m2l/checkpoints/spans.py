"""Parts of arrays: spans of elements, where they are in files, and blocks to convert.

Where the elements of an array follow one another in a file, a part is any run of them. Where they
are stored in chunks that are narrower than the array, a part is a box within a chunk, so that no
chunk is decoded twice. Either is so many rows of consecutive elements, equally far apart.
"""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import operator
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Protocol, TypeVar

import jax.numpy as jnp
import numpy as np

from m2l import storage
from m2l.errors import CheckpointError, M2LError
from m2l.storage import AnyPath

Index = tuple[slice | int, ...]
ArraySpec = tuple[tuple[int, ...], np.dtype]
"""Shape and dtype."""

T, R = TypeVar("T"), TypeVar("R")

FLOATS = ("float32", "bfloat16", "float16", "float64")
"""The dtypes that parameters may have on disk, by name."""

WORKERS = 3
"""How many arrays are worked on at a time, and so held in memory, at the most."""

_BLOCK_BYTES = 8 << 20
_TILE_BYTES = 1024  # of a side


@dataclasses.dataclass(frozen=True)
class Span:
    """Elements of an array: rows of consecutive ones, in row-major order.

    Element c of row r is that at position start + r * stride + c of the row-major array.

    Attributes:
        name: The array's.
        start: The position of the first element.
        columns: How many elements a row has.
        rows: How many rows there are.
        stride: From one row to the next; 0 where there is one.
        index: Of a box: what selects it from the array; None for a run of elements.
    """

    name: str
    start: int
    columns: int
    rows: int = 1
    stride: int = 0
    index: tuple[slice, ...] | None = None

    @property
    def size(self) -> int:
        """How many elements it has."""
        return self.rows * self.columns

    def position(self, element: int) -> int:
        """Returns the position in the array of an element of the span, both in row-major order."""
        row, column = divmod(element, self.columns)
        return self.start + row * self.stride + column


class TensorReader(Protocol):
    """An array in storage.

    Attributes:
        name: As "a/b/c".
        shape: Its shape.
        dtype: Its dtype.
        size: How many elements it has.
        chunk: The shape of the boxes in which it is stored and best read; None where any run of
            elements is read without reading others.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    size: int
    chunk: tuple[int, ...] | None

    def read_span(self, span: Span, out: np.ndarray) -> None:
        """Reads a span into `out`, 1-D, contiguous, of the dtype and the span's size.

        Raises:
            CheckpointError: A file or chunk is missing, truncated or damaged.
        """


def is_one(tensor: TensorReader, other: TensorReader) -> bool:
    """Returns whether two readers are known to be of the same elements in the same files."""
    extents = getattr(tensor, "extents", None)
    return tensor is other or (extents is not None and extents == getattr(other, "extents", None))


def cut(
    name: str, shape: tuple[int, ...], chunk: tuple[int, ...] | None, block: int
) -> Iterator[Span]:
    """Yields the spans of an array, of at most `block` elements each, that cover it once.

    Args:
        name: The array's.
        shape: Its shape.
        chunk: The boxes that no span may cross; None: none.
        block: The most elements of a span.
    """
    size = math.prod(shape)
    if not size:
        return
    if chunk is None or is_run(shape, chunk):
        for start, stop in _runs(size, chunk and math.prod(chunk), block):
            yield Span(name, start, stop - start)
        return
    for box in boxes(shape, chunk):
        origin, sides = [axis.start for axis in box], [axis.stop - axis.start for axis in box]
        yield from _boxes(name, shape, origin, sides, block)


def is_run(shape: tuple[int, ...], chunk: tuple[int, ...]) -> bool:
    """Returns whether the elements of each chunk follow one another in the array."""
    axis = next((axis for axis, length in enumerate(chunk) if length > 1), len(chunk))
    return all(c >= n for c, n in zip(chunk[axis + 1 :], shape[axis + 1 :], strict=True))


def boxes(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Yields the boxes of a grid of chunks, cut at the array's ends, in row-major order."""
    if math.prod(shape):
        axes = [range(0, length, part) for length, part in zip(shape, chunk, strict=True)]
        for origin in itertools.product(*axes):
            yield tuple(
                slice(o, min(o + c, n)) for o, c, n in zip(origin, chunk, shape, strict=True)
            )


def cut_box(
    name: str, shape: tuple[int, ...], box: tuple[slice, ...], block: int
) -> Iterator[Span]:
    """Yields the spans of a box of an array, as `cut` does of a whole one."""
    origin, sides = [axis.start for axis in box], [axis.stop - axis.start for axis in box]
    if not is_run(shape, tuple(sides)):
        yield from _boxes(name, shape, origin, sides, block)
        return
    strides = (math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    first = sum(o * stride for o, stride in zip(origin, strides, strict=True))
    for start, stop in _runs(math.prod(sides), None, block):
        yield Span(name, first + start, stop - start)


def read_rows(
    read_into: Callable[[int, int, np.ndarray], None], span: Span, out: np.ndarray
) -> None:
    """Reads a span by its rows; read_into(start, stop, out) reads a run of elements."""
    for row in range(span.rows):
        start, first = span.start + row * span.stride, row * span.columns
        read_into(start, start + span.columns, out[first : first + span.columns])


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is not stored as m2l lays it out, and is read in one piece.

    `read_all` returns the tensor of a name, which stays in memory while its parts are read.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read_all: Callable[[str], np.ndarray]
    file: Path | None = None

    chunk = None
    """It is in memory while its parts are read."""

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def memory(self) -> int:
        """The bytes that are in memory while its parts are read: two such, and one as stored."""
        return 3 * self.size * self.dtype.itemsize

    def read_span(self, span: Span, out: np.ndarray) -> None:
        """Reads a span into `out`, 1-D, contiguous, of the dtype and the span's size."""
        elements = self.read_all(self.name).reshape(-1)
        read_rows(lambda start, stop, row: np.copyto(row, elements[start:stop]), span, out)


def cached_reader(read: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
    """Returns `read` with the two last arrays in memory, for one thread at a time."""
    lock, cached = threading.Lock(), functools.lru_cache(2)(read)

    def read_cached(name: str) -> np.ndarray:
        with lock:
            return cached(name)

    return read_cached


def transposed_reader(tensor: TensorReader) -> LazyTensor:
    """Returns the transpose of a matrix in storage, which is read in one piece."""
    read = cached_reader(lambda _: np.ascontiguousarray(read_whole(tensor).T))
    file = getattr(tensor, "file", None)
    return LazyTensor(tensor.name, tuple(tensor.shape)[::-1], tensor.dtype, read, file)


def read_whole(tensor: TensorReader) -> np.ndarray:
    """Reads an array in storage; a digest that is recorded is not looked at."""
    array = np.empty(tensor.shape, tensor.dtype)
    tensor.read_span(Span(tensor.name, 0, array.size), array.reshape(-1))
    return array


def read_box(tensor: TensorReader, box: tuple[slice, ...]) -> np.ndarray:
    """Reads a box of an array in storage, in the box's shape."""
    out = np.empty([axis.stop - axis.start for axis in box], tensor.dtype)
    for span in cut_box(tensor.name, tuple(tensor.shape), box, max(1, out.size)):
        if span.index is None:
            tensor.read_span(span, out.reshape(-1))
            continue
        part = np.empty([axis.stop - axis.start for axis in span.index], tensor.dtype)
        tensor.read_span(span, part.reshape(-1))
        axes = zip(span.index, box, strict=True)
        out[tuple(slice(a.start - b.start, a.stop - b.start) for a, b in axes)] = part
    return out


def run_indices(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Index, int, int]]:
    """Cuts the row-major run [start, stop) into boxes: (index, first, last) position of each."""
    if start == stop:
        return
    if not shape:
        yield (), start, stop
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner
    partial = [(last, start, stop)] if first > last else []
    if first <= last:
        partial = [(first - 1, start, first * inner)] if start < first * inner else []
        if first < last:
            yield (slice(first, last),), first * inner, last * inner
        if last * inner < stop:
            partial.append((last, last * inner, stop))
    for row, begin, end in partial:
        for index, a, b in run_indices(shape[1:], begin - row * inner, end - row * inner):
            yield (row, *index), a + row * inner, b + row * inner


def _runs(size: int, chunk: int | None, block: int) -> Iterator[tuple[int, int]]:
    step = min(chunk or size, size)
    for first in range(0, size, step):
        last = min(first + step, size)
        for start in range(first, last, block):
            yield start, min(start + block, last)


def _boxes(
    name: str, shape: tuple[int, ...], origin: list[int], sides: list[int], block: int
) -> Iterator[Span]:
    """Cuts a box until its parts are equally distant rows, of at most `block` elements."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    # Rows end at the last axis of which not all is there; the axes before it count rows.
    last = max((axis for axis, n in enumerate(shape) if sides[axis] < n), default=0)
    varying = [axis for axis in range(last) if sides[axis] > 1]
    uneven = next(
        (a for a, b in itertools.pairwise(varying) if strides[a] != strides[b] * sides[b]), None
    )
    if uneven is not None or math.prod(sides) > block:
        axis = next(axis for axis, side in enumerate(sides) if side > 1)
        axis = axis if uneven is None else uneven
        inner = math.prod(sides) // sides[axis]
        step = 1 if uneven is not None else max(1, block // inner)
        for first in range(0, sides[axis], step):
            at, part = [*origin], [*sides]
            at[axis], part[axis] = at[axis] + first, min(step, sides[axis] - first)
            yield from _boxes(name, shape, at, part, block)
        return
    yield Span(
        name,
        start=sum(o * s for o, s in zip(origin, strides, strict=True)),
        columns=math.prod(sides[last:]),
        rows=math.prod(sides[:last]),
        stride=strides[varying[-1]] if varying else 0,
        index=tuple(slice(o, o + n) for o, n in zip(origin, sides, strict=True)),
    )


def is_array_shape(shape: object) -> bool:
    """Returns whether a value is a sequence of integers that NumPy can make an array of.

    NumPy refuses more than 64 axes and, whatever the other axes, 2**63 bytes.
    """
    return (
        isinstance(shape, list | tuple)
        and len(shape) <= 32
        and all(type(length) is int and length >= 0 for length in shape)
        and math.prod(max(1, length) for length in shape) < 2**58
    )


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive elements in a file or object, up to where the array's next piece starts.

    `start` is the index of the first in the row-major array, `offset` the place of its first byte.
    """

    start: int
    file: Path
    offset: int


@dataclasses.dataclass(frozen=True)
class Extents:
    """Where the elements of a row-major array are stored: plain little-endian numbers in files.

    No file stays open, so that it can be sent to other processes; reading and writing may go on
    in any number of threads and processes at once.

    Attributes:
        name: Whose elements they are, for messages.
        dtype: Their dtype.
        size: How many there are.
        pieces: Where they are, in order; empty if there are none.
        file_bytes: The size that each of the files has to have; None: not checked.
    """

    name: str
    dtype: np.dtype
    size: int
    pieces: tuple[Piece, ...]
    file_bytes: int | None = None

    def read_into(self, out: np.ndarray, start: int = 0) -> None:
        """Fills `out`, 1-D, contiguous and of the dtype, with the elements from `start` on.

        Raises:
            CheckpointError: A file is missing, truncated or cannot be read.
        """
        self._read(self._parts(out, start))

    def read_span(self, span: Span, out: np.ndarray) -> None:
        """Reads a span into `out`, 1-D, contiguous, of the dtype; errors as `read_into`'s."""
        starts = [span.start + row * span.stride for row in range(span.rows)]
        ends = [(row * span.columns, (row + 1) * span.columns) for row in range(span.rows)]
        self._read_runs(starts, ends, out)

    def read_rows(self, places: np.ndarray, out: np.ndarray) -> None:
        """Reads rows of the array as one of rows like those of `out`, [places, width].

        Rows that follow one another in both are read at once; errors as `read_into`'s.
        """
        width = out.shape[1]
        breaks = (np.flatnonzero(np.diff(places) != 1) + 1).tolist()
        ends = [*itertools.pairwise([0, *breaks, len(places)])] if len(places) else []
        starts = [int(places[first]) * width for first, _ in ends]
        self._read_runs(starts, [(a * width, b * width) for a, b in ends], out.reshape(-1))

    def _read_runs(
        self, starts: Sequence[int], ends: Sequence[tuple[int, int]], out: np.ndarray
    ) -> None:
        """Fills out[first:last], for each of `ends`, with the elements from a start on."""
        runs = zip(starts, ends, strict=True)
        if len(self.pieces) != 1 or not isinstance(self.pieces[0].file, Path):
            self._read(part for start, (a, b) in runs for part in self._parts(out[a:b], start))
            return
        # One file, and runs may be short: little is to be done for each.
        piece, width = self.pieces[0], self.dtype.itemsize
        memory = self._memory(out)
        with opening(piece.file, os.O_RDONLY, "read") as descriptor:
            self._check_size(piece.file, descriptor)
            for start, (first, last) in runs:
                self._check_run(start, start + last - first)
                buffer = memory[first * width : last * width]
                offset = piece.offset + (start - piece.start) * width
                while buffer:
                    count = os.preadv(descriptor, [buffer], offset)
                    if not count:
                        raise self._truncated(piece.file)
                    buffer, offset = buffer[count:], offset + count

    def _truncated(self, file: Path) -> CheckpointError:
        return CheckpointError(
            f"{file}: truncated: {self.name} ends after its end of file; copy or download it again"
        )

    def _read(self, parts: Iterable[tuple[AnyPath, int, memoryview]]) -> None:
        """Fills memory from places in files, each opened once while parts of it follow."""
        for file, group in itertools.groupby(parts, key=operator.itemgetter(0)):
            if not isinstance(file, Path):
                for _, offset, buffer in group:
                    buffer[:] = remote_bytes(file, offset, len(buffer))
                continue
            with opening(file, os.O_RDONLY, "read") as descriptor:
                self._check_size(file, descriptor)
                for _, offset, buffer in group:
                    while buffer:
                        count = os.preadv(descriptor, [buffer], offset)
                        if not count:
                            raise self._truncated(file)
                        buffer, offset = buffer[count:], offset + count

    def write_blocks(self, blocks: Iterable[np.ndarray]) -> str:
        """Writes all elements, in blocks that follow one another; returns their SHA-256, in hex.

        What is written is not read again for it.
        """
        sha256, start = hashlib.sha256(), 0
        for block in blocks:
            self.write_from(block, start)
            sha256.update(block.view(np.uint8))
            start += block.size
        return sha256.hexdigest()

    def write_from(self, block: np.ndarray, start: int = 0) -> None:
        """Writes `block`, 1-D, contiguous and of the dtype, as the elements from `start` on.

        The files exist, in full size; blocks may come in any order.

        Raises:
            CheckpointError: A file is missing or cannot be written, or the disk is full.
        """
        for file, offset, data in self._parts(block, start):
            with opening(file, os.O_WRONLY, "written") as descriptor:
                while data:
                    count = os.pwrite(descriptor, data, offset)
                    data, offset = data[count:], offset + count

    def _check_size(self, file: Path, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        if self.file_bytes not in (None, size):
            damage = "truncated" if size < self.file_bytes else "damaged"
            raise CheckpointError(
                f"{file}: {damage}: a chunk of {self.name} has {self.file_bytes:,} bytes, the file "
                f"has {size:,}; copy the checkpoint again or make it anew"
            )

    def files(self) -> list[Path]:
        """Returns the files that have elements, in order."""
        return list(dict.fromkeys(piece.file for piece in self.pieces))

    def _memory(self, array: np.ndarray) -> memoryview:
        """Returns the bytes of an array that elements are read into or written from."""
        if array.ndim != 1 or array.dtype != self.dtype or not array.flags.c_contiguous:
            raise ValueError(
                f"{self.name}: a contiguous {self.dtype} array of one axis is needed, not "
                f"{array.dtype}{list(array.shape)}"
            )
        return memoryview(array.view(np.uint8))

    def _check_run(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.size:
            raise ValueError(f"{self.name}: [{start}, {stop}) of its {self.size} elements")

    def _parts(self, array: np.ndarray, start: int) -> Iterator[tuple[Path, int, memoryview]]:
        """Yields (file, offset in it, memory) for the elements from `start` on."""
        stop = start + array.size
        self._check_run(start, stop)
        width, memory = self.dtype.itemsize, self._memory(array)
        number = bisect.bisect_right(self.pieces, start, key=lambda piece: piece.start) - 1
        position = start
        while position < stop:
            piece, number = self.pieces[number], number + 1
            last = number == len(self.pieces)
            end = stop if last else min(stop, self.pieces[number].start)
            part = memory[(position - start) * width : (end - start) * width]
            yield piece.file, piece.offset + (position - piece.start) * width, part
            position = end


def remote_bytes(file: AnyPath, offset: int, length: int) -> bytes:
    """Returns bytes of an object in a bucket.

    Raises:
        CheckpointError: It is missing, or ends before.
    """
    try:
        return storage.read_range(file, offset, length)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except M2LError as error:
        raise CheckpointError(str(error)) from error


@contextlib.contextmanager
def opening(file: Path, flags: int, done: str) -> Iterator[int]:
    """Yields a descriptor, and closes it at the end of the block.

    Args:
        file: The file.
        flags: As `os.open` takes them.
        done: What is done to the file, for the message: "read", "written".

    Raises:
        CheckpointError: Naming the file, for any OSError here or in the block.
    """
    descriptor = None
    try:
        descriptor = os.open(file, flags, 0o666)
        yield descriptor
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be {done} ({error.strerror})") from error
    finally:
        if descriptor is not None:
            os.close(descriptor)


def reserve(file: Path, size: int, start: bytes = b"") -> None:
    """Makes a file of `size` bytes that begins with `start`; one that exists keeps the rest.

    Raises:
        CheckpointError: It cannot be written, or the disk is full.
    """
    with opening(file, os.O_WRONLY | os.O_CREAT, "written") as descriptor:
        os.ftruncate(descriptor, size)
        if start:
            os.pwrite(descriptor, start, 0)


def in_parallel(
    work: Callable[[T], R],
    items: Iterable[T],
    done: Callable[[R], None] | None = None,
    workers: int = WORKERS,
) -> None:
    """Calls work(item) of every item in `workers` threads, and done(result) of each here.

    Raises:
        Exception: The first that one of them raises; then no further item is begun, and none is
            still worked on.
    """
    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in as_completed([pool.submit(work, item) for item in items]):
                result = future.result()
                if done is not None:
                    done(result)
        finally:
            pool.shutdown(cancel_futures=True)


def blocks(array: np.ndarray, dtype: np.dtype, name: str) -> Iterator[np.ndarray]:
    """Cuts an array into 1-D contiguous blocks of whole rows, about 8 MiB, in row-major order.

    Args:
        array: Of any strides: a transposed view is laid out block by block.
        dtype: What the blocks are to be cast to, rounding to the nearest.
        name: Whose values they are, for the message.

    Raises:
        CheckpointError: A finite value is too large for `dtype`.
    """
    if not array.ndim:
        array = array.reshape(1)
    rows = max(1, _BLOCK_BYTES // max(1, math.prod(array.shape[1:]) * dtype.itemsize))
    for start in range(0, len(array), rows):
        yield _cast(_contiguous(array[start : start + rows]), dtype, name).reshape(-1)


def _contiguous(array: np.ndarray) -> np.ndarray:
    if array.flags.c_contiguous or array.ndim != 2 or array.strides[0] >= array.strides[1]:
        return np.ascontiguousarray(array)
    out = np.empty(array.shape, array.dtype)
    # In tiles that the cache holds: several times as fast as NumPy copies a transposed view. Each
    # by way of rows that no power of two is apart, for such rows push each other out of it.
    side = max(1, _TILE_BYTES // array.itemsize)
    buffer = np.empty((side, side + 64), array.dtype)
    for row in range(0, array.shape[0], side):
        for column in range(0, array.shape[1], side):
            place = slice(row, row + side), slice(column, column + side)
            source = array[place].T
            tile = buffer[: source.shape[0], : source.shape[1]]
            tile[...] = source
            out[place] = tile.T
    return out


def _cast(block: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    if block.dtype == dtype:
        return block
    with np.errstate(over="ignore", invalid="ignore"):
        cast = block.astype(dtype)
    largest = float(jnp.finfo(dtype).max)
    if largest < float(jnp.finfo(block.dtype).max):
        lost = np.isinf(cast)
        if lost.any() and not np.isinf(block[lost]).all():
            value = float(np.abs(block[np.isfinite(block)]).max())
            raise CheckpointError(
                f"{name}: {value:.6g} is too large for {dtype.name}, which ends at {largest:.6g}; "
                "choose bfloat16 or float32"
            )
    return cast
