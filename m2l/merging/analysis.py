"""The passes over whole models that come before the merge of a block, and their diagnostics.

Thresholds, tables of drop rates by rank, inner products: each takes passes over the bytes, by any
number of processes together, each of which reads its own part of the parameters.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from m2l.checkpoints.digest import WIDE
from m2l.checkpoints.opening import Checkpoint
from m2l.checkpoints.spans import Span
from m2l.distributed import Processes
from m2l.merging import kernel, randomness, thresholds
from m2l.merging.inputs import refuse_nonfinite
from m2l.merging.method_registry import METHODS, Method
from m2l.merging.methods import Consensus
from m2l.merging.passes import Pass, Segment, grid
from m2l.merging.recipe import Recipe
from m2l.merging.requirements import TABLE, Requirements, norm_rescale
from m2l.merging.thresholds import BitRange, Counts, ThresholdCache, Trimming
from m2l.typing import Json

Sums = dict[str, dict[str, np.ndarray]]
"""Of each parameter what was summed over it."""


def summary(
    sums: Sums, sizes: Mapping[str, int], densities: Sequence[float] | None
) -> dict[str, Json]:
    """Returns the measures of the whole model and of each of its layers, as JSON-like data.

    Args:
        sums: Of the parameters that were measured; sums of a part are scaled up to the whole.
        sizes: Name -> elements, of all parameters.
        densities: The share of each expert's entries that trimming keeps, where it is known.
    """
    groups: dict[str, dict[str, Json]] = {}
    for name, parameter_sums in sums.items():
        factor = sizes[name] / float(parameter_sums["entries"])
        for group in ("", group_of(name)):
            totals = groups.setdefault(group, {"parameters": 0})
            totals["parameters"] += sizes[name]
            for kind, array in parameter_sums.items():
                if kind != "entries":
                    totals[kind] = totals.get(kind, 0.0) + array * factor
    sampled = sum(float(each["entries"]) for each in sums.values())
    whole = groups.pop("")
    # As if the parameters that were not looked at were like the others.
    factor = sum(sizes.values()) / whole["parameters"]
    model = _described({kind: array * factor for kind, array in whole.items()})
    model["parameters"] = sum(sizes.values())
    if densities is not None:
        model["density"] = list(densities)
    return model | {
        "share": sampled / sum(sizes.values()),
        "groups": {group: _described(totals) for group, totals in groups.items()},
    }


def _described(totals: Mapping[str, Json]) -> dict[str, Json]:
    norms = np.sqrt(np.diagonal(totals["products"]))
    cosines = totals["products"] / np.maximum(np.outer(norms, norms), 1e-30)
    measures = {
        "parameters": totals["parameters"],
        "norms": [float(f"{norm:.6g}") for norm in norms],
        "cosines": np.clip(cosines, -1, 1).round(6).tolist(),
    }
    if "kept" in totals:
        measures |= {
            "density": (totals["kept"] / totals["parameters"]).round(6).tolist(),
            "sign_conflicts": round(float(totals["conflicts"] / max(1.0, totals["touched"])), 6),
        }
    return measures


def group_of(name: str) -> str:
    """Returns the layer that a parameter belongs to, or the part of the model that has none."""
    layer = re.match(r"(.*?(?:layers?_?|block|h)[./_]?\d+)[./]", name)
    if layer:
        return layer[1]
    return name.split("/")[0] if "/" in name else re.sub(r"\.(weight|bias)$", "", name)


def flat(sums: Sums) -> dict[str, np.ndarray]:
    """Returns sums of every parameter as an array of each kind, to be gathered."""
    kinds = next(iter(sums.values()), {})
    stacked = {kind: np.stack([each[kind] for each in sums.values()]) for kind in kinds}
    return stacked | {"": np.array(list(sums), dtype=np.str_)}


def nested(part: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Returns the sums that `flat` returned arrays of."""
    names, kinds = part[""], [kind for kind in part if kind]
    return {
        str(name): {kind: part[kind][place] for kind in kinds} for place, name in enumerate(names)
    }


RUNS, RUN = 2048, 512
"""A sample for thresholds: so many runs of so many consecutive entries."""

SAMPLED = 1 << 21
"""Diagnostics look at about so many parameters of each expert at most."""

SKIPPED = 16
"""Where parts of a chunk cost as much as all of it, samples are of one of so many chunks."""

_CELL, _WHOLE_CELL = 1 << 14, 1 << 18


@functools.cache
def _bits(method: Method, sparse: bool) -> Callable[..., tuple[list[jax.Array], list[jax.Array]]]:
    """Returns the bits of the magnitudes, if not `sparse`, and their codes."""

    def bits(base: jax.Array, experts: list, limits: jax.Array, inputs: kernel.Inputs) -> tuple:
        words = [kernel.bits(a) for a in kernel.magnitudes(method, base, experts, inputs)]
        return [] if sparse else words, thresholds.codes(words, limits)

    return jax.jit(bits, compiler_options=WIDE)


@functools.cache
def _sums(method: Method, consensus: Consensus) -> Callable[..., dict[str, jax.Array]]:
    return jax.jit(functools.partial(kernel.sums, method, consensus))


@functools.cache
def _norms(method: Method) -> Callable[..., dict[str, jax.Array]]:
    return jax.jit(functools.partial(kernel.norms, method))


class Analysis:
    """The passes over one merge's inputs that come before it.

    Args:
        recipe: How to merge.
        base: The base, if the method has one.
        experts: The experts.
        sizes: Name -> elements, of all that is merged, in order.
        local: The names of which this process counts.
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
        local: Sequence[str],
        written: Sequence[str],
        processes: Processes,
        stream: Pass,
        advance: Callable[[int], None],
    ):
        self.recipe, self.method = recipe, METHODS[recipe.method]
        self.needs = Requirements(recipe, len(experts))
        self._base, self._experts, self._sizes = base, experts, sizes
        self._local, self._written = local, written
        self._processes, self._stream, self._advance = processes, stream, advance
        self._size = sum(sizes.values())
        self._counted: dict[str, dict[str, np.ndarray | np.floating]] = {n: {} for n in sizes}
        self.sums: Sums = {}
        self.densities: list[float] | None = None

    def inputs(self, piece: Segment) -> dict[str, np.ndarray | np.floating]:
        """Returns what the method takes for a piece besides the parameters: `kernel.Inputs`."""
        span, name = piece.span, piece.span.name
        source = self._experts[0]
        canonical, transposed = source.name_of(name)
        inputs = self.needs.inputs(canonical, name) | self._counted[name]
        if self.method.draws and source.ours:
            # Of Hugging Face's tensors any may be transposed, and all are read by runs.
            shape = source.parameters[name].shape if transposed else (1,)
            inputs["place"] = randomness.transposed(span.start + piece.first, shape)
        elif self.method.draws:
            inputs["place"] = randomness.boxed(span, piece.first)
        return inputs

    # The passes

    def run(self, diagnose: bool) -> None:
        """Counts all that the method needs and, if asked to, measures the task vectors."""
        needs, method = self.needs, self.method
        if method.ranks:
            self._find_tables()
        if needs.norms:
            for name, sums in self._sum_all("norms", _norms(method)).items():
                self._counted[name]["rescale"] = norm_rescale(sums["l1"], sums["l1_kept"])
        if needs.limits:
            self._find_limits()
        if needs.products or needs.majority:
            self.sums = self._sum_all("products", _sums(method, self.recipe.election))
        if needs.products:
            for name, sums in self.sums.items():
                self._counted[name]["coefficients"] = self._coefficients(name, sums["products"])
        if needs.majority:
            sign = needs.zero_sign(sum(int(sums["majority"]) for sums in self.sums.values()))
            for counted in self._counted.values():
                counted["zero_sign"] = sign
        if diagnose:
            self.sums = self.sums or self._sample()

    def _coefficients(self, name: str, products: np.ndarray) -> np.ndarray:
        names = (name, self._experts[0].name_of(name)[0])
        values = self.recipe.arguments(names, len(self._experts), np.float64)
        return np.float32(self.method.coefficients(products, **values, xp=np))

    def _limits(self, rows: Sequence[Sequence[Trimming]]) -> dict[str, np.ndarray]:
        """Returns thresholds and, where there are any, ceilings, float32 [experts] each."""
        columns = [[t.threshold for t in column] for column in zip(*rows, strict=True)]
        names = self.needs.untrimmed()
        return {n: np.array(c, np.float32) for n, c in zip(names, columns, strict=True)}

    def _find_limits(self) -> None:
        if self.recipe.scope == "model":
            rows = self._model_limits()
            limits = self._limits(rows)
            for counted in self._counted.values():
                counted |= limits
            entries = [row[0].kept - self._outliers(row) for row in rows]
        else:
            entries = self._tensor_limits()
        if self._size:
            self.densities = [int(count) / self._size for count in entries]

    def _outliers(self, row: Sequence[Trimming]) -> int:
        return row[1].kept if len(row) > 1 else 0

    def _model_limits(self) -> list[list[Trimming]]:
        ranks, serial = [*self.needs.ranks(self._size).values()], iter(range(100))
        cache = (
            None if self.method.draws else ThresholdCache(self._base, self._experts, self._sizes)
        )
        if cache is not None and (cached := self._cached(cache, ranks)):
            return cached

        def read(intervals: Sequence[Sequence[BitRange]]) -> list[list[Counts]]:
            make = functools.partial(self._count, self._local, intervals)
            counts = thresholds.packed(make())
            parts = self._processes.gather(f"counts-{next(serial)}", counts)
            return thresholds.merge_counts([thresholds.unpacked(part, intervals) for part in parts])

        first = self._brackets(ranks)
        rows = thresholds.select(read, first, ranks, self._size)
        if cache is not None and self._processes.index == 0:
            cache.put(ranks, rows)
        return rows

    def _cached(self, cache: ThresholdCache, ranks: Sequence[int]) -> list[list[Trimming]] | None:
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

    def _brackets(self, ranks: Sequence[int]) -> list[list[BitRange]]:
        if self.method.draws or self._size <= RUNS * RUN:
            return [[BitRange(0, thresholds.LARGEST) for _ in ranks] for _ in self._experts]
        parts = self._processes.gather("sample", {"bits": self._sampled_bits()})
        sample = np.concatenate([part["bits"] for part in parts], axis=1)
        if not sample.shape[1]:
            return [[BitRange(0, thresholds.LARGEST) for _ in ranks] for _ in self._experts]
        return [[thresholds.bracket(row, k, self._size) for k in ranks] for row in sample]

    def _sampled_bits(self) -> np.ndarray:
        """Runs at even distances through the model, this process's: uint32 [experts, runs, RUN]."""
        if self._in_chunks(self._sizes):
            return self._sampled_chunks()
        local, runs, end = set(self._local), [], 0
        places = ((np.arange(RUNS) + 0.5) * (self._size / RUNS)).astype(np.int64)
        for name, size in self._sizes.items():
            begin, end = end, end + size
            if name in local and size >= RUN:
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
        bits, _ = _bits(self.method, False)(arrays[0], arrays[1:], nothing, {})
        return np.stack(bits).reshape(len(self._experts), -1, RUN)[:, : len(runs)]

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
        limits = np.zeros((len(self._experts), 2), np.uint32)
        bits = _bits(self.method, False)
        every = max(1, self._size // (SKIPPED * RUNS * RUN))

        def act(piece: Segment, arrays: list) -> np.ndarray:
            words, _ = bits(arrays[0], arrays[1:], limits, {})
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
        sparse = sparse and jax.default_backend() == "cpu"
        bits = _bits(self.method, sparse)

        def act(piece: Segment, arrays: list) -> list[list[tuple[np.ndarray, int]]]:
            words, codes = bits(arrays[0], arrays[1:], limits, self.inputs(piece))
            rows = []
            for place, (row, code) in enumerate(zip(intervals, codes, strict=True)):
                code = np.asarray(code)[: piece.size]
                if sparse:
                    at = np.flatnonzero(code == 1)
                    inside = thresholds.bits_at(arrays[0], arrays[1 + place], at)
                    above = int(np.count_nonzero(code == 2))
                    rows.append([(row[0].places(inside), above)])
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

    def _tensor_limits(self) -> np.ndarray:
        """Searches the limits of this process's parameters; returns how many entries they keep."""
        entries = np.zeros(len(self._experts), np.int64)
        limits = []
        for name in self._local:
            size = self._sizes[name]
            ranks = [*self.needs.ranks(size).values()]
            first = [[BitRange(0, thresholds.LARGEST) for _ in ranks] for _ in self._experts]
            rows = thresholds.select(functools.partial(self._count, [name]), first, ranks, size)
            entries += [row[0].kept - self._outliers(row) for row in rows]
            limits.append(np.stack(list(self._limits(rows).values())))
        own = {
            "limits": np.stack(limits) if limits else np.zeros((0, 1), np.float32),
            "entries": entries,
            "names": np.array(list(self._local), np.str_),
        }
        parts = self._processes.gather("limits", own)
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
            parts = self._processes.gather("ranks", {"counts": histogram(list(self._local))})
            table = self.needs.table(np.sum([part["counts"] for part in parts], axis=0))
            tables = dict.fromkeys(self._sizes, table)
        else:
            # Too much to be gathered: what several processes write each of them counts.
            names = dict.fromkeys([*self._local, *self._written])
            tables = {name: self.needs.table(histogram([name])) for name in names}
        for name, table in tables.items():
            self._counted[name] |= table

    # Sums

    def _sum_all(self, tag: str, program: Callable[..., dict[str, jax.Array]]) -> Sums:
        """Sums over every parameter, exact to float32's rounding."""
        cells = self._stream.spans(self._local, _WHOLE_CELL)
        return self._gathered(tag, self._sum(program, cells, _WHOLE_CELL))

    def _gathered(self, tag: str, sums: Sums) -> Sums:
        """Returns the sums of all processes."""
        parts = self._processes.gather(tag, flat(sums))
        return {k: v for part in parts for k, v in nested(part).items()}

    def _sample(self) -> Sums:
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
        program = _sums(self.method, self.recipe.election)
        cell = _WHOLE_CELL if in_chunks else _CELL
        return self._gathered("diagnostics", self._sum(program, cells, cell))

    def _sum(
        self, program: Callable[..., dict[str, jax.Array]], cells: Sequence[Span], cell: int
    ) -> Sums:
        totals: Sums = {}

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
        return summary(self.sums, self._sizes, self.densities)
