"""Passes over models' bytes: parts of parameters, read and worked on by a few threads.

Memory is what the threads' buffers hold, whatever the model. A part that is read at once is worked
on in pieces of one of two lengths, so that a jitted function is compiled at most twice for each
form of place. Results come in the order of the parts, so that what they add up to does not depend
on the threads.
"""

import collections
import dataclasses
import functools
import itertools
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from m2l.checkpoints.adapters import AdaptedTensor
from m2l.checkpoints.digest import WIDE
from m2l.checkpoints.opening import Checkpoint
from m2l.checkpoints.spans import Span, TensorReader, cut, is_one
from m2l.distributed import Processes
from m2l.merging import kernel, randomness, thresholds
from m2l.merging.inputs import refuse_nonfinite
from m2l.merging.method_registry import Method
from m2l.merging.methods import Consensus
from m2l.merging.requirements import TABLE, Requirements, Scope, norm_rescale
from m2l.merging.thresholds import BitRange, Counts, ThresholdCache, Trimming
from m2l.typing import Json

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


def run_length(sources: Sequence[Mapping[str, TensorReader]], name: str, block: int) -> int:
    """Returns how many elements of a parameter in rows are best read at once: about `block`."""
    adapted = (s[name] for s in sources if isinstance(s.get(name), AdaptedTensor))
    return next((stored.best_run(block) for stored in adapted), block)


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
            length = block or run_length(self.sources, name, self.block)
            spans += cut(name, tuple(shape), chunk, self.at_once if chunk else length)
        return spans

    def read(self, span: Span, block: int) -> list[np.ndarray]:
        """Reads a span of every source, padded with zeros; valid until the thread's next call.

        A base that several adapters are put on, or that is a source as well, is read once.
        """
        arrays: list[np.ndarray] = []
        bases: list[tuple[TensorReader, np.ndarray]] = []
        length = padded(span.size, block)
        length = -(-span.size // length) * length
        for index, source in enumerate(self.sources):
            stored = source[span.name]
            array = self.buffers().take(index, length, stored.dtype)
            if isinstance(stored, AdaptedTensor):
                self._read_adapted(stored, span, array[: span.size], bases)
            else:
                self.read_stored(stored, span, array[: span.size])
                bases.append((stored, array[: span.size]))
            array[span.size :] = 0
            arrays.append(array)
        return arrays

    def _read_adapted(
        self,
        stored: AdaptedTensor,
        span: Span,
        out: np.ndarray,
        bases: list[tuple[TensorReader, np.ndarray]],
    ) -> None:
        """Reads a span of a base with an adapter; `bases` are what was read of the span."""
        block = next((block for base, block in bases if is_one(base, stored.base)), None)
        if block is None:
            block = self.buffers().take(("base", len(bases)), span.size, stored.base.dtype)
            self.read_stored(stored.base, span, block)
            bases.append((stored.base, block))
        stored.add_to(block, span, out)

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


RUNS, RUN = 2048, 512
"""A sample for thresholds: so many runs of so many consecutive entries."""

_SHORTER = 8  # So many times, of adapters' rows.

SAMPLED = 1 << 21
"""Diagnostics look at about so many parameters of each expert at most."""

SKIPPED = 16
"""Where parts of a chunk cost as much as all of it, samples are of one of so many chunks."""

_CELL, _WHOLE_CELL = 1 << 14, 1 << 18


@functools.cache
def _bits(method: Method, sparse: bool = False) -> Callable[..., tuple[list, list]]:
    """Returns the bits of the magnitudes, if not `sparse`, and their codes if there are limits."""

    def bits(
        base: jax.Array, experts: list, inputs: kernel.Inputs, limits: jax.Array | None = None
    ) -> tuple[list, list]:
        words = [kernel.bits(a) for a in kernel.magnitudes(method, base, experts, inputs)]
        codes = [] if limits is None else thresholds.codes(words, limits)
        return [] if sparse else words, codes

    return jax.jit(bits, compiler_options=WIDE)


def _everywhere(ranks: Sequence[Sequence[int]]) -> list[list[BitRange]]:
    return [[BitRange(0, thresholds.LARGEST) for _ in own] for own in ranks]


@functools.cache
def _sums(method: Method, consensus: Consensus) -> Callable[..., dict[str, jax.Array]]:
    return jax.jit(functools.partial(kernel.sums, method, consensus))


@functools.cache
def _norms(method: Method) -> Callable[..., dict[str, jax.Array]]:
    return jax.jit(functools.partial(kernel.norms, method))


class Analysis:
    """The passes over one merge's inputs that come before it.

    Args:
        needs: How to merge, and what that needs.
        base: The base, if the method has one.
        experts: The experts.
        sizes: Name -> elements, of all that is merged, in order.
        local: The names of which this process counts.
        written: The names of which it writes parts.
        processes: Those that read together.
        stream: Reads the base, if there is one, and the experts.
        advance: Told how many elements of the model were read.
        stage: A name, where the same processes do several.
    """

    def __init__(
        self,
        needs: Requirements,
        base: Checkpoint | None,
        experts: Sequence[Checkpoint],
        sizes: Mapping[str, int],
        local: Sequence[str],
        written: Sequence[str],
        processes: Processes,
        stream: Pass,
        advance: Callable[[int], None],
        stage: str = "",
    ):
        self.needs, self.recipe, self.method = needs, needs.recipe, needs.method
        self._uncounted = functools.lru_cache(8)(self.needs.inputs)
        self._base, self._experts, self._sizes = base, experts, sizes
        self._local, self._written = local, written
        self._processes, self._stream, self._advance = processes, stream, advance
        self._size = sum(sizes.values())
        self._serial, self._stage = itertools.count(), stage
        self._counted: dict[str, dict[str, np.ndarray | np.floating]] = {n: {} for n in sizes}
        self.sums: kernel.Sums = {}
        self.densities: list[float] | None = None

    def inputs(self, piece: Segment) -> dict[str, np.ndarray | np.floating]:
        """Returns what the method takes for a piece besides the parameters: `kernel.Inputs`."""
        span, name = piece.span, piece.span.name
        source = self._experts[0]
        inputs = self._uncounted(name) | self._counted[name]
        if self.method.draws and source.ours:
            # Of Hugging Face's tensors any may be transposed, and all are read by runs.
            _, transposed = source.name_of(name)
            shape = source.parameters[name].shape if transposed else (1,)
            inputs["place"] = randomness.transposed(span.start + piece.first, shape)
        elif self.method.draws:
            inputs["place"] = randomness.boxed(span, piece.first)
        return inputs

    def _gather(self, tag: str, arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        return self._processes.gather(f"{self._stage}{tag}", arrays)

    # The passes

    def run(self, diagnose: bool) -> None:
        """Counts all that the method needs and, if asked to, measures the task vectors."""
        needs, method = self.needs, self.method
        if method.ranks:
            self._find_tables()
        if needs.norms:
            for name, sums in self._sum_all("norms", _norms(method)).items():
                self._counted[name]["rescale"] = norm_rescale(sums["l1"], sums["l1_kept"])
        if needs.bounds is not None:
            for name, limits in self._bounds(needs.bounds).items():
                self._counted[name] |= limits
        if needs.limits:
            self._find_limits()
        if needs.products or needs.majority:
            self.sums = self._sum_all("products", _sums(method, self.recipe.election))
        if needs.products:
            kind = "products" if method.sums is None else "own"
            parts = {name: sums[kind] for name, sums in self.sums.items()}
            if needs.pooled:
                parts = dict.fromkeys(parts, sum(parts.values()))
            for name, part in parts.items():
                self._counted[name]["coefficients"] = self._coefficients(name, part)
        if needs.majority:
            sign = needs.zero_sign(sum(int(sums["majority"]) for sums in self.sums.values()))
            for counted in self._counted.values():
                counted["zero_sign"] = sign
        if diagnose:
            self.sums = self.sums or self.sample(_sums(method, self.recipe.election))

    def _bounds(self, needs: Requirements) -> dict[str, dict[str, np.ndarray | np.floating]]:
        """Returns the limits of the task vectors that have to be known before the method's own."""
        first = Analysis(
            *(needs, self._base, self._experts, self._sizes, self._local, self._written),
            *(self._processes, self._stream, self._advance, "bounds-"),
        )
        first._find_limits()
        return first._counted

    def _coefficients(self, name: str, products: np.ndarray) -> np.ndarray:
        values = self.needs.arguments(name, np.float64)
        return np.float32(self.method.coefficients(products, **values, xp=np))

    def _limits(self, rows: Sequence[Sequence[Trimming]]) -> dict[str, np.ndarray]:
        """Returns thresholds and, where there are any, ceilings, float32 [experts] each."""
        columns = [[t.threshold for t in column] for column in zip(*rows, strict=True)]
        names = self.needs.untrimmed()
        return {n: np.array(c, np.float32) for n, c in zip(names, columns, strict=True)}

    def _find_limits(self) -> None:
        scopes = self.needs.scopes(self._sizes)
        if self.recipe.scope == "tensor":
            entries = self._tensor_limits(scopes)
        else:
            entries = np.zeros(len(self._experts), np.int64)
            for scope in scopes:
                rows = self._model_limits(scope, is_whole=len(scopes) == 1)
                for limit, row in self._limits(rows).items():
                    for name in scope.names:
                        whole = self._counted[name].setdefault(limit, np.zeros_like(row))
                        whole[[*scope.experts]] = row[[*scope.experts]]
                for expert in scope.experts:
                    entries[expert] += rows[expert][0].kept - self._outliers(rows[expert])
        if self._size:
            self.densities = [int(count) / self._size for count in entries]

    @property
    def _select(self) -> Callable[..., list[list[Trimming]]]:
        own = self.method.magnitudes is not None
        return functools.partial(thresholds.select, minimum=self.needs.minimum, positive=own)

    def _outliers(self, row: Sequence[Trimming]) -> int:
        return row[1].kept if "ceilings" in self.method.inputs else 0

    def _model_limits(self, scope: Scope, is_whole: bool) -> list[list[Trimming]]:
        """Searches the limits of a scope that processes share: of the model, or of a part of it."""
        ranks = [*zip(*scope.ranks.values(), strict=True)]
        size = sum(self._sizes[name] for name in scope.names)
        local, members = set(self._local), set(scope.names)
        names = [name for name in self._sizes if name in local & members]
        cached = is_whole and not self.method.draws and self.method.magnitudes is None
        # Others have 0 there for the least of all.
        cached = cached and not (self.needs.minimum and size in itertools.chain(*ranks))
        cache = ThresholdCache(self._base, self._experts, self._sizes) if cached else None
        if cache is not None and (cached := self._cached(cache, ranks)):
            return cached

        def read(intervals: Sequence[Sequence[BitRange]]) -> list[list[Counts]]:
            counts = thresholds.packed(self._count(names, intervals))
            parts = self._gather(f"counts-{next(self._serial)}", counts)
            return thresholds.merge_counts([thresholds.unpacked(part, intervals) for part in parts])

        first = self._brackets(ranks) if is_whole else _everywhere(ranks)
        rows = self._select(read, first, ranks, size)
        if cache is not None and self._processes.index == 0:
            cache.put(ranks, rows)
        return rows

    def _cached(
        self, cache: ThresholdCache, ranks: Sequence[Sequence[int]]
    ) -> list[list[Trimming]] | None:
        """Returns the thresholds that a process has in its cache: the same in every process.

        Machines have caches of their own. A process that reads its thresholds there counts nothing,
        and the others would wait for its counts.
        """
        if self._processes.count == 1:
            return cache.get(ranks, self._size)

        rows = cache.get(ranks, self._size) or []
        cached = {
            "thresholds": np.array([[t.threshold for t in row] for row in rows], np.float32),
            "kept": np.array([[t.kept for t in row] for row in rows], np.int64),
        }
        for part in self._gather("cached", cached):
            if len(part["kept"]):
                return [
                    [Trimming(t, int(k), self._size) for t, k in zip(*row, strict=True)]
                    for row in zip(part["thresholds"], part["kept"], strict=True)
                ]
        return None

    def _brackets(self, ranks: Sequence[Sequence[int]]) -> list[list[BitRange]]:
        own = self.method.magnitudes is not None
        if self.method.draws or own or self._size <= RUNS * RUN:
            return _everywhere(ranks)
        parts = self._gather("sample", {"bits": self._sampled_bits()})
        sample = np.concatenate([part["bits"] for part in parts], axis=1)
        if not sample.shape[1]:
            return _everywhere(ranks)
        return [
            [thresholds.bracket(row, rank, self._size) for rank in own]
            for row, own in zip(sample, ranks, strict=True)
        ]

    def _sampled_bits(self) -> np.ndarray:
        """Runs at even distances through the model, this process's: uint32 [experts, runs, RUN].

        Of adapters' rows, in which magnitudes are alike, the runs are shorter and more.
        """
        if self._in_chunks(self._sizes):
            return self._sampled_chunks()
        local, spans, end = set(self._local), [], 0
        adapted = any(source.adapted is not None for source in self._experts)
        length = RUN // _SHORTER if adapted else RUN
        distance = -(-self._size * length // (RUNS * RUN))
        for name, size in self._sizes.items():
            begin, end = end, end + size
            # The middles of the parts of the model of which each has one.
            first = (distance // 2 - begin) % distance
            runs = -(-(size - length - first + 1) // distance)
            if name in local and runs > 0:
                spans.append(Span(name, first, length, runs, distance))
        total = sum(span.size for span in spans)
        sources = [self._base, *self._experts]
        dtypes = [{source.parameters[name].dtype for name in self._sizes} for source in sources]
        arrays = [
            np.zeros(RUNS * RUN, each.pop() if len(each) == 1 else np.float32) for each in dtypes
        ]
        for source, array in zip(sources, arrays, strict=True):
            place = 0
            for span in spans:
                stored, part = source.parameters[span.name], array[place : place + span.size]
                own = part if stored.dtype == array.dtype else np.empty(span.size, stored.dtype)
                getattr(stored, "read_sample", stored.read_span)(span, own)
                if own is not part:
                    part[:] = own
                place += span.size
        bits, _ = _bits(self.method)(arrays[0], arrays[1:], {})
        return np.stack(bits).reshape(len(self._experts), -1, length)[:, : total // length]

    def _in_chunks(self, names: Iterable[str]) -> bool:
        return any(grid(self._stream.sources, name) is not None for name in names)

    def _some_chunks(self) -> list[Span]:
        """Returns every SKIPPED-th chunk of the model that is one of this process's parameters."""
        chunks = self._stream.spans(self._sizes)
        local = set(self._local)
        first = min(SKIPPED, len(chunks)) // 2
        return [span for span in chunks[first::SKIPPED] if span.name in local]

    def _sampled_chunks(self) -> np.ndarray:
        """Runs of some chunks, where others would have to be decoded: as `_sampled_bits`."""
        bits = _bits(self.method)
        every = max(1, self._size // (SKIPPED * RUNS * RUN))

        def act(piece: Segment, arrays: list) -> np.ndarray:
            words, _ = bits(arrays[0], arrays[1:], {})
            runs = piece.size // RUN
            stacked = np.stack([np.asarray(a)[: runs * RUN] for a in words])
            return stacked.reshape(len(words), runs, RUN)[:, ::every]

        sampled = [np.zeros((len(self._experts), 0, RUN), np.uint32)]
        for _, pieces in self._stream.run(self._some_chunks(), act):
            sampled += pieces
        return np.concatenate(sampled, axis=1)

    def _count(
        self, names: Sequence[str], intervals: Sequence[Sequence[BitRange]]
    ) -> list[list[Counts]]:
        counts = [[Counts(interval) for interval in row] for row in intervals]
        limits = thresholds.edges(intervals)[:, :2]
        # Few entries are inside, and their bits cost less than those of all.
        sparse = len(intervals[0]) == 1 and not self.method.draws
        sparse = sparse and self.method.magnitudes is None and jax.default_backend() == "cpu"
        bits = _bits(self.method, sparse)

        def act(piece: Segment, arrays: list) -> list[list[tuple[np.ndarray, int]]]:
            words, codes = bits(arrays[0], arrays[1:], self.inputs(piece), limits)
            rows = []
            for place, (row, code) in enumerate(zip(intervals, codes, strict=True)):
                code = np.asarray(code)[: piece.size]
                if sparse:
                    inside = np.flatnonzero(code == 1)
                    places = row[0].places(thresholds.bits_at(arrays[0], arrays[1 + place], inside))
                    rows.append([(places, int(np.count_nonzero(code == 2)))])
                else:
                    rows.append(thresholds.find(row, np.asarray(words[place])[: piece.size], code))
            return rows

        for span, pieces in self._stream.run(self._stream.spans(names), act):
            for rows in pieces:
                for row, expert in zip(counts, rows, strict=True):
                    for each, (places, above) in zip(row, expert, strict=True):
                        each.add(places, above)
            self._advance(span.size)
            self._processes.check()
        return counts

    def _tensor_limits(self, scopes: Sequence[Scope]) -> np.ndarray:
        """Searches the limits of this process's parameters; returns how many entries they keep."""
        entries = np.zeros(len(self._experts), np.int64)
        limits, local = [], set(self._local)
        for (name,), _, by_limit in scopes:
            if name not in local:
                continue
            ranks = [*zip(*by_limit.values(), strict=True)]
            count = functools.partial(self._count, [name])
            rows = self._select(count, _everywhere(ranks), ranks, self._sizes[name])
            entries += [row[0].kept - self._outliers(row) for row in rows]
            limits.append(np.stack(list(self._limits(rows).values())))
        own = {
            "limits": np.stack(limits) if limits else np.zeros((0, 1), np.float32),
            "entries": entries,
            "names": np.array(list(self._local), np.str_),
        }
        parts = self._gather("limits", own)
        for part in parts:
            for name, rows in zip(part["names"], part["limits"], strict=True):
                self._counted[str(name)] |= dict(zip(self.needs.untrimmed(), rows, strict=True))
        return np.sum([part["entries"] for part in parts], axis=0)

    def _find_tables(self) -> None:
        """Counts the entries by the upper 16 bits of their magnitude, for drop rates by rank."""
        n = len(self._experts)
        bits = jax.jit(
            lambda base, experts: [
                kernel.bits(expert.astype(jnp.float32) - base.astype(jnp.float32))
                for expert in experts
            ]
        )

        def histogram(names: Sequence[str]) -> np.ndarray:
            counts = np.zeros((n, TABLE), np.int64)

            def act(piece: Segment, arrays: list) -> np.ndarray:
                words = [np.asarray(a)[: piece.size] for a in bits(arrays[0], arrays[1:])]
                if max(int(a.max(initial=0)) for a in words) > thresholds.LARGEST:
                    refuse_nonfinite([self._base, *self._experts], piece.span)
                return np.stack([np.bincount(a >> 16, minlength=TABLE) for a in words])

            for span, pieces in self._stream.run(self._stream.spans(names), act):
                counts += sum(pieces)
                self._advance(span.size)
                self._processes.check()
            return counts

        tables: dict[str, dict[str, np.ndarray]] = {}
        if self.recipe.scope == "model":
            parts = self._gather("ranks", {"counts": histogram(list(self._local))})
            counts = np.sum([part["counts"] for part in parts], axis=0)
            for names in self.needs.alike(self._sizes):
                tables |= dict.fromkeys(names, self.needs.table(counts, names[0]))
        else:
            # Too much to be gathered: what several processes write each of them counts.
            names = dict.fromkeys([*self._local, *self._written])
            tables = {name: self.needs.table(histogram([name]), name) for name in names}
        for name, table in tables.items():
            self._counted[name] |= table

    # Sums

    def _sum_all(self, tag: str, program: Callable[..., dict[str, jax.Array]]) -> kernel.Sums:
        """Sums over every parameter, exact to float32's rounding."""
        cells = self._stream.spans(self._local, _WHOLE_CELL)
        return self._gathered(tag, self._sum(program, cells, _WHOLE_CELL))

    def _gathered(self, tag: str, sums: kernel.Sums) -> kernel.Sums:
        """Returns the sums of all processes."""
        parts = self._gather(tag, kernel.flat(sums))
        return {k: v for part in parts for k, v in kernel.nested(part).items()}

    def sample(self, program: Callable[..., dict[str, jax.Array]]) -> kernel.Sums:
        """Sums over cells at even distances through each parameter that is not a small part."""
        share, cells = min(1.0, SAMPLED / self._size), []
        in_chunks = share < 1 and self._in_chunks(self._sizes)
        for name in () if in_chunks else self._local:
            whole = self._stream.spans([name], _CELL)
            if not whole or (share < 1 and self._sizes[name] < _CELL):
                continue
            wanted = max(1, round(len(whole) * share))
            places = np.unique(np.linspace(0, len(whole) - 1, wanted).round().astype(int))
            cells += [whole[place] for place in places]
        if in_chunks:
            cells = self._some_chunks()
        cell = _WHOLE_CELL if in_chunks else _CELL
        return self._gathered("diagnostics", self._sum(program, cells, cell))

    def _sum(
        self, program: Callable[..., dict[str, jax.Array]], cells: Sequence[Span], cell: int
    ) -> kernel.Sums:
        totals: kernel.Sums = {}

        def act(piece: Segment, arrays: list) -> dict[str, np.ndarray]:
            base, experts = (None, arrays) if self._base is None else (arrays[0], arrays[1:])
            sums = program(base, experts, self.inputs(piece))
            sums = {kind: np.asarray(array, np.float64) for kind, array in sums.items()}
            if not all(np.isfinite(array).all() for array in sums.values()):
                refuse_nonfinite([s for s in (self._base, *self._experts) if s], piece.span)
            return sums | {"entries": np.float64(piece.size)}

        for span, pieces in self._stream.run(cells, act, cell):
            total = totals.setdefault(span.name, {})
            for sums in pieces:
                for kind, array in sums.items():
                    total[kind] = total.get(kind, 0.0) + array
            self._advance(0)
            self._processes.check()
        return totals

    def diagnostics(self) -> dict[str, Json]:
        """Returns norms and cosines of the task vectors, realised densities, conflicts."""
        return kernel.summary(self.sums, self._sizes, self.densities)
