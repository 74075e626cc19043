"""A cache gives back what was written, names what is damaged, and is none until it is whole."""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from m2l.data import parquet_cache as cache
from m2l.data.raw_records import checked
from m2l.data.record_table import RecordTable
from m2l.errors import DataError

FIELDS = {
    "text": "string",
    "label": range(3),
    "number": "int",
    "out/answer": "strings",
    "a/b/c": "string",
}


def raw(number):
    return {
        "text": f"Satz {number} – 文\n",
        "label": number % 3,
        "number": -number,
        "out": [{"answer": str(k), "meta": k} for k in range(number % 4)],
        "a": {"b": {"c": "", "other": 1.5}},
        "unwanted": object(),
    }


def flat(number):
    return {
        "text": f"Satz {number} – 文\n",
        "label": number % 3,
        "number": -number,
        "out/answer": [str(k) for k in range(number % 4)],
        "a/b/c": "",
    }


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(cache, "SHARD", 10)
    monkeypatch.setattr(cache, "_GROUP", 4)


def filled(root, sizes):
    """A finished cache of datasets with splits of these sizes, and its digest."""
    datasets = {
        name: {
            split: cache.write(root, name, split, map(raw, range(size)), FIELDS)
            for split, size in splits.items()
        }
        for name, splits in sizes.items()
    }
    return cache.write_index(root, {"source": "hub", "datasets": datasets})


@pytest.mark.parametrize("size", [1, 9, 10, 11, 25, 30])
def test_records_come_back_flat_in_their_order_from_shards_of_bounded_size(
    tmp_path, small_shards, size
):
    filled(tmp_path, {"demo": {"train": size}})
    index = cache.read_index(tmp_path)
    assert list(cache.read(tmp_path, index, "demo", "train")) == [flat(k) for k in range(size)]
    made = index["datasets"]["demo"]["train"]
    shards = -(-size // 10)
    names = [f"demo/train-{k:05}-of-{shards:05}.parquet" for k in range(shards)]
    assert made["records"] == size and sorted(made["files"]) == names
    assert [pq.read_metadata(tmp_path / name).num_rows for name in names] == [10] * (size // 10) + (
        [size % 10] if size % 10 else []
    )
    for name, digest in made["files"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    assert {path.name for path in tmp_path.rglob("*.*")} == {"cache.json"} | {
        name.split("/")[1] for name in names
    }


def test_a_full_shard_has_a_hundred_thousand_records(tmp_path):
    rows = ({"n": k} for k in range(100_001))
    made = cache.write(tmp_path, "demo", "train", rows, {"n": "int"})
    sizes = [pq.read_metadata(tmp_path / name).num_rows for name in made["files"]]
    assert sizes == [100_000, 1]
    column = pq.ParquetFile(tmp_path / next(iter(made["files"]))).metadata.row_group(0).column(0)
    assert column.compression == "ZSTD"


def test_records_are_written_as_they_come(tmp_path, small_shards):
    def rows():
        for number in range(25):
            if number == 22:
                parts = sorted(path.name for path in (tmp_path / "demo").iterdir())
                assert parts == [f".train-{k:05}.parquet.tmp" for k in range(3)]
            yield raw(number)

    assert cache.write(tmp_path, "demo", "train", rows(), FIELDS)["records"] == 25


def test_a_cache_feeds_a_task_as_its_source_did(tmp_path):
    filled(tmp_path, {"demo": {"train": 7}})
    index = cache.read_index(tmp_path)
    cached = RecordTable(
        "demo", FIELDS, ("train",), lambda split: cache.read(tmp_path, index, "demo", split)
    )
    source = RecordTable(
        "demo", FIELDS, ("train",), lambda split: checked("demo", split, map(raw, range(7)), FIELDS)
    )
    assert cached.split("train").size == source.split("train").size == 7
    for number in range(7):
        ours, theirs = cached.split("train").record(number), source.split("train").record(number)
        assert ours == theirs


def test_the_digest_tells_caches_apart_by_their_records(tmp_path):
    first = filled(tmp_path / "a", {"demo": {"train": 5}})
    assert cache.read_index(tmp_path / "a")["digest"] == first
    assert filled(tmp_path / "b", {"demo": {"train": 5}}) == first
    assert filled(tmp_path / "c", {"demo": {"train": 6}}) != first


def test_a_second_write_replaces_the_first_and_leaves_other_splits_alone(tmp_path, small_shards):
    filled(tmp_path, {"demo": {"train": 35, "train-long": 15}})
    (tmp_path / "demo/.train-00007.parquet.tmp").write_bytes(b"of a write that was killed")
    made = cache.write(tmp_path, "demo", "train", map(raw, range(3)), FIELDS)
    assert list(made["files"]) == ["demo/train-00000-of-00001.parquet"]
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [
        "train-00000-of-00001.parquet",
        "train-long-00000-of-00002.parquet",
        "train-long-00001-of-00002.parquet",
    ]
    with pytest.raises(DataError, match=r"train-00000-of-00004\.parquet cannot be read: No such"):
        list(cache.read(tmp_path, cache.read_index(tmp_path), "demo", "train"))


# ---- Refusals


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label": 3}, "record 22: field 'label' is 3, expected one of 0, 1, 2"),
        ({"out": [{"meta": 1}]}, "record 22: field 'out/answer' is "),
        ({"a": {}}, "record 22: field 'a/b/c' is missing"),
        ({"text": "\ud800"}, "record 22: field 'text' cannot be stored: .*surrogates"),
        ({"number": 2**63}, "record 22: field 'number' cannot be stored"),
    ],
)
def test_a_record_that_is_not_as_declared_is_named_and_nothing_is_left(
    tmp_path, small_shards, change, says
):
    rows = [raw(number) | (change if number == 22 else {}) for number in range(25)]
    with pytest.raises(DataError, match=says) as caught:
        cache.write(tmp_path, "demo", "train", rows, FIELDS)
    assert str(caught.value).startswith("dataset 'demo', split 'train', ")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "demo").iterdir()) == []


def test_a_split_without_records_is_refused(tmp_path):
    with pytest.raises(DataError, match="dataset 'demo', split 'train': there are no records"):
        cache.write(tmp_path, "demo", "train", [], FIELDS)
    assert list((tmp_path / "demo").iterdir()) == []


def test_an_unknown_dataset_or_split_is_refused_with_those_there_are(tmp_path):
    filled(tmp_path, {"demo": {"train": 2, "test": 1}, "other": {"train": 1}})
    index = cache.read_index(tmp_path)
    with pytest.raises(
        DataError, match=r"'x', split 'train': .* no such dataset; it has demo, other"
    ):
        next(cache.read(tmp_path, index, "x", "train"))
    with pytest.raises(
        DataError, match=r"'demo', split 'dev': .* no such split; it has train, test"
    ):
        next(cache.read(tmp_path, index, "demo", "dev"))


def test_a_damaged_or_missing_file_is_named_before_its_first_record(tmp_path, small_shards):
    filled(tmp_path, {"demo": {"train": 25}})
    index = cache.read_index(tmp_path)
    path = tmp_path / "demo/train-00001-of-00003.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    records = cache.read(tmp_path, index, "demo", "train")
    assert len(list(itertools.islice(records, 10))) == 10
    with pytest.raises(
        DataError, match=r"split 'train': .*train-00001-of-00003\.parquet is damaged"
    ):
        next(records)
    path.unlink()
    with pytest.raises(DataError, match=r"train-00001-of-00003\.parquet cannot be read: No such"):
        list(cache.read(tmp_path, index, "demo", "train"))


def test_a_folder_without_a_whole_index_is_no_cache(tmp_path):
    with pytest.raises(
        DataError, match=r"is not a cache, or an unfinished one: it has no cache\.js"
    ):
        cache.read_index(tmp_path / "absent")
    filled(tmp_path, {"demo": {"train": 2}})
    path = tmp_path / "cache.json"
    index = json.loads(path.read_text())
    for content, says in (
        (path.read_text()[:-20], "damaged, it is not JSON"),
        ("[1]", "damaged, not the index of a cache"),
        (json.dumps({**index, "format": 2}), "has format 2, this version of m2l reads 1"),
        (json.dumps({**index, "source": "tfds"}), "damaged, its digest is not that of its content"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=says):
            cache.read_index(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"datasets": []},
        {"datasets": {"demo": ["train"]}},
        {"datasets": {"demo": {"train": 3}}},
        {"datasets": {"demo": {"train": {"records": "2", "files": {}}}}},
        {"datasets": {"demo": {"train": {"records": 2, "files": ["a"]}}}},
        {"datasets": {"demo": {"train": {"records": 2, "files": {"a": 1}}}}},
        {"datasets": {"demo": {"train": {"records": 2, "files": {"../a": "0"}}}}},
        {"datasets": {"demo": {"train": {"records": 2, "files": {"b/../../a": "0"}}}}},
        {"datasets": {"demo": {"train": {"records": 2, "files": {"/etc/passwd": "0"}}}}},
        {"datasets": {"demo": {"train": {"records": 2, "files": {"a\nb": "0"}}}}},
        {"source": ["hub"]},
    ],
)
def test_an_index_that_lies_is_refused_though_its_digest_is_right(tmp_path, changes):
    filled(tmp_path, {"demo": {"train": 2}})
    path = tmp_path / "cache.json"
    index = {n: v for n, v in json.loads(path.read_text()).items() if n != "digest"} | changes
    digest = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**index, "digest": digest}))
    with pytest.raises(DataError, match="does not list datasets' files") as caught:
        cache.read_index(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_index_nested_too_deeply_is_refused(tmp_path):
    (tmp_path / "cache.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="nested too deeply"):
        cache.read_index(tmp_path)


def test_an_index_of_files_that_are_not_there_is_not_written(tmp_path):
    made = cache.write(tmp_path, "demo", "train", map(raw, range(2)), FIELDS)
    (tmp_path / "demo/train-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet is missing"):
        cache.write_index(tmp_path, {"source": "hub", "datasets": {"demo": {"train": made}}})
    assert not (tmp_path / "cache.json").exists()


def test_a_write_that_is_killed_leaves_nothing_that_reads_as_whole(tmp_path):
    code = (
        "import itertools, pathlib, sys\nfrom m2l.data import parquet_cache as cache\n"
        "cache.SHARD = 100\n"
        "cache.write(pathlib.Path(sys.argv[1]), 'demo', 'train',"
        " ({'n': k} for k in itertools.count()), {'n': 'int'})"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE)
    while not (tmp_path / "demo/.train-00005.parquet.tmp").exists() and writer.poll() is None:
        time.sleep(0.05)
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    assert writer.returncode == -signal.SIGKILL
    assert not list(tmp_path.rglob("*.parquet"))
    with pytest.raises(DataError, match="is not a cache, or an unfinished one"):
        cache.read_index(tmp_path)
    made = cache.write(tmp_path, "demo", "train", [{"n": 1}], {"n": "int"})
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["train-00000-of-00001.parquet"]
    assert made["records"] == 1
