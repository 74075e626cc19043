"""One pass over a model's bytes: spans of its parameters, read and worked on by a few threads.

Memory is what the threads' buffers hold, whatever the model; spans have one of two lengths, so that
a jitted function is compiled at most twice; results come in the order of the spans, so that what
they add up to does not depend on the threads.
"""

import collections
import dataclasses
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import jax
import numpy as np

T = TypeVar("T")

BLOCK = 1 << 19
"""Elements of a long span, and the most: of 2^18 dispatch, 0.2 ms, costs more than is saved, and of
2^20 the padding of what does not fill them; both took a twentieth more time."""

SHORT = 1 << 14
"""Elements of a short span: norms and biases, and what is left at the end of a parameter."""


class Stored(Protocol):
    """A parameter on disk."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    size: int

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """Reads elements [start, stop) in row-major order into `out`, 1-D and of the dtype."""


@dataclasses.dataclass(frozen=True)
class Span:
    """Elements [start, stop) of a parameter, in row-major order."""

    name: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many they are."""
        return self.stop - self.start


def spans(sizes: Mapping[str, int], block: int) -> list[Span]:
    """Cuts parameters into spans of at most `block` elements, the largest parameters first."""
    return [
        Span(name, start, min(start + block, sizes[name]))
        for name in sorted(sizes, key=sizes.get, reverse=True)
        for start in range(0, sizes[name], block)
    ]


def padded(size: int, block: int) -> int:
    """The length that a span of `size` elements is filled up to."""
    return SHORT if size <= SHORT < block else block


def cores() -> int:
    """How many threads can run at once here."""
    return len(os.sched_getaffinity(0))


class Buffers:
    """Memory of one thread that spans are read into, again and again."""

    def __init__(self) -> None:
        self._arrays: dict[tuple, np.ndarray] = {}

    def take(self, key: object, length: int, dtype: np.dtype) -> np.ndarray:
        """The thread's array for `key`: of whole pages, so that JAX can use it without copying."""
        found = self._arrays.get((key, length, dtype))
        if found is None:
            found = np.frombuffer(mmap.mmap(-1, length * dtype.itemsize), dtype)
            self._arrays[key, length, dtype] = found
        return found


class Pass:
    """Threads that read spans of several sources and do something with them.

    Args:
        sources: Of each source the parameters by name.
        threads: How many.
    """

    def __init__(self, sources: Sequence[Mapping[str, Stored]], threads: int):
        self._sources, self._threads = sources, threads
        self._local = threading.local()
        self._devices = jax.local_devices()
        self.pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> "Pass":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def buffers(self) -> Buffers:
        """The calling thread's."""
        if not hasattr(self._local, "buffers"):
            self._local.buffers = Buffers()
        return self._local.buffers

    def read(self, span: Span, length: int) -> list[np.ndarray]:
        """The span of every source, padded with zeros; valid until the thread's next call."""
        arrays = []
        for index, source in enumerate(self._sources):
            stored = source[span.name]
            array = self.buffers().take(index, length, stored.dtype)
            stored.read_into(span.start, span.stop, array[: span.size])
            array[span.size :] = 0
            arrays.append(array)
        return arrays

    def run(
        self, spans: Sequence[Span], act: Callable[[Span, list[np.ndarray]], T], block: int
    ) -> Iterator[tuple[Span, T]]:
        """Calls `act(span, arrays)` for each span in some thread; yields results in order.

        The arrays are padded to `block`, or SHORT. They are NumPy arrays, the thread's buffers,
        valid until its next span. Where there are several devices, what `act` compiles runs on one
        of them in turn.
        """

        def step(index: int, span: Span) -> T:
            arrays = self.read(span, padded(span.size, block))
            if len(self._devices) == 1:
                return act(span, arrays)
            with jax.default_device(self._devices[index % len(self._devices)]):
                return act(span, arrays)

        waiting: collections.deque[tuple[Span, Future[T]]] = collections.deque()
        for index, span in enumerate(spans):
            waiting.append((span, self.pool.submit(step, index, span)))
            if len(waiting) > 2 * self._threads:
                span, future = waiting.popleft()
                yield span, future.result()
        while waiting:
            span, future = waiting.popleft()
            yield span, future.result()
