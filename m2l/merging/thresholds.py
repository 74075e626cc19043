"""The k-th largest magnitude of a whole model, exactly, in bounded memory and mostly one reading.

The bits of a non-negative float32, read as an integer, are in the order of the numbers. A sample
says between which two integers the k-th largest is; one reading counts what is above them and
how often each integer between them occurs, and so finds it. Whether it lay between them is known
then, too: if not, or if there are too many integers for one histogram, the next reading searches
where the counts say. Counts do not depend on who counts which part, so any number of processes
finds the same bits.
"""

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from m2l import files, storage
from m2l.checkpoints import uint64
from m2l.checkpoints.opening import Checkpoint
from m2l.errors import DataError

LEAST = np.finfo(np.float32).tiny
"""The least magnitude above 0: what would be smaller is 0 on a CPU."""

LARGEST = int(np.float32(np.finfo(np.float32).max).view(np.uint32))
"""The bits of the largest finite magnitude."""

# 4 MiB of counts an expert and density; a bracket around a quantile of 1 % of the entries has about
# a third as many integers.
BINS = 1 << 19
_STANDARD_ERRORS = 6.0


@dataclasses.dataclass(frozen=True)
class Trimming:
    """What trimming one task vector to a density comes to.

    Attributes:
        threshold: Entries of at least this magnitude are kept: 0 keeps all, infinity none.
        kept: How many those are; ties at the threshold make it more than was asked for.
        size: Of how many.
    """

    threshold: np.float32
    kept: int
    size: int


@dataclasses.dataclass(frozen=True)
class BitRange:
    """Bits from `low` to `high`, both included, to be counted in bins of 2^shift."""

    low: int
    high: int

    @property
    def shift(self) -> int:
        """So many of the lowest bits a bin takes together that BINS suffice."""
        return max(0, math.ceil(math.log2((self.high - self.low + 1) / BINS)))

    def places(self, inside: np.ndarray) -> np.ndarray:
        """Returns the bins of bits inside the range."""
        return (inside - np.uint32(self.low)) >> np.uint32(self.shift)


@dataclasses.dataclass
class Counts:
    """What one reading finds for one interval: how much is above it, and in each bin of it."""

    interval: BitRange
    above: int = 0
    bins: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, places: np.ndarray, above: int) -> None:
        """Counts what `find` found in a block."""
        self.above += above
        np.add.at(self.bins, places, 1)

    def locate(self, rank: int) -> tuple[BitRange, int]:
        """Returns the range of the rank-th largest (from 1), and how many are above that."""
        low, high = self.interval.low, self.interval.high
        if rank <= self.above:
            return BitRange(high + 1, LARGEST), 0
        at_least = np.cumsum(self.bins[::-1])
        index = int(np.searchsorted(at_least, rank - self.above))
        if index == BINS:
            return BitRange(0, low - 1), self.above + int(at_least[-1])
        place = BINS - 1 - index
        first = low + (place << self.interval.shift)
        last = min(high, first + (1 << self.interval.shift) - 1)
        return BitRange(first, last), self.above + int(at_least[index] - self.bins[place])


Reading = Callable[[Sequence[Sequence[BitRange]]], list[list[Counts]]]
"""Reads everything and counts, per expert and rank, for an interval each."""


def select(
    read: Reading,
    first: Sequence[Sequence[BitRange]],
    ranks: Sequence[Sequence[int]],
    size: int,
    *,
    minimum: bool = False,
    positive: bool = False,
) -> list[list[Trimming]]:
    """Finds the exact thresholds of every expert for every rank.

    Args:
        read: As `Reading` says. Called once where each first interval holds its rank and at most
            BINS integers; twice from any first intervals with that rank in them.
        first: Per expert and rank, where to look first.
        ranks: Per expert, how many entries to keep; 0 and `size` need no reading.
        size: How many entries an expert has.
        minimum: Whether `size` is searched as well: the least magnitude, instead of 0.
        positive: Whether entries of 0 are not kept where fewer than `size` are to be.

    Returns:
        A list per expert of a Trimming per rank.
    """
    trimmings: dict[tuple[int, int], Trimming] = {}
    open_ = {}
    for expert, intervals in enumerate(first):
        for place, (rank, interval) in enumerate(zip(ranks[expert], intervals, strict=True)):
            if rank == 0 or (rank == size and not minimum):
                limit = np.float32(0 if rank else np.inf)
                trimmings[expert, place] = Trimming(limit, rank, size)
            else:
                open_[expert, place] = interval
    while open_:
        # Finished ones are not looked for again: an interval of one number that none has.
        nothing = BitRange(LARGEST + 1, LARGEST + 1)
        asked = [
            [open_.get((expert, place), nothing) for place in range(len(row))]
            for expert, row in enumerate(ranks)
        ]
        counts = read(asked)
        for expert, place in list(open_):
            interval, above = counts[expert][place].locate(ranks[expert][place])
            open_[expert, place] = interval
            if interval.low == interval.high:
                del open_[expert, place]
                here = counts[expert][place]
                count = above + int(
                    here.bins[(interval.low - here.interval.low) >> here.interval.shift]
                )
                threshold = np.uint32(interval.low).view(np.float32)
                if positive and not threshold:
                    threshold, count = LEAST, above
                trimmings[expert, place] = Trimming(threshold, count, size)
    return [
        [trimmings[expert, place] for place in range(len(row))] for expert, row in enumerate(ranks)
    ]


def bracket(sample: np.ndarray, rank: int, size: int) -> BitRange:
    """Returns where, by a systematic sample, the rank-th largest of `size` entries surely is.

    Args:
        sample: uint32 [runs, length], the bits of runs of consecutive entries at even distances.
    """
    runs = len(sample)
    place = sample.size - rank * sample.size / size
    at = min(max(int(place), 0), sample.size - 1)
    # Sorting a million numbers for the sake of three would be half of what a sample takes.
    ordered = np.partition(sample, at, axis=None)
    threshold = ordered[at]
    # Runs of one row are alike, and neighbours more than others: so the error is judged by the
    # differences of runs that follow one another (Wolter 1984, doi:10.2307/2288095).
    shares = (sample >= threshold).mean(1)
    variance = (np.diff(shares) ** 2).sum() / (2 * runs * max(1, runs - 1)) if runs > 1 else 1.0
    margin = sample.size * (_STANDARD_ERRORS * math.sqrt(variance) + 16 / sample.size)
    low, high = int(place - margin), math.ceil(place + margin)
    ordered.partition([each for each in (low, high) if 0 <= each < sample.size])
    return BitRange(
        int(ordered[low]) if low >= 0 else 0,
        int(ordered[high]) if high < sample.size else LARGEST,
    )


def edges(intervals: Sequence[Sequence[BitRange]]) -> np.ndarray:
    """Returns the first integer in each interval and the first above it: uint32 [experts, 2 k]."""
    rows = [[edge for i in row for edge in (i.low, i.high + 1)] for row in intervals]
    return np.array(rows, np.uint32)


def codes(bits: Sequence[jax.Array], edges: jax.Array) -> list[jax.Array]:
    """Returns how many of its expert's first two edges each entry reaches, uint8: 1 is inside.

    A cheap test for the common case of one density; of more, `find` compares the bits.
    """
    return [
        ((array >= limits[0]).astype(jnp.int32) + (array >= limits[1]).astype(jnp.int32)).astype(
            jnp.uint8
        )
        for array, limits in zip(bits, edges, strict=True)
    ]


def find(
    intervals: Sequence[BitRange], bits: np.ndarray, code: np.ndarray
) -> list[tuple[np.ndarray, int]]:
    """Returns the bins of a block's entries in each interval, and how many are above it.

    Args:
        intervals: The expert's.
        bits: uint32, the block's.
        code: Its `codes`.
    """
    counts = []
    for place, interval in enumerate(intervals):
        if place == 0:
            inside, above = code == 1, int(np.count_nonzero(code == 2))
        else:
            beyond = bits > np.uint32(interval.high)
            inside = (bits >= np.uint32(interval.low)) & ~beyond
            above = int(np.count_nonzero(beyond))
        counts.append((interval.places(bits[inside]), above))
    return counts


def bits_at(base: np.ndarray, expert: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Returns the bits of some magnitudes of a task vector, as XLA on a CPU computes them: uint32.

    There what is smaller than the least normal number is 0, before and after a subtraction.
    """
    one, other = (array.take(indices).astype(np.float32) for array in (expert, base))
    one[np.abs(one) < LEAST] = 0
    other[np.abs(other) < LEAST] = 0
    tau = np.abs(one - other)
    tau[tau < LEAST] = 0
    return tau.view(np.uint32)


def merge_counts(parts: Iterable[Sequence[Sequence[Counts]]]) -> list[list[Counts]]:
    """Returns the counts of several processes, together."""
    parts = list(parts)
    return [
        [
            Counts(
                same[0].interval,
                sum(part.above for part in same),
                np.sum([part.bins for part in same], axis=0),
            )
            for same in zip(*rows, strict=True)
        ]
        for rows in zip(*parts, strict=True)
    ]


def packed(counts: Sequence[Sequence[Counts]]) -> dict[str, np.ndarray]:
    """Counts as arrays, for a file."""
    return {
        "above": np.array([[each.above for each in row] for row in counts], np.int64),
        "bins": np.array([[each.bins for each in row] for row in counts], np.int64),
    }


def unpacked(
    part: Mapping[str, np.ndarray], intervals: Sequence[Sequence[BitRange]]
) -> list[list[Counts]]:
    """Returns the counts that were packed."""
    return [
        [Counts(i, int(a), b) for i, a, b in zip(row, above, bins, strict=True)]
        for row, above, bins in zip(intervals, part["above"], part["bins"], strict=True)
    ]


Row = list[int]  # The bits of a threshold, and how many entries it keeps.


class ThresholdCache:
    """Thresholds that were computed before, by what base and experts are.

    An entry is a file for each expert: rank -> [bits of the threshold, entries kept], and a
    checksum of that and of what the entry is of. One that does not match is computed again.
    """

    def __init__(self, base: Checkpoint, experts: Sequence[Checkpoint], sizes: Mapping[str, int]):
        folder = files.cache_directory() / "thresholds"
        described = json.dumps(list(sizes.items()))
        self._files = []
        for expert in experts:
            # 2: entries with a checksum.
            text = f"2 {base.digest}{base.rows} {expert.digest}{expert.rows} {described}"
            name = hashlib.sha256(text.encode()).hexdigest()
            self._files.append(folder / f"{name}.json")

    def get(self, ranks: Sequence[Sequence[int]], size: int) -> list[list[Trimming]] | None:
        """Returns the thresholds of every expert for its ranks; None unless all are known."""
        # All are read, so that each damaged one is named.
        entries = [_read(file) for file in self._files]
        pairs = list(zip(entries, ranks, strict=True))
        if not all(str(rank) in entry for entry, row in pairs for rank in row):
            return None
        rows = [[entry[str(rank)] for rank in row] for entry, row in pairs]
        return [
            [Trimming(np.uint32(bits).view(np.float32), count, size) for bits, count in row]
            for row in rows
        ]

    def put(self, ranks: Sequence[Sequence[int]], rows: Sequence[Sequence[Trimming]]) -> None:
        """Writes thresholds; what cannot be written is computed again."""
        for file, own, row in zip(self._files, ranks, rows, strict=True):
            new = {
                str(rank): [int(np.float32(t.threshold).view(np.uint32)), t.kept]
                for rank, t in zip(own, row, strict=True)
            }
            entry = _read(file) | new
            content = {**entry, files.CHECKSUM: _checksum(file, entry)}
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                storage.write_atomic(file, json.dumps(content))
            except OSError:
                return


def _checksum(file: Path, entry: Mapping[str, Row]) -> str:
    return files.checksum([file.stem, entry])


def _read(file: Path) -> dict[str, Row]:
    """Returns an entry; an empty one if it is missing, or damaged, which is a warning."""
    if not file.exists():
        return {}
    advice = "its thresholds are computed again"
    try:
        entry = files.read_json(file, kind=dict, advice=advice)
    except DataError as error:
        warnings.warn(str(error), stacklevel=1)
        return {}
    recorded = entry.pop(files.CHECKSUM, None)
    if recorded == _checksum(file, entry) and all(map(_is_row, entry.values())):
        return entry
    warnings.warn(f"{file}: damaged, it does not match its checksum; {advice}", stacklevel=1)
    return {}


def _is_row(row: object) -> bool:
    return (
        isinstance(row, list)
        and [type(value) for value in row] == [int, int]
        and 0 <= row[0] <= LARGEST + 1
        and row[1] >= 0
    )


_WORD = 1 << 32
# The last two digits overlap: no number in question reaches the upper candidates of the last.
_SHIFTS = {1: range(30, -1, -1), 3: (*range(28, 0, -3), 0)}


def candidates(prefixes: jax.Array, shift: jax.Array, width: int) -> jax.Array:
    """Returns lower bounds with each digit but 0 added: uint32 [..., 2^width - 1] of [...]."""
    return prefixes[..., None] + (np.arange(1, 1 << width, dtype=np.uint32) << shift)


def count_at_least(bits: Sequence[jax.Array], candidates: jax.Array) -> jax.Array:
    """Counts the entries of each array that reach each candidate.

    Args:
        bits: Per expert, uint32 [arrays, ...], as `kernel.bits` returns them.
        candidates: uint32 [arrays, experts, candidates]; one row for all arrays will do.

    Returns:
        Words, uint32 [2, arrays, experts, candidates].
    """
    counts = []
    for expert, array in enumerate(bits):
        limits = candidates[:, expert].reshape(
            len(candidates), candidates.shape[-1], *(1,) * (array.ndim - 1)
        )
        masks = [(array >= limits[:, i]).astype(jnp.uint32) for i in range(limits.shape[1])]
        # One reduction of several operands: one loop over the array counts for all candidates.
        parts = jax.lax.reduce(
            masks, [jnp.uint32(0)] * len(masks), _add_pairs, _countable_axes(array.shape)
        )
        counts.append(jnp.stack([part.reshape(len(array), -1) for part in parts], axis=1))
    return jnp.stack(uint64.total(jnp.stack(counts, axis=1), axes=(-1,)))


def _add_pairs(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
    return [x + y for x, y in zip(a, b, strict=True)]


def _countable_axes(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns as many of the last axes, without the first, as a uint32 counts for sure."""
    axis, size = len(shape), 1
    while axis > 1 and size * shape[axis - 1] < _WORD:
        axis -= 1
        size *= shape[axis]
    return tuple(range(axis, len(shape)))


def next_prefixes(
    counts: uint64.Words, prefixes: jax.Array, ranks: np.ndarray, shift: jax.Array
) -> jax.Array:
    """Adds the next digit to the lower bounds of the k-th largest.

    Args:
        counts: Words of [groups, experts, candidates].
        prefixes: The lower bounds so far, uint32 [groups, experts].
        ranks: k of each group and expert, from 1: uint32 [groups, experts, 2], as `uint64.split`
            returns each; of all experts one will do.
        shift: The position of the digit.
    """
    ranks = [ranks[:, :, word, None] for word in (0, 1)]
    digits = uint64.at_least(counts, ranks).sum(-1, dtype=jnp.uint32)
    return prefixes + (digits << shift)


def kth_largest(
    step: Callable[[jax.Array, jax.Array, int], jax.Array], shape: tuple[int, int], traced: bool
) -> jax.Array:
    """Finds the k-th largest magnitude of each group of arrays and expert.

    Args:
        step: Makes the next prefixes of (prefixes, shift, width of a digit), as `next_prefixes`
            does of the counts of `candidates`.
        shape: How many groups, how many experts.
        traced: Whether to loop under a trace. Digits are bits then: of a reduction of several
            operands whose sharding is left to the compiler it gathers partial results. Otherwise
            prefixes are NumPy arrays between steps, so that each calls the same programs.

    Returns:
        float32 of that shape.
    """
    width = 1 if traced else 3
    shifts, prefixes = np.array(_SHIFTS[width], np.uint32), np.zeros(shape, np.uint32)
    if traced:
        prefixes = jax.lax.fori_loop(
            0,
            len(shifts),
            lambda i, prefixes: step(prefixes, jnp.asarray(shifts)[i], width),
            jnp.asarray(prefixes),
        )
        return jax.lax.bitcast_convert_type(prefixes, jnp.float32)
    for shift in shifts:
        prefixes = np.asarray(step(prefixes, shift, width))
    return prefixes.view(np.float32)
