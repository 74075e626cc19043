"""The k-th largest magnitude of a whole model, exactly, in bounded memory and mostly one reading.

The bits of a non-negative float32, read as an integer, are in the order of the numbers. A sample
says between which two integers the k-th largest lies; one reading counts what lies above them and
how often each integer between them occurs, and so finds it. Whether it lay between them is known
then, too: if not, or if there are too many integers for one histogram, the next reading searches
where the counts say. Counts do not depend on who counts which part, so any number of processes
finds the same bits.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

LARGEST = int(np.float32(np.finfo(np.float32).max).view(np.uint32))
"""The bits of the largest finite magnitude."""

# 4 MiB of counts an expert and density; a bracket around a quantile of 1 % of the entries has about
# a third as many integers.
BINS = 1 << 19
_STANDARD_ERRORS = 8.0


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
class Interval:
    """Bits from `low` to `high`, both included, to be counted in bins of 2^shift."""

    low: int
    high: int

    @property
    def shift(self) -> int:
        """So many of the lowest bits a bin takes together that BINS suffice."""
        return max(0, math.ceil(math.log2((self.high - self.low + 1) / BINS)))

    def places(self, inside: np.ndarray) -> np.ndarray:
        """The bins of bits that lie inside."""
        return (inside - np.uint32(self.low)) >> np.uint32(self.shift)


@dataclasses.dataclass
class Counts:
    """What one reading finds for one interval: how much lies above it, and in each bin of it."""

    interval: Interval
    above: int = 0
    bins: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, places: np.ndarray, above: int) -> None:
        """Counts what `find` found in a block."""
        self.above += above
        np.add.at(self.bins, places, 1)

    def locate(self, rank: int) -> tuple[Interval, int]:
        """Where the rank-th largest (from 1) lies, and how many lie above that."""
        low, high = self.interval.low, self.interval.high
        if rank <= self.above:
            return Interval(high + 1, LARGEST), 0
        at_least = np.cumsum(self.bins[::-1])
        index = int(np.searchsorted(at_least, rank - self.above))
        if index == BINS:
            return Interval(0, low - 1), self.above + int(at_least[-1])
        place = BINS - 1 - index
        first = low + (place << self.interval.shift)
        last = min(high, first + (1 << self.interval.shift) - 1)
        return Interval(first, last), self.above + int(at_least[index] - self.bins[place])


Reading = Callable[[Sequence[Sequence[Interval]]], list[list[Counts]]]
"""Reads everything and counts, per expert and rank, for an interval each."""


def select(
    read: Reading, first: Sequence[Sequence[Interval]], ranks: Sequence[int], size: int
) -> list[list[Trimming]]:
    """Finds the exact thresholds of every expert for every rank.

    Args:
        read: As `Reading` says. Called once where each first interval holds its rank and at most
            BINS integers; twice from any first intervals with that rank in them.
        first: Per expert and rank, where to look first.
        ranks: How many entries to keep; 0 and `size` need no reading.
        size: How many entries an expert has.

    Returns:
        A list per expert of a Trimming per rank.
    """
    found: dict[tuple[int, int], Trimming] = {}
    open_ = {}
    for expert, intervals in enumerate(first):
        for place, (rank, interval) in enumerate(zip(ranks, intervals, strict=True)):
            if rank in (0, size):
                limit = np.float32(0 if rank else np.inf)
                found[expert, place] = Trimming(limit, rank, size)
            else:
                open_[expert, place] = interval
    while open_:
        # Those already found are not looked for again: an interval of one number that none has.
        nothing = Interval(LARGEST + 1, LARGEST + 1)
        asked = [
            [open_.get((expert, place), nothing) for place in range(len(ranks))]
            for expert in range(len(first))
        ]
        counts = read(asked)
        for expert, place in list(open_):
            interval, above = counts[expert][place].locate(ranks[place])
            open_[expert, place] = interval
            if interval.low == interval.high:
                del open_[expert, place]
                here = counts[expert][place]
                kept = above + int(
                    here.bins[(interval.low - here.interval.low) >> here.interval.shift]
                )
                threshold = np.uint32(interval.low).view(np.float32)
                found[expert, place] = Trimming(threshold, kept, size)
    return [[found[expert, place] for place in range(len(ranks))] for expert in range(len(first))]


def bracket(sample: np.ndarray, rank: int, size: int) -> Interval:
    """Where, by a systematic sample, the rank-th largest of `size` entries surely lies.

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
    return Interval(
        int(ordered[low]) if low >= 0 else 0,
        int(ordered[high]) if high < sample.size else LARGEST,
    )


def edges(intervals: Sequence[Sequence[Interval]]) -> np.ndarray:
    """Of each expert's intervals the first integer in it and the first above: uint32 [n, 2 k]."""
    rows = [[edge for i in row for edge in (i.low, i.high + 1)] for row in intervals]
    return np.array(rows, np.uint32)


def codes(bits: Sequence[jax.Array], edges: jax.Array) -> list[jax.Array]:
    """How many of its expert's first two edges each entry reaches, uint8: 1 is inside.

    A cheap test for the common case of one density; of more, `find` compares the bits.
    """
    return [
        ((array >= limits[0]).astype(jnp.int32) + (array >= limits[1]).astype(jnp.int32)).astype(
            jnp.uint8
        )
        for array, limits in zip(bits, edges, strict=True)
    ]


def find(
    intervals: Sequence[Interval], bits: np.ndarray, code: np.ndarray
) -> list[tuple[np.ndarray, int]]:
    """Of an expert's block, for each interval: the bins of the entries inside, how many are above.

    Args:
        intervals: The expert's.
        bits: uint32, the block's.
        code: Its `codes`.
    """
    found = []
    for place, interval in enumerate(intervals):
        if place == 0:
            inside, above = code == 1, int(np.count_nonzero(code == 2))
        else:
            beyond = bits > np.uint32(interval.high)
            inside = (bits >= np.uint32(interval.low)) & ~beyond
            above = int(np.count_nonzero(beyond))
        found.append((interval.places(bits[inside]), above))
    return found


def bits_at(base: np.ndarray, expert: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The bits of some magnitudes of a task vector, as XLA computes them on a CPU: uint32.

    There what is smaller than the least normal number is 0, before and after a subtraction.
    """
    least = np.finfo(np.float32).tiny
    one, other = (array[at].astype(np.float32) for array in (expert, base))
    one[np.abs(one) < least] = 0
    other[np.abs(other) < least] = 0
    tau = np.abs(one - other)
    tau[tau < least] = 0
    return tau.view(np.uint32)


def merge_counts(parts: Iterable[Sequence[Sequence[Counts]]]) -> list[list[Counts]]:
    """The counts of several processes, together."""
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
    part: Mapping[str, np.ndarray], intervals: Sequence[Sequence[Interval]]
) -> list[list[Counts]]:
    """The counts that were packed."""
    return [
        [Counts(i, int(a), b) for i, a, b in zip(row, above, bins, strict=True)]
        for row, above, bins in zip(intervals, part["above"], part["bins"], strict=True)
    ]
