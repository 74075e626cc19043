"""Records: validated, held in memory, and read in a resumable random order."""

import contextlib
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import seqio
import tensorflow as tf

from m2l.data.raw_records import FieldType, ReadSplit, kind_of
from m2l.errors import DataError
from m2l.typing import Json

# A program that has already started TensorFlow on its accelerators keeps them; otherwise it would
# take, just to feed data, the memory that JAX needs.
with contextlib.suppress(RuntimeError):
    tf.config.set_visible_devices([], "GPU")

Reader = Callable[[tf.Tensor], dict[str, tf.Tensor]]


def _table(values: Mapping[str, list[Json]], dtype: tf.DType) -> Reader:
    """Holds fields of one value each, in one tensor: a graph pays for every tensor it is given."""
    if not values:
        return lambda index: {}
    table = tf.constant(list(zip(*values.values(), strict=True)), dtype)
    return lambda index: dict(zip(values, tf.unstack(table[index], len(values)), strict=True))


def _lists(values: list[list[str]]) -> Callable[[tf.Tensor], tf.Tensor]:
    """Holds a field of lists; the function returned reads that of record `index`, in a graph."""
    starts = tf.constant([0, *(len(value) for value in values)], tf.int64)
    starts = tf.cumsum(starts)
    items = tf.constant([item for value in values for item in value], tf.string)
    return lambda index: items[starts[index] : starts[index + 1]]


class SplitTensors(NamedTuple):
    """A split's records as tensors.

    Attributes:
        size: How many there are, at least one.
        digest: A checksum of the records in their order, for telling them from others.
        read: For the inside of a graph: a record's number (int64) -> its fields.
    """

    size: int
    digest: int
    read: Reader


class RecordTensors:
    """One dataset's records, read and turned into tensors when a split is first used.

    Args:
        name: The dataset's name, for messages.
        fields: The fields and their types (see `m2l.data.prompts.Dataset`).
        splits: The splits there are.
        read: A split -> its records, as `checked` gives them.
    """

    def __init__(
        self, name: str, fields: Mapping[str, FieldType], splits: Iterable[str], read: ReadSplit
    ):
        self.name, self.splits = name, tuple(splits)
        self._fields, self._read = dict(fields), read
        self._loaded: dict[str, SplitTensors] = {}

    def split(self, split: str) -> SplitTensors:
        """Returns a split; reads it if it is the first time.

        Raises:
            DataError: it has no records; or one that is not as declared, by its number.
        """
        if split not in self._loaded:
            self._loaded[split] = self._load(split)
        return self._loaded[split]

    def _load(self, split: str) -> SplitTensors:
        if split not in self.splits:
            raise DataError(
                f"dataset {self.name!r} has no split {split!r}; it has {', '.join(self.splits)}"
            )
        values: dict[str, list[Json]] = {field: [] for field in self._fields}
        digest = 0
        for record in self._read(split):
            digest = zlib.crc32(repr(list(record.values())).encode(errors="replace"), digest)
            for field, value in record.items():
                values[field].append(value)
        size = len(next(iter(values.values())))
        if not size:
            raise DataError(f"dataset {self.name!r}, split {split!r}: there are no records")
        texts, numbers, lists = (
            {field: values[field] for field, of in self._fields.items() if kind_of(of) == kind}
            for kind in ("string", "int", "strings")
        )
        tables = _table(texts, tf.string), _table(numbers, tf.int64)
        list_readers = {field: _lists(items) for field, items in lists.items()}

        @tf.autograph.experimental.do_not_convert
        def read(index: tf.Tensor) -> dict[str, tf.Tensor]:
            tensors = {name: value for table in tables for name, value in table(index).items()}
            tensors |= {name: items(index) for name, items in list_readers.items()}
            return {name: tensors[name] for name in self._fields}

        return SplitTensors(size, digest, read)


class RecordSource(seqio.DataSource):
    """Reads examples in their order, or every epoch in another random order.

    The order is a keyed permutation of the record numbers (a block cipher over them, in place of a
    buffer of shuffled records), so a position in it is two numbers: an iterator is saved in a few
    kilobytes and continues exactly, at once, from any step. Each shard reads its own part of the
    same permutation.

    Args:
        name: The task's name; tasks with the same records visit them in different orders.
        records: What to read.
        render: One record's tensors -> an example's; None gives the records as they are.
    """

    def __init__(
        self,
        name: str,
        records: RecordTensors,
        render: Callable[[Mapping[str, tf.Tensor]], dict[str, tf.Tensor]] | None = None,
    ):
        self._name, self._records, self._render = name, records, render
        super().__init__(splits=records.splits, performs_internal_shuffling=True)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """True: records are counted off, whatever the number of shards."""
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns one name for the whole split."""
        return [split]

    def num_input_examples(self, split: str) -> int:
        """Returns how many records the split has."""
        return self._records.split(split).size

    def digest(self, split: str) -> int:
        """Returns a checksum of the split's records."""
        return self._records.split(split).digest

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: object,
    ) -> tf.data.Dataset:
        """Returns one epoch of examples; repeated, every epoch has its own order.

        Raises:
            DataError: the split has fewer records than there are shards: one would get none.
        """
        shards = shard_info.num_shards if shard_info else 1
        size = self._divisible(split, shards)
        order = _permutations(size, zlib.crc32(self._name.encode()), seed) if shuffle else None
        numbers_of = tf.data.Dataset.range(size) if order is None else order
        if shards > 1:
            numbers_of = numbers_of.shard(shards, shard_info.index)
        return numbers_of.map(self._example(split))

    def endless(
        self, split: str, seed: int, shard: tuple[int, int], only: Collection[str]
    ) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
        """Returns a function from a place to an example: epochs, each in another random order.

        Args:
            split: Which split.
            seed: Decides the orders.
            shard: (this process's number, how many processes); each reads its own part.
            only: The names of what to keep of an example.

        Returns:
            A function for the inside of a graph: how many examples came before (int64) -> the next.

        Raises:
            DataError: the split has fewer records than there are shards: one would get none.
        """
        first, shards = shard
        size = self._divisible(split, shards)
        local_size = len(range(first, size, shards))
        key = zlib.crc32(f"{seed} {self._name}".encode())  # of a key only 32 bits count
        example = self._example(split, only)

        @tf.autograph.experimental.do_not_convert
        def at(count: tf.Tensor) -> dict[str, tf.Tensor]:
            epoch, place = count // local_size, count % local_size * shards + first
            keys = tf.stack([tf.constant(key, tf.int64), epoch])
            return example(tf.random.experimental.index_shuffle(place, keys, size - 1))

        return at

    def _divisible(self, split: str, shards: int) -> int:
        size = self._records.split(split).size
        if size < shards:
            raise DataError(
                f"task {self._name!r}, split {split!r}: {size} records cannot be divided among "
                f"{shards} processes; use fewer, or more data"
            )
        return size

    def sample(self, split: str, count: int, skip: int = 0) -> tf.data.Dataset:
        """Draws examples from all over the split, in its order, the same for all its prompts.

        Those after the first `skip` that would be drawn: of one split, samples that do not overlap.

        Sources sort their records (IMDB's first half is negative): the first ones would not do.
        """
        size = self._records.split(split).size
        keys = tf.constant([0, zlib.crc32(self._records.name.encode())], tf.int64)
        drawn = tf.random.experimental.index_shuffle(
            tf.range(min(skip, size), min(skip + count, size), dtype=tf.int64), keys, size - 1
        )
        return tf.data.Dataset.from_tensor_slices(tf.sort(drawn)).map(self._example(split))

    def _example(
        self, split: str, only: Collection[str] | None = None
    ) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
        read, render = self._records.split(split).read, self._render or dict

        @tf.autograph.experimental.do_not_convert
        def example(index: tf.Tensor) -> dict[str, tf.Tensor]:
            tensors = render(read(index))
            return {name: tensors[name] for name in tensors if only is None or name in only}

        return example


def _permutations(size: int, key: int, seed: int | None) -> tf.data.Dataset:
    """Returns the numbers below `size` in a random order, another each time it is iterated."""

    @tf.autograph.experimental.do_not_convert
    def one_epoch(epoch_key: tf.Tensor) -> tf.data.Dataset:
        keys = tf.stack([epoch_key, tf.constant(key, tf.int64)])

        @tf.autograph.experimental.do_not_convert
        def place(number: tf.Tensor) -> tf.Tensor:
            return tf.random.experimental.index_shuffle(number, keys, size - 1)

        return tf.data.Dataset.range(size).map(place)

    epochs = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True)
    return epochs.take(1).flat_map(one_epoch)
