"""Random choices decided by a key alone."""

import hashlib
import struct
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Dice:
    """Random choices from a key alone, the same on every machine and version.

    BLAKE2b in counter mode: neither Python nor NumPy promises to keep a generator's stream.
    """

    def __init__(self, *key: str | int):
        self._key = repr(key).encode()
        self._blocks = 0
        self._words: list[int] = []

    def below(self, n: int) -> int:
        """Draws a uniform integer in [0, n), for n far below 2**32."""
        if not self._words:
            block = self._blocks.to_bytes(8, "little")
            self._words = list(struct.unpack("<16I", hashlib.blake2b(block + self._key).digest()))
            self._blocks += 1
        return self._words.pop() * n >> 32

    def pick(self, items: Sequence[T]) -> T:
        """Draws one item."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], k: int) -> list[T]:
        """Draws `k` different positions' items, in random order."""
        pool = list(items)
        for i in range(k):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:k]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Returns all items in random order."""
        return self.sample(items, len(items))

    def other(self, items: Sequence[T], *excluded: T) -> T:
        """Draws one item that is none of `excluded`."""
        return self.pick([item for item in items if item not in excluded])
