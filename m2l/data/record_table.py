"""Records held in memory, and the random orders in which tasks read them."""

import functools
import hashlib
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from m2l.data.raw_records import FieldType, ReadSplit, Record
from m2l.errors import DataError
from m2l.typing import Json


class SplitRecords(NamedTuple):
    """A split's records.

    Attributes:
        size: How many there are, at least one.
        digest: A checksum of the records in their order, for telling them from others.
        columns: Each field's values, in the order of the records.
    """

    size: int
    digest: int
    columns: Mapping[str, list[Json]]

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the records in their order."""
        return hashlib.sha256(repr(self.columns).encode(errors="replace")).hexdigest()

    def record(self, number: int) -> Record:
        """Returns the fields of a record."""
        return {field: values[number] for field, values in self.columns.items()}


class RecordTable:
    """One dataset's records, read when a split is first used.

    Args:
        name: The dataset's name, for messages.
        fields: The fields and their types (see `m2l.data.prompts.Dataset`).
        splits: The splits there are.
        read: A split -> its records, as `checked` gives them.
        origin: Returns what the records follow from, as a JSON value that changes with them, or
            None; by default the records themselves.
    """

    def __init__(
        self,
        name: str,
        fields: Mapping[str, FieldType],
        splits: Iterable[str],
        read: ReadSplit,
        origin: Callable[[], Json] | None = None,
    ):
        self.name, self.splits, self.fields = name, tuple(splits), dict(fields)
        self._read, self._origin = read, origin
        self._loaded: dict[str, SplitRecords] = {}

    def split(self, split: str) -> SplitRecords:
        """Returns a split; reads it if it is the first time.

        Raises:
            DataError: it has no records; or one that is not as declared, by its number.
        """
        if split not in self._loaded:
            self._loaded[split] = self._load(split)
        return self._loaded[split]

    def origin(self, split: str) -> Json:
        """Returns what a split's records follow from; None where nothing tells.

        Without an `origin` of the table that is the records themselves.
        """
        return self.split(split).fingerprint if self._origin is None else self._origin()

    def _load(self, split: str) -> SplitRecords:
        if split not in self.splits:
            raise DataError(
                f"dataset {self.name!r} has no split {split!r}; it has {', '.join(self.splits)}"
            )
        columns: dict[str, list[Json]] = {field: [] for field in self.fields}
        digest = 0
        for record in self._read(split):
            digest = zlib.crc32(repr(list(record.values())).encode(errors="replace"), digest)
            for field, value in record.items():
                columns[field].append(value)
        size = len(next(iter(columns.values())))
        if not size:
            raise DataError(f"dataset {self.name!r}, split {split!r}: there are no records")
        return SplitRecords(size, digest, columns)

    def shared_size(self, split: str, shards: int, reader: str) -> int:
        """Returns a split's size, once it is sure that every shard gets a record.

        Args:
            split: Which split.
            shards: How many processes share it out.
            reader: The task that reads it, for the message.

        Raises:
            DataError: the split has fewer records than there are shards: one would get none.
        """
        size = self.split(split).size
        if size < shards:
            raise DataError(
                f"task {reader!r}, split {split!r}: {size} records cannot be divided among "
                f"{shards} processes; use fewer, or more data"
            )
        return size

    def sample(self, split: str, count: int, skip: int = 0) -> np.ndarray:
        """Draws numbers of records from all over the split, the same for all its prompts.

        Those after the first `skip` that would be drawn: of one split, samples that do not overlap.
        Sources sort their records (IMDB's first half is negative): the first ones would not do.

        Returns:
            int64, at most `count` of them, in the split's order.
        """
        size = self.split(split).size
        drawn = np.arange(min(skip, size), min(skip + count, size))
        return np.sort(index_shuffle(drawn, (0, zlib.crc32(self.name.encode())), size))


# ---- Random orders, as tf.random.experimental.index_shuffle has them


# What it puts in front of its two seeds; a constant of the cipher's key schedule; and for how many
# bits a table of the whole permutation is made.
_FIRST_KEY, _SCHEDULE, _TABLE_BITS = 498247692, 0xFFFFFFFC, 16


def index_shuffle(numbers: np.ndarray, keys: tuple[int, int], size: int) -> np.ndarray:
    """Returns where a keyed random permutation of the numbers below `size` puts some of them.

    Bit for bit `tf.random.experimental.index_shuffle(numbers, keys, size - 1)`: four rounds of the
    block cipher Simon (Beaulieu et al., 2013), again until the result is below `size`. As there, a
    size of 2^2k + 1 above 2^16 has one number twice.

    Args:
        numbers: int64 [n], from 0 and below `size`.
        keys: Two integers, of which 32 bits count.
        size: How many numbers are permuted.
    """
    bits = int(np.ceil(np.log2(size - 1))) if size > 1 else 0
    bits = max(bits + bits % 2, _TABLE_BITS)
    keys = tuple(key % 2**32 for key in keys)
    if bits == _TABLE_BITS:
        return _permutation(keys, size)[numbers % 2**_TABLE_BITS]
    shuffled = _encrypted(numbers.astype(np.uint64), keys, bits)
    while (outside := shuffled >= size).any():
        shuffled[outside] = _encrypted(shuffled[outside], keys, bits)
    return shuffled.astype(np.int64)


@functools.lru_cache(maxsize=1024)
def _permutation(keys: tuple[int, int], size: int) -> np.ndarray:
    """Returns all of a permutation of at most 2^16 numbers: int64 [size]."""
    numbers = np.arange(2**_TABLE_BITS, dtype=np.uint16)
    once = _encrypted(numbers, keys, _TABLE_BITS)
    # Numbers below `size` stay, the others go on; after k squarings as far as 2^k steps lead.
    step = np.where(numbers < size, numbers, once)
    shuffled = once[:size]
    while (shuffled >= size).any():
        shuffled, step = step[shuffled], step.take(step)
    return shuffled.astype(np.int64)


def _encrypted(values: np.ndarray, keys: tuple[int, int], bits: int) -> np.ndarray:
    """Encrypts unsigned values of so many bits by four rounds of Simon."""
    word, whole = bits // 2, values.dtype.type
    dtype = np.dtype(np.uint8) if word == 8 else values.dtype
    mask = dtype.type(2**word - 1)

    def rotated(value: np.ndarray, count: int) -> np.ndarray:
        count %= word
        left, right = dtype.type(count), dtype.type(word - count)
        return ((value << left) | (value >> right)) & mask if count else value

    first, second, third = (np.array([key & int(mask)], dtype) for key in (_FIRST_KEY, *keys))
    fourth = dtype.type(_SCHEDULE & int(mask)) ^ dtype.type(1) ^ first
    fourth = fourth ^ rotated(third, word - 3) ^ rotated(third, word - 4)
    left = ((values >> whole(word)) & whole(mask)).astype(dtype)
    right = (values & whole(mask)).astype(dtype)
    for one, other in ((first, second), (third, fourth)):
        left = left ^ (rotated(right, 1) & rotated(right, 8)) ^ rotated(right, 2) ^ one
        right = right ^ (rotated(left, 1) & rotated(left, 8)) ^ rotated(left, 2) ^ other
    return (left.astype(values.dtype) << whole(word)) | right.astype(values.dtype)
