"""Safetensors are read as their own library writes them, and the reverse; bad ones are refused."""

import json
import random
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as official

from m2l.checkpoints import safetensors
from m2l.errors import CheckpointError

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64, np.int8, np.bool_)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    made = {
        f"t.{np.dtype(d).name}": rng.integers(0, 2, (3, 5)).astype(d) * rng.integers(1, 9)
        for d in DTYPES[:-1]
    }
    return made | {
        "t.bool": rng.integers(0, 2, 7).astype(np.bool_),
        "scalar": np.array(2.5, np.float32),
        "nothing": np.zeros((0, 4), np.float32),
        "matrix": rng.standard_normal((40, 9), np.float32),
    }


def bits(array):
    return array.dtype, array.shape, np.ascontiguousarray(array).tobytes()


def save(directory, tensors, shard_size=10**9):
    directory.mkdir(exist_ok=True)
    described = {name: (a.shape, a.dtype) for name, a in tensors.items()}
    shards = safetensors.plan_shards(described, shard_size)
    extents = safetensors.create(directory, described, shards)
    places = [(n, start) for n, a in tensors.items() for start in range(0, a.size, 50)]
    random.Random(0).shuffle(places)
    for name, start in places:
        extents[name].write_from(tensors[name].reshape(-1)[start : start + 50], start)


def raw(file, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    file.write_bytes(struct.pack("<Q", length) + text + data)
    return file


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_what_the_official_library_writes_is_read_bit_for_bit(tmp_path, tensors):
    official.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = safetensors.open_tensors(path)
        assert set(found) == set(tensors)
        for name, tensor in found.items():
            assert (tensor.name, tensor.size) == (name, tensors[name].size)
            assert bits(tensor.read().reshape(tensor.shape)) == bits(tensors[name])


def test_any_slice_reads_its_elements(tmp_path, tensors):
    official.save_file(tensors, tmp_path / "model.safetensors")
    tensor, flat = safetensors.open_tensors(tmp_path)["matrix"], tensors["matrix"].reshape(-1)
    for start, stop in ((0, 1), (7, 7), (13, 200), (359, 360), (0, 360)):
        np.testing.assert_array_equal(tensor.read(start, stop), flat[start:stop])
    np.testing.assert_array_equal(tensor.read(300), flat[300:])


def test_the_official_library_reads_what_is_written(tmp_path, tensors):
    save(tmp_path / "x", tensors)
    assert [file.name for file in (tmp_path / "x").iterdir()] == ["model.safetensors"]
    found = official.load_file(tmp_path / "x/model.safetensors")
    assert {name: bits(a) for name, a in found.items()} == {
        name: bits(a) for name, a in tensors.items()
    }
    content = (tmp_path / "x/model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    assert json.loads(content[8 : 8 + length])["__metadata__"] == {"format": "pt"}


def test_shards_hold_no_more_than_their_limit_and_their_index_is_complete(tmp_path, tensors):
    save(tmp_path / "x", tensors, shard_size=200)
    index = json.loads((tmp_path / "x/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    names = sorted(file.name for file in (tmp_path / "x").glob("*.safetensors"))
    count = len(names)
    assert names == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for name in names:
        shard = official.load_file(tmp_path / "x" / name)
        assert {n for n, file in index["weight_map"].items() if file == name} == set(shard)
        assert sum(a.nbytes for a in shard.values()) <= 200 or list(shard) == ["matrix"]
    found = safetensors.open_tensors(tmp_path / "x")
    for name, tensor in found.items():
        assert bits(tensor.read().reshape(tensor.shape)) == bits(tensors[name])


def test_tensors_of_every_width_are_aligned_to_it(tmp_path):
    save(tmp_path / "x", {"a": np.ones(3, np.int8), "b": np.ones(3, np.float64)})
    for tensor in safetensors.open_tensors(tmp_path / "x").values():
        assert tensor.offset % tensor.dtype.itemsize == 0


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        (b"", b"", 2**40, "no safetensors file: its header would be 1,099,511,627,776 bytes"),
        (b"{}", b"", 500, "truncated: it ends after 10 bytes, within its header"),
        (b"{nonsense", b"", None, "its header: damaged, it is not JSON"),
        (b"\xff\xfe", b"", None, "its header: damaged, it is not UTF-8"),
        (b'["a"]', b"", None, "its header: damaged, it is not JSON of the expected kind"),
        (b'{"a": 1, "a": 2}', b"", None, "'a' is in it twice"),
        (b"[" * 100_000, b"", None, "its header: damaged, its JSON is nested too deeply"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, b"", None, "its JSON is nested too deeply"),
        (b'{"\\ud800": 1}', b"", None, "half of a surrogate pair"),
        ({"a": entry(0, 8, dtype=["F32"])}, bytes(8), None, "a has the unknown dtype ['F32']"),
        ({"a": entry(0, 8, dtype={})}, bytes(8), None, "a has the unknown dtype {}"),
        ({"a": entry(0, 8, dtype=None)}, bytes(8), None, "a has the unknown dtype None"),
        ({"a": entry(0, 8, [True, 2])}, bytes(8), None, "its header does not describe a"),
        ({"a": entry(0, 8, [2.0])}, bytes(8), None, "its header does not describe a"),
        ({"a": entry(0, 0, [0, 2**62, 2**62])}, b"", None, "its header does not describe a"),
        ({"a": entry(0, 8, [1] * 100)}, bytes(8), None, "its header does not describe a"),
        ({"a\nb": entry(0, 8)}, bytes(8), None, "damaged: 'a\\nb' in its header is not a"),
        ({"a\x1b[31m": entry(0, 8)}, bytes(8), None, "in its header is not a tensor's name"),
        ({"a": [0, 8]}, bytes(8), None, "its header does not describe a"),
        ({"a": 3}, b"", None, "its header does not describe a"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", None, "its header does not describe a"),
        ({"a": entry(0, 8, [-2])}, bytes(8), None, "its header does not describe a"),
        ({"a": entry(0, 8, dtype="F4")}, bytes(8), None, "a has the unknown dtype 'F4'; known are"),
        ({"a": entry(0, 12)}, bytes(12), None, "a is float32[2], 8 bytes, but its offsets are 0"),
        ({"a": entry(8, 0)}, bytes(8), None, "a is float32[2], 8 bytes, but its offsets are 8"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), None, "b overlaps the one before it"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20), None, "b comes after a gap"),
        ({"a": entry(4, 12)}, bytes(12), None, "a comes after a gap"),
        ({"a": entry(0, 8)}, bytes(7), None, "truncated: it has 76 bytes, and a ends at 77"),
        ({"a": entry(0, 8)}, bytes(11), None, "3 bytes after its last tensor belong to none"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, header, data, length, message):
    file = raw(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(CheckpointError) as caught:
        safetensors.open_tensors(tmp_path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_an_empty_file_and_one_that_shrinks_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated: it ends after 0 bytes"):
        safetensors.open_tensors(file)
    raw(file, {"a": entry(0, 8)}, bytes(8))
    tensor = safetensors.open_tensors(file)["a"]
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="truncated"):
        tensor.read()
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read \(No such"):
        tensor.read()


def test_a_directory_of_pickles_is_refused_with_the_reason(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        safetensors.open_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not read, .* executes code"):
        safetensors.open_tensors(tmp_path)


def test_an_index_that_does_not_describe_its_shards_is_refused(tmp_path):
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    raw(one, {"a": entry(0, 8)}, bytes(8))
    raw(two, {"b": entry(0, 8)}, bytes(8))
    index = tmp_path / "model.safetensors.index.json"

    def refused(weight_map, message):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            safetensors.open_tensors(tmp_path)

    refused({"a": "1.safetensors", "b": "3.safetensors"}, "3.safetensors that it names is missing")
    refused({"a": "1.safetensors", "b": "../2.safetensors"}, "no name of a file next to it")
    refused(
        {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"},
        "the tensor c that it names is not in 2.safetensors",
    )
    refused({"a": "1.safetensors", "c": "2.safetensors"}, "it does not name b, which is in 2")
    raw(two, {"b": entry(0, 8), "a": entry(8, 16)}, bytes(16))
    refused(
        {"a": "1.safetensors", "b": "2.safetensors"},
        "a is in two files, 1.safetensors and 2.safetensors",
    )
    for text in ("{", "[]", "[" * 100_000):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json: damaged, its? .*JSON"):
            safetensors.open_tensors(tmp_path)
    for weight_map in (3, None, ["a"], {"a": 1}, {"a": ["1.safetensors"]}, {"a": None}):
        refused(weight_map, "weight_map does not give a file's name for each tensor")
