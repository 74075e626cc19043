"""Records are checked when they are read, and their random order is a permutation."""

import itertools

import numpy as np
import pytest
import seqio
import tensorflow as tf

from m2l.data.raw_records import checked
from m2l.data.record_table import RecordTable, index_shuffle
from m2l.data.seqio_source import RecordSource
from m2l.errors import DataError


def records(values, fields=None, splits=None):
    splits = splits or ["train"]
    fields = fields or {"n": "int"}
    return RecordTable("demo", fields, splits, lambda split: checked("demo", split, values, fields))


def numbers(size, *, seed=1, epochs=1, name="demo", shard=None, shuffle=True):
    source = RecordSource(name, records([{"n": n} for n in range(size)]))
    dataset = source.get_dataset("train", shuffle=shuffle, seed=seed, shard_info=shard)
    return [int(row["n"]) for row in dataset.repeat(epochs).as_numpy_iterator()]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_an_epoch_visits_every_record_once_and_the_next_in_another_order(size):
    visited = numbers(size, epochs=3)
    epochs = [visited[size * k : size * (k + 1)] for k in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert size < 7 or (epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(size)))


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 2**16, 2**16 + 1, 2**16 + 2, 10**6, 2**33 + 9])
@pytest.mark.parametrize("keys", [(0, 4_000_000_000), (-5, 2**40 + 3)])
def test_a_random_order_is_tensorflows(size, keys):
    numbers = np.unique(np.linspace(0, size - 1, 50, dtype=np.int64))
    theirs = tf.random.experimental.index_shuffle(
        tf.constant(numbers), tf.constant(keys, tf.int64), size - 1
    )
    assert np.array_equal(index_shuffle(numbers, keys, size), theirs)


def test_the_order_depends_on_seed_and_task_and_nothing_else():
    assert numbers(50) == numbers(50)
    assert numbers(50) != numbers(50, seed=2)
    assert numbers(50) != numbers(50, name="other_prompt")
    assert numbers(50, shuffle=False) == list(range(50))


@pytest.mark.parametrize("shuffle", [True, False])
def test_shards_share_out_every_epoch(shuffle):
    shards = [
        numbers(11, epochs=1, shuffle=shuffle, shard=seqio.ShardInfo(index=k, num_shards=3))
        for k in range(3)
    ]
    assert sorted(itertools.chain(*shards)) == list(range(11))
    assert sorted(map(len, shards)) == [3, 4, 4]


def test_more_shards_than_records_are_refused():
    with pytest.raises(DataError, match="2 records cannot be divided among 3 processes"):
        numbers(2, shard=seqio.ShardInfo(index=0, num_shards=3))


@pytest.mark.parametrize(
    ("of_type", "value", "says"),
    [
        ("string", 3, "is 3, expected a text"),
        ("int", "3", "is '3', expected a whole number"),
        ("int", True, "is True, expected a whole number"),
        ("strings", "ab", "is 'ab', expected a list of texts"),
        ("strings", ["a", None], "expected a list of texts"),
        ("choices", ["a"], "expected a list of two or more texts"),
        (range(2), -1, "is -1, expected one of 0, 1"),
        (("cause", "effect"), "reason", "expected one of 'cause', 'effect'"),
    ],
)
def test_a_record_of_another_form_is_named(of_type, value, says):
    good = (
        {"string": "a", "int": 1, "strings": [], "choices": ["a", "b"]}.get(str(of_type))
        if isinstance(of_type, str)
        else of_type[0]
    )
    rows = [{"f": good}, {"f": value}]
    with pytest.raises(DataError, match=says) as caught:
        records(rows, {"f": of_type}).split("train")
    assert "dataset 'demo', split 'train', record 1: field 'f'" in str(caught.value)


def test_a_missing_field_an_empty_split_and_an_unknown_split_are_refused():
    with pytest.raises(DataError, match="record 0: field 'n' is missing"):
        records([{"m": 1}]).split("train")
    with pytest.raises(DataError, match="split 'train': there are no records"):
        records([]).split("train")
    with pytest.raises(DataError, match="no split 'test'; it has train"):
        records([{"n": 1}]).split("test")


def test_nested_fields_and_lists_of_records_are_reached_by_path():
    rows = [
        {"a": {"b": "x"}, "out": [{"answer": "p"}, {"answer": "q"}]},
        {"a": {"b": "y"}, "out": []},
    ]
    source = RecordSource("demo", records(rows, {"a/b": "string", "out/answer": "strings"}))
    first, second = source.get_dataset("train", shuffle=False).as_numpy_iterator()
    assert (first["a/b"], first["out/answer"].tolist()) == (b"x", [b"p", b"q"])
    assert (second["a/b"], second["out/answer"].tolist()) == (b"y", [])
