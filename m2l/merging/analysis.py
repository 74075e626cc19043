"""What must be known of whole models before a block of them can be merged, and what is of interest.

Thresholds, tables of drop rates by rank, inner products: each found in passes over the bytes, by
any number of processes together, each of which reads its own part of the parameters.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2l.checkpoints.digest import WIDE
from m2l.checkpoints.opening import Checkpoint
from m2l.checkpoints.spans import Span
from m2l.distributed import Processes
from m2l.merging import diagnostics, kernel, randomness, thresholds
from m2l.merging.cache import Cache
from m2l.merging.method import Consensus
from m2l.merging.methods import METHODS
from m2l.merging.passes import Pass, Piece, grid
from m2l.merging.recipe import Recipe
from m2l.merging.sources import refuse_nonfinite
from m2l.merging.thresholds import Counts, Interval, Trimming

RUNS, RUN = 2048, 512
"""A sample for thresholds: so many runs of so many consecutive entries."""

SAMPLED = 1 << 21
"""Diagnostics look at about so many parameters of each expert at most."""

SKIPPED = 16
"""Where parts of a chunk cost as much as all of it, samples are of one of so many chunks."""

_CELL, _WHOLE_CELL = 1 << 14, 1 << 18
_TABLE = 1 << 16


Measure = Callable[..., dict[str, jax.Array]]
"""Sums over a span: of the base (None without one), the experts, and what `given` returns."""


@functools.cache
def _bits(name: str, sparse: bool) -> Callable[..., tuple[list[jax.Array], list[jax.Array]]]:
    """The bits of the magnitudes, and their codes; of `sparse`, no bits."""
    method = METHODS[name]

    def bits(base: jax.Array, experts: list, limits: jax.Array, given: kernel.Given) -> tuple:
        found = [kernel.bits(a) for a in kernel.magnitudes(method, base, experts, given)]
        return [] if sparse else found, thresholds.codes(found, limits)

    return jax.jit(bits, compiler_options=WIDE)


@functools.cache
def _measure(name: str, consensus: Consensus) -> Measure:
    return jax.jit(functools.partial(kernel.measured, METHODS[name], consensus))


@functools.cache
def _norms(name: str) -> Measure:
    return jax.jit(functools.partial(kernel.norms, METHODS[name]))


class Analysis:
    """The passes over one merge's inputs that come before it.

    Args:
        recipe: How to merge.
        base: The base, if the method has one.
        experts: The experts.
        sizes: Name -> elements, of all that is merged, in order.
        mine: The names of which this process counts.
        written: The names of which it writes parts.
        processes: Those that read together.
        stream: Reads the base, if there is one, and the experts.
        advance: Told how many elements of the model were read.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: Checkpoint | None,
        experts: Sequence[Checkpoint],
        sizes: Mapping[str, int],
        mine: Sequence[str],
        written: Sequence[str],
        processes: Processes,
        stream: Pass,
        advance: Callable[[int], None],
    ):
        self.recipe, self.method = recipe, METHODS[recipe.method]
        self._base, self._experts, self._sizes = base, experts, sizes
        self._mine, self._written = mine, written
        self._processes, self._stream, self._advance = processes, stream, advance
        self._size = sum(sizes.values())
        self.thresholds: dict[str, dict[str, np.ndarray]] = {name: {} for name in sizes}
        self.measured: dict[str, dict[str, np.ndarray]] = {}
        self._norms: dict[str, dict[str, np.ndarray]] = {}
        self.densities: list[float] | None = None
        self._zero_sign = np.float32(recipe.zero_sign == "positive")

    # What a block is given

    def given(self, piece: Piece) -> dict[str, Any]:
        """What the method takes for a piece, beside the parameters; see `kernel.Given`."""
        span, name, method = piece.span, piece.span.name, self.method
        source = self._experts[0]
        canonical, turned = source.name_of(name)
        names = (name, canonical)
        found = self.recipe.settings_for(names, len(self._experts)) | self.thresholds[name]
        if method.elects:
            found["zero_sign"] = self._zero_sign
        if method.coefficients is not None and name in self.measured:
            found["coefficients"] = self._coefficients(name)
        if method.draws:
            shape = source.parameters[name].shape
            found["keys"] = randomness.keys(self.recipe.seed, len(self._experts), canonical)
            if source.ours:
                # Of Hugging Face's tensors any may be transposed, and all are read by runs.
                start = span.start + piece.first
                found["place"] = randomness.transposed(start, shape if turned else (1,))
            else:
                found["place"] = randomness.boxed(span, piece.first)
            if not method.ranks:
                found["cut"] = randomness.cut(self.recipe.drop_rate)
            if not method.ranks or self.recipe.rescale == "norm":
                found["rescale"] = self._rescale(name)
        return found

    def _coefficients(self, name: str) -> np.ndarray:
        products = self.measured[name]["products"]
        hyper = {n: getattr(self.recipe, n) for n in self.method.hyper_parameters}
        return np.float32(self.method.coefficients(products, **hyper, xp=np))

    def _rescale(self, name: str) -> np.ndarray:
        n = len(self._experts)
        if name in self._norms:
            before, after = self._norms[name]["l1"], self._norms[name]["l1_kept"]
            small = (before < 1e-7) | (after < 1e-7)
            return np.float32(np.where(small, 1, before / np.where(small, 1, after)))
        if self.recipe.rescale == "expectation":
            return np.full(n, 1 / (1 - self.recipe.drop_rate), np.float32)
        return np.ones(n, np.float32)

    # The passes

    def run(self, diagnose: bool) -> None:
        """Finds all that the method needs and, if asked to, measures the task vectors."""
        recipe, method = self.recipe, self.method
        if method.ranks:
            self._find_tables()
        if method.draws and recipe.rescale == "norm":
            self._norms = self._measure_all("norms", _norms(recipe.method))
        if method.trims:
            self._find_thresholds()
        if method.coefficients is not None or recipe.zero_sign.startswith("majority"):
            measure = _measure(recipe.method, recipe.election)
            self.measured = self._measure_all("products", measure)
        if recipe.zero_sign.startswith("majority"):
            total = sum(int(found["majority"]) for found in self.measured.values())
            undecided = -1 if recipe.zero_sign == "majority" else 0
            self._zero_sign = np.float32(np.sign(total) or undecided)
        if diagnose:
            self.diagnosed = self.measured or self._sample()

    def _ranks(self, size: int | None = None) -> list[int]:
        """Whose magnitudes are looked for among `size` entries: thresholds', then ceilings'."""
        size = self._size if size is None else size
        if not self.method.trims or (self.recipe.density == 1 and not self.recipe.gamma):
            return []
        if "ceilings" not in self.method.takes:
            return [self.recipe.kept_of(size)]
        outliers = int(size * self.recipe.gamma)
        return [min(size, outliers + self.recipe.kept_of(size)), outliers]

    def _limits(self, found: Sequence[Sequence[Trimming]]) -> dict[str, np.ndarray]:
        """Thresholds and, where there are any, ceilings, float32 [experts] each."""
        columns = [[t.threshold for t in column] for column in zip(*found, strict=True)]
        names = ["thresholds", "ceilings"][: len(columns)]
        return {n: np.array(c, np.float32) for n, c in zip(names, columns, strict=True)}

    def _find_thresholds(self) -> None:
        n = len(self._experts)
        if not self._ranks():
            none = {"thresholds": np.zeros(n, np.float32)}
            if "ceilings" in self.method.takes:
                none["ceilings"] = np.full(n, np.inf, np.float32)
            self.thresholds = {name: held | none for name, held in self.thresholds.items()}
            return
        if self.recipe.scope == "model":
            found = self._of_model()
            limits = self._limits(found)
            self.thresholds = {name: held | limits for name, held in self.thresholds.items()}
            kept = [row[0].kept - self._outliers(row) for row in found]
        else:
            kept = self._of_tensors()
        if self._size:
            self.densities = [int(k) / self._size for k in kept]

    def _outliers(self, row: Sequence[Trimming]) -> int:
        return row[1].kept if len(row) > 1 else 0

    def _of_model(self) -> list[list[Trimming]]:
        ranks, serial = self._ranks(), iter(range(100))
        cache = None if self.method.draws else Cache(self._base, self._experts, self._sizes)
        if cache is not None and (cached := self._cached(cache, ranks)):
            return cached

        def read(intervals: Sequence[Sequence[Interval]]) -> list[list[Counts]]:
            make = functools.partial(self._count, self._mine, intervals)
            counts = thresholds.packed(make())
            parts = self._processes.gather(f"counts-{next(serial)}", counts)
            return thresholds.merge_counts([thresholds.unpacked(part, intervals) for part in parts])

        first = self._brackets(ranks)
        found = thresholds.select(read, first, ranks, self._size)
        if cache is not None and self._processes.index == 0:
            cache.put(ranks, found)
        return found

    def _cached(self, cache: Cache, ranks: Sequence[int]) -> list[list[Trimming]] | None:
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
        for part in self._processes.gather("cached", cached):
            if len(part["kept"]):
                return [
                    [Trimming(t, int(k), self._size) for t, k in zip(*row, strict=True)]
                    for row in zip(part["thresholds"], part["kept"], strict=True)
                ]
        return None

    def _brackets(self, ranks: Sequence[int]) -> list[list[Interval]]:
        if self.method.draws or self._size <= RUNS * RUN:
            return [[Interval(0, thresholds.LARGEST) for _ in ranks] for _ in self._experts]
        parts = self._processes.gather("sample", {"bits": self._sampled_bits()})
        sample = np.concatenate([part["bits"] for part in parts], axis=1)
        if not sample.shape[1]:
            return [[Interval(0, thresholds.LARGEST) for _ in ranks] for _ in self._experts]
        return [[thresholds.bracket(row, k, self._size) for k in ranks] for row in sample]

    def _sampled_bits(self) -> np.ndarray:
        """Runs at even distances through the model, this process's: uint32 [experts, runs, RUN]."""
        if self._in_chunks(self._sizes):
            return self._sampled_chunks()
        mine, runs, end = set(self._mine), [], 0
        places = ((np.arange(RUNS) + 0.5) * (self._size / RUNS)).astype(np.int64)
        for name, size in self._sizes.items():
            begin, end = end, end + size
            if name in mine and size >= RUN:
                here = places[(places >= begin) & (places < end)] - begin
                runs += [(name, min(int(place), size - RUN)) for place in here]
        sources = [self._base, *self._experts]
        arrays = [np.empty(max(1, len(runs)) * RUN, s.parameters[n].dtype)
                  for s in sources for n in [next(iter(self._sizes))]]  # fmt: skip
        for source, array in zip(sources, arrays, strict=True):
            for place, (name, start) in enumerate(runs):
                part = array[place * RUN : (place + 1) * RUN]
                stored = source.parameters[name]
                span = Span(name, start, RUN)
                if stored.dtype == array.dtype:
                    stored.read_span(span, part)
                else:
                    own = np.empty(RUN, stored.dtype)
                    stored.read_span(span, own)
                    part[:] = own
        nothing = np.zeros((len(self._experts), 2), np.uint32)
        bits, _ = _bits(self.recipe.method, False)(arrays[0], arrays[1:], nothing, {})
        return np.stack(bits).reshape(len(self._experts), -1, RUN)[:, : len(runs)]

    def _in_chunks(self, names: Iterable[str]) -> bool:
        return any(grid(self._stream.sources, name) is not None for name in names)

    def _some_chunks(self) -> list[Span]:
        """Every SKIPPED-th chunk of the model; of these, those of this process's parameters."""
        chunks = self._stream.spans(self._sizes)
        mine = set(self._mine)
        first = min(SKIPPED, len(chunks)) // 2
        return [span for span in chunks[first::SKIPPED] if span.name in mine]

    def _sampled_chunks(self) -> np.ndarray:
        """Runs of some chunks, where others would have to be decoded: as `_sampled_bits`."""
        limits = np.zeros((len(self._experts), 2), np.uint32)
        bits = _bits(self.recipe.method, False)
        every = max(1, self._size // (SKIPPED * RUNS * RUN))

        def act(piece: Piece, arrays: list) -> np.ndarray:
            found, _ = bits(arrays[0], arrays[1:], limits, {})
            runs = piece.size // RUN
            stacked = np.stack([np.asarray(a)[: runs * RUN] for a in found])
            return stacked.reshape(len(found), runs, RUN)[:, ::every]

        sampled = [np.zeros((len(self._experts), 0, RUN), np.uint32)]
        for _, pieces in self._stream.run(self._some_chunks(), act):
            sampled += pieces
        return np.concatenate(sampled, axis=1)

    def _count(
        self, names: Sequence[str], intervals: Sequence[Sequence[Interval]]
    ) -> list[list[Counts]]:
        counts = [[Counts(interval) for interval in row] for row in intervals]
        limits = thresholds.edges(intervals)[:, :2]
        # Few entries lie inside, and their bits are had for less than those of all.
        sparse = len(intervals[0]) == 1 and not self.method.draws
        sparse = sparse and jax.default_backend() == "cpu"
        bits = _bits(self.recipe.method, sparse)

        def act(piece: Piece, arrays: list) -> list[list[tuple[np.ndarray, int]]]:
            found, codes = bits(arrays[0], arrays[1:], limits, self.given(piece))
            rows = []
            for place, (row, code) in enumerate(zip(intervals, codes, strict=True)):
                code = np.asarray(code)[: piece.size]
                if sparse:
                    at = np.flatnonzero(code == 1)
                    inside = thresholds.bits_at(arrays[0], arrays[1 + place], at)
                    above = int(np.count_nonzero(code == 2))
                    rows.append([(row[0].places(inside), above)])
                else:
                    rows.append(thresholds.find(row, np.asarray(found[place])[: piece.size], code))
            return rows

        for span, pieces in self._stream.run(self._stream.spans(names), act):
            for rows in pieces:
                for row, found in zip(counts, rows, strict=True):
                    for each, (places, above) in zip(row, found, strict=True):
                        each.add(places, above)
            self._advance(span.size)
            self._processes.check()
        return counts

    def _of_tensors(self) -> np.ndarray:
        """Finds the thresholds of this process's parameters; how many entries are kept, in all."""

        kept = np.zeros(len(self._experts), np.int64)
        rows = []
        for name in self._mine:
            size = self._sizes[name]
            ranks = self._ranks(size)
            first = [[Interval(0, thresholds.LARGEST) for _ in ranks] for _ in self._experts]
            found = thresholds.select(functools.partial(self._count, [name]), first, ranks, size)
            kept += [row[0].kept - self._outliers(row) for row in found]
            rows.append(np.stack(list(self._limits(found).values())))
        limits = np.stack(rows) if rows else np.zeros((0, 1), np.float32)
        names = np.array(list(self._mine), np.str_)
        parts = self._processes.gather("limits", {"limits": limits, "kept": kept, "names": names})
        for part in parts:
            for name, found in zip(part["names"], part["limits"], strict=True):
                for kind, row in zip(("thresholds", "ceilings"), found, strict=False):
                    self.thresholds[str(name)][kind] = row
        return np.sum([part["kept"] for part in parts], axis=0)

    def _find_tables(self) -> None:
        """Drop rates by the upper 16 bits of the magnitude, from how many entries have them."""
        recipe, n = self.recipe, len(self._experts)
        bits = jax.jit(
            lambda base, experts: [
                kernel.bits(expert.astype(jnp.float32) - base.astype(jnp.float32))
                for expert in experts
            ]
        )

        def histogram(names: Sequence[str]) -> np.ndarray:
            counts = np.zeros((n, _TABLE), np.int64)

            def act(piece: Piece, arrays: list) -> np.ndarray:
                found = [np.asarray(a)[: piece.size] for a in bits(arrays[0], arrays[1:])]
                if max(int(a.max(initial=0)) for a in found) > thresholds.LARGEST:
                    refuse_nonfinite([self._base, *self._experts], piece.span)
                return np.stack([np.bincount(a >> 16, minlength=_TABLE) for a in found])

            for span, pieces in self._stream.run(self._stream.spans(names), act):
                counts += sum(pieces)
                self._advance(span.size)
                self._processes.check()
            return counts

        tables: dict[str, dict[str, np.ndarray]] = {}
        if recipe.scope == "model":
            parts = self._processes.gather("ranks", {"counts": histogram(list(self._mine))})
            table = self._table(np.sum([part["counts"] for part in parts], axis=0))
            tables = dict.fromkeys(self._sizes, table)
        else:
            # Too much to be gathered: what several processes write each of them counts.
            names = dict.fromkeys([*self._mine, *self._written])
            tables = {name: self._table(histogram([name])) for name in names}
        for name, table in tables.items():
            self.thresholds[name] |= table

    def _table(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """cuts and rescales, [experts, 65536], of how many entries have each upper 16 bits."""
        total = counts.sum(1, keepdims=True)
        below = np.cumsum(counts, 1) - counts
        ranks = (below + (counts - 1) / 2) / np.maximum(total - 1, 1)
        epsilon = self.recipe.epsilon
        rates = self.recipe.drop_rate + epsilon - 2 * epsilon * np.clip(ranks, 0, 1)
        rescales = 1 / (1 - rates) if self.recipe.rescale == "expectation" else np.ones_like(rates)
        return {"cuts": np.uint32(rates * 2**32), "rescales": np.float32(rescales)}

    # Sums

    def _measure_all(self, tag: str, measure: Measure) -> dict[str, dict[str, np.ndarray]]:
        """Sums over every parameter, exact to float32's rounding."""
        cells = self._stream.spans(self._mine, _WHOLE_CELL)
        sums = self._sums(measure, cells, _WHOLE_CELL)
        parts = self._processes.gather(tag, diagnostics.flat(sums))
        return {k: v for part in parts for k, v in diagnostics.nested(part).items()}

    def _sample(self) -> dict[str, dict[str, np.ndarray]]:
        """Sums over cells at even distances through each parameter that is not a small part."""
        share, cells = min(1.0, SAMPLED / self._size), []
        in_chunks = share < 1 and self._in_chunks(self._sizes)
        for name in () if in_chunks else self._mine:
            whole = self._stream.spans([name], _CELL)
            if not whole or (share < 1 and self._sizes[name] < _CELL):
                continue
            wanted = max(1, round(len(whole) * share))
            places = np.unique(np.linspace(0, len(whole) - 1, wanted).round().astype(int))
            cells += [whole[place] for place in places]
        if in_chunks:
            cells = self._some_chunks()
        measure = _measure(self.recipe.method, self.recipe.election)
        sums = self._sums(measure, cells, _WHOLE_CELL if in_chunks else _CELL)
        parts = self._processes.gather("diagnostics", diagnostics.flat(sums))
        return {k: v for part in parts for k, v in diagnostics.nested(part).items()}

    def _sums(
        self, measure: Measure, cells: Sequence[Span], cell: int
    ) -> dict[str, dict[str, np.ndarray]]:
        totals: dict[str, dict[str, np.ndarray]] = {}

        def act(piece: Piece, arrays: list) -> dict[str, np.ndarray]:
            base, experts = (None, arrays) if self._base is None else (arrays[0], arrays[1:])
            found = measure(base, experts, self.given(piece))
            found = {kind: np.asarray(array, np.float64) for kind, array in found.items()}
            if not all(np.isfinite(array).all() for array in found.values()):
                refuse_nonfinite([s for s in (self._base, *self._experts) if s], piece.span)
            return found | {"entries": np.float64(piece.size)}

        for span, pieces in self._stream.run(cells, act, cell):
            held = totals.setdefault(span.name, {})
            for found in pieces:
                for kind, array in found.items():
                    held[kind] = held.get(kind, 0.0) + array
            self._advance(0)
            self._processes.check()
        return totals

    def diagnostics(self) -> dict[str, Any]:
        """Norms and cosines of the task vectors, realised densities, conflicts; JSON-like."""
        return diagnostics.summary(self.diagnosed, self._sizes, self.densities)
