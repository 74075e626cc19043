"""The rows of a batch that a process feeds, from data that is read in a fixed number of streams.

A run's streams are as many as its processes fed shares of a batch when it began, and remain so: a
batch is always the rows of all streams, in order. Where the number of shares changes, a process
reads several streams, or some rows of one, so no example is lost or read twice.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from m2l.errors import ConfigError

Positions = list[bytes | None]
"""A position in each stream; None for those that this process does not read."""

OpenStream = Callable[[tuple[int, int], bytes | None], Any]
"""Opens stream (number, of how many) at a position; None: at its beginning."""


class Feed(Iterator[dict[str, np.ndarray]]):
    """This process's rows of one batch after the other.

    Args:
        open_stream: Opens a stream, as `pipeline.Batches`.
        rows: How many rows a batch has, of all processes together.
        share: Which share of it this process feeds: (its number, how many there are).
        positions: Where to go on, one for each stream; None: as many streams as shares, from their
            beginnings.

    Raises:
        ConfigError: The rows cannot be divided evenly into streams.
    """

    def __init__(
        self,
        open_stream: OpenStream,
        rows: int,
        share: tuple[int, int],
        positions: Positions | None = None,
    ):
        positions = [None] * share[1] if positions is None else positions
        self._count = len(positions)
        if rows % self._count or rows % share[1]:
            raise ConfigError(
                f"batch_size {rows} cannot be split evenly into {self._count} streams of data and "
                f"{share[1]} shares"
            )
        of_stream, of_share = rows // self._count, rows // share[1]
        first, last = share[0] * of_share, (share[0] + 1) * of_share
        self._parts: dict[int, slice] = {}
        self._owned: list[int] = []
        for number in range(self._count):
            begin = number * of_stream
            low, high = max(first, begin), min(last, begin + of_stream)
            if low < high:
                self._parts[number] = slice(low - begin, high - begin)
                if low == begin:
                    self._owned.append(number)
        self._streams = {n: open_stream((n, self._count), positions[n]) for n in self._parts}

    def __next__(self) -> dict[str, np.ndarray]:
        batches = [(next(self._streams[n]), rows) for n, rows in self._parts.items()]
        return {
            name: np.concatenate([batch[name][rows] for batch, rows in batches])
            for name in batches[0][0]
        }

    def positions(self) -> Positions:
        """Returns where the streams that this process reads stand, behind the last batch."""
        return [
            self._streams[n].state() if n in self._streams else None for n in range(self._count)
        ]

    @property
    def cut(self) -> dict[str, int] | None:
        """The sums of `pipeline.Batches.cut` over the streams whose first row is this share's.

        None where streams do not count; zeros where another share counts for this one.
        """
        counts = {number: stream.cut for number, stream in self._streams.items()}
        if any(count is None for count in counts.values()):
            return None
        names = next(iter(counts.values()))
        return {name: sum(counts[number][name] for number in self._owned) for name in names}


def merged(parts: Sequence[Positions]) -> list[bytes]:
    """Returns the position in each stream of those that the processes know.

    Args:
        parts: `Feed.positions` of every process.
    """
    return [next(p for p in streams if p is not None) for streams in zip(*parts, strict=True)]
