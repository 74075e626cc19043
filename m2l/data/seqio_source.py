"""Records as a source of seqio's."""

import contextlib
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

from m2l.data.raw_records import Record, kind_of
from m2l.data.record_table import RecordTable
from m2l.errors import DataError
from m2l.typing import Json

# A program that has already started TensorFlow on its accelerators keeps them; otherwise it would
# take, just to feed data, the memory that JAX needs.
with contextlib.suppress(RuntimeError):
    tf.config.set_visible_devices([], "GPU")

_TYPES = {"string": tf.string, "int": tf.int64, "strings": tf.string}


class RecordSource(seqio.DataSource):
    """Reads examples in their order, or every epoch in another random order.

    The order is a keyed permutation of the record numbers (a block cipher over them, in place of a
    buffer of shuffled records), so a position in it is two numbers: an iterator is saved in a few
    kilobytes and continues exactly, at once, from any step. Each shard reads its own part of the
    same permutation.

    Args:
        name: The task's name; tasks with the same records visit them in different orders.
        records: What to read.
        render: One record's fields -> an example's; None gives the records as they are.
        kinds: Of each field of an example, "string", "int" or "strings"; by default the records'.
    """

    def __init__(
        self,
        name: str,
        records: RecordTable,
        render: Callable[[Record], Mapping[str, Json]] | None = None,
        kinds: Mapping[str, str] | None = None,
    ):
        self._name, self._records, self._render = name, records, render or dict
        self._kinds = kinds or {field: kind_of(of) for field, of in records.fields.items()}
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
        size = self._records.shared_size(split, shards, self._name)
        order = _permutations(size, zlib.crc32(self._name.encode()), seed) if shuffle else None
        numbers_of = tf.data.Dataset.range(size) if order is None else order
        if shards > 1:
            numbers_of = numbers_of.shard(shards, shard_info.index)
        return numbers_of.map(self._example(split))

    def _example(self, split: str) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
        table = self._records.split(split)

        def values(number: np.int64) -> list[np.ndarray]:
            try:
                example = self._render(table.record(int(number)))
            except DataError as error:
                # TensorFlow hands a ValueError on as what it is, an invalid argument.
                raise ValueError(str(error)) from error
            return [_array(example[field], kind) for field, kind in self._kinds.items()]

        @tf.autograph.experimental.do_not_convert
        def example(number: tf.Tensor) -> dict[str, tf.Tensor]:
            types = [_TYPES[kind] for kind in self._kinds.values()]
            tensors = tf.numpy_function(values, [number], types, stateful=False)
            for tensor, kind in zip(tensors, self._kinds.values(), strict=True):
                tensor.set_shape([None] if kind == "strings" else [])
            return dict(zip(self._kinds, tensors, strict=True))

        return example


def _array(value: Json, kind: str) -> np.ndarray:
    if kind == "int":
        return np.array(value, np.int64)
    # As objects: NumPy's own strings lose the null bytes at their end.
    return np.array([v.encode() for v in value] if kind == "strings" else value.encode(), object)


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
