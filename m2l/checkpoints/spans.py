"""Parts of arrays: what one block of a merge reads from every model and writes.

Where the elements of an array follow one another in a file, a part is any run of them. Where they
are stored in chunks that are narrower than the array, a part is a box within a chunk, so that no
chunk is decoded twice. Either is so many rows of consecutive elements, equally far apart.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

Index = tuple[slice | int, ...]


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
        """The position in the array of an element of the span, counted in row-major order."""
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
    """Whether the elements of each chunk follow one another in the array."""
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
