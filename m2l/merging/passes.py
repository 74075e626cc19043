"""One pass over a model's bytes: parts of its parameters, read and worked on by a few threads.

Memory is what the threads' buffers hold, whatever the model. A part that is read at once is worked
on in pieces of one of two lengths, so that a jitted function is compiled at most twice for each
form of place. Results come in the order of the parts, so that what they add up to does not depend
on the threads.
"""

import collections
import dataclasses
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import jax
import numpy as np

from m2l.checkpoints.spans import Span, TensorReader, cut

S, T = TypeVar("S"), TypeVar("T")

BLOCK = 1 << 19
"""Elements of a long piece, and the most: of 2^18 dispatch, 0.2 ms, costs more than is saved, and
of 2^20 the padding of what does not fill them; both took a twentieth more time."""

SHORT = 1 << 14
"""Elements of a short piece: norms and biases, and what is left at the end of a parameter."""

LARGE_CHUNK = 64 << 20
"""Bytes of a decoded chunk from which on one thread at a time decodes any."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Elements of a span that are worked on at once.

    Attributes:
        span: The span.
        first: The first of them, counted in the span.
        size: How many there are.
    """

    span: Span
    first: int
    size: int


def padded(size: int, block: int) -> int:
    """Returns the length that a piece of `size` elements is padded to."""
    return SHORT if size <= SHORT < block else block


def cores() -> int:
    """Returns how many threads can run at once on this machine."""
    return len(os.sched_getaffinity(0))


def grid(sources: Sequence[Mapping[str, TensorReader]], name: str) -> tuple[int, ...] | None:
    """Returns the boxes in which a parameter is best read: of the first source that has any."""
    chunks = (source[name].chunk for source in sources if name in source)
    return next((chunk for chunk in chunks if chunk is not None), None)


class Buffers:
    """Memory of one thread that spans are read into, again and again."""

    def __init__(self) -> None:
        self._arrays: dict[object, np.ndarray] = {}

    def take(self, key: object, length: int, dtype: np.dtype) -> np.ndarray:
        """Returns the thread's array for `key`, of whole pages: JAX can use it without copying."""
        nbytes = max(1, length * dtype.itemsize)
        memory = self._arrays.get(key)
        if memory is None or memory.nbytes < nbytes:
            memory = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
            self._arrays[key] = memory
        return memory[: length * dtype.itemsize].view(dtype)


class Pass:
    """Threads that read spans of several sources and do something with them.

    Args:
        sources: Of each source the parameters by name.
        threads: How many.
        block: The most elements of a piece.
        at_once: The most elements of a parameter that is stored in chunks that are read at once.
    """

    def __init__(
        self,
        sources: Sequence[Mapping[str, TensorReader]],
        threads: int,
        block: int,
        at_once: int,
    ):
        self.sources, self.block, self.at_once = sources, block, at_once
        self._threads = threads
        self._local = threading.local()
        self._devices = jax.local_devices()
        self._large = threading.Lock()
        self.pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> "Pass":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def buffers(self) -> Buffers:
        """Returns the calling thread's buffers."""
        if not hasattr(self._local, "buffers"):
            self._local.buffers = Buffers()
        return self._local.buffers

    def spans(self, names: Iterable[str], block: int | None = None) -> list[Span]:
        """Cuts parameters into what is read at once: chunks, or else blocks."""
        spans = []
        for name in names:
            shape = next(source[name] for source in self.sources if name in source).shape
            chunk = grid(self.sources, name)
            spans += cut(name, tuple(shape), chunk, self.at_once if chunk else block or self.block)
        return spans

    def read(self, span: Span, block: int) -> list[np.ndarray]:
        """Reads a span of every source, padded with zeros; valid until the thread's next call."""
        arrays = []
        length = padded(span.size, block)
        length = -(-span.size // length) * length
        for index, source in enumerate(self.sources):
            stored = source[span.name]
            array = self.buffers().take(index, length, stored.dtype)
            self.read_stored(stored, span, array[: span.size])
            array[span.size :] = 0
            arrays.append(array)
        return arrays

    def read_stored(self, stored: TensorReader, span: Span, out: np.ndarray) -> None:
        """Reads a span of a parameter; of large chunks one at a time is in memory."""
        nbytes = int(np.prod(stored.chunk or 0, dtype=np.int64)) * stored.dtype.itemsize
        if nbytes < LARGE_CHUNK:
            stored.read_span(span, out)
        else:
            with self._large:
                stored.read_span(span, out)

    def pieces(
        self, span: Span, block: int | None = None
    ) -> Iterator[tuple[Segment, list[np.ndarray]]]:
        """Reads a span and yields its pieces, padded to `block` or SHORT, of every source.

        The arrays are NumPy arrays, the thread's buffers, valid until its next span.
        """
        block = block or self.block
        arrays = self.read(span, block)
        length = padded(span.size, block)
        for first in range(0, span.size, length):
            piece = Segment(span, first, min(length, span.size - first))
            yield piece, [array[first : first + length] for array in arrays]

    def run(
        self,
        spans: Sequence[Span],
        act: Callable[[Segment, list[np.ndarray]], T],
        block: int | None = None,
    ) -> Iterator[tuple[Span, list[T]]]:
        """Calls `act(piece, arrays)` for each piece of each span; yields results in order."""

        def step(span: Span) -> list[T]:
            return [act(piece, arrays) for piece, arrays in self.pieces(span, block)]

        yield from self.map(step, spans)

    def map(self, step: Callable[[S], T], items: Iterable[S]) -> Iterator[tuple[S, T]]:
        """Calls `step(item)` for each item in some thread; yields results in order.

        Where there are several devices, what `step` compiles runs on one of them in turn.
        """

        def on_device(index: int, item: S) -> T:
            if len(self._devices) == 1:
                return step(item)
            with jax.default_device(self._devices[index % len(self._devices)]):
                return step(item)

        waiting: collections.deque[tuple[S, Future[T]]] = collections.deque()
        for index, item in enumerate(items):
            waiting.append((item, self.pool.submit(on_device, index, item)))
            if len(waiting) > 2 * self._threads:
                item, future = waiting.popleft()
                yield item, future.result()
        while waiting:
            item, future = waiting.popleft()
            yield item, future.result()
