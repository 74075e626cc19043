"""Arrays in chunks: what is written in any order is what TensorStore, Orbax and m2l read."""

import random
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from m2l import checkpoints
from m2l.checkpoints import spans, zarr
from m2l.errors import CheckpointError

ABOUT = {
    "model": {"family": "t5"},
    "vocabulary": {"name": "bytes", "size": 7, "fingerprint": "abc"},
    "made_by": {"kind": "test"},
}
ARRAYS = {
    "matrix": np.arange(13 * 5, dtype=np.float32).reshape(13, 5),
    "wide": np.arange(3 * 40, dtype=np.float32).reshape(3, 40).astype(ml_dtypes.bfloat16),
    "deep": np.arange(2 * 3 * 33, dtype=np.float32).reshape(2, 3, 33),
    "vector": np.arange(97, dtype=np.int16),
    "scalar": np.array(2.5, np.float32),
    "nothing": np.zeros((3, 0), np.float32),
}
shapes = st.lists(st.integers(0, 40), max_size=4).map(tuple)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(zarr, "CHUNK_BYTES", 64)


def read_by_tensorstore(folder):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    return ts.open(spec).result().read().result()


@settings(max_examples=200, deadline=None)
@given(shapes, st.sampled_from([1, 2, 4]), st.sampled_from([64, 1 << 20]))
def test_chunks_are_consecutive_elements_and_pad_less_than_a_row_each(shape, itemsize, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zarr, "CHUNK_BYTES", most)
        chunk = zarr.chunk_shape(shape, itemsize)
    assert all(1 <= c <= max(1, n) for c, n in zip(chunk, shape, strict=True))
    axis = next((i for i, length in enumerate(chunk) if length > 1), len(chunk))
    if np.prod(shape):
        assert np.prod(chunk) * itemsize <= most
        assert chunk[axis + 1 :] == shape[axis + 1 :]
        count = [-(-length // rows) for length, rows in zip(shape, chunk, strict=True)]
        row = int(np.prod(shape[axis + 1 :]))
        padding = np.prod(count) * np.prod(chunk) - np.prod(shape)
        assert padding < max(1, np.prod(count) * row)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.lists(st.integers(1, 40), max_size=4), st.sampled_from([1, 2, 4]))
def test_chunks_of_another_grid_never_cut_one_of_its_boxes_unevenly(data, shape, itemsize):
    grid = tuple(data.draw(st.integers(1, length)) for length in shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zarr, "CHUNK_BYTES", 64)
        chunk = zarr.chunk_shape(tuple(shape), itemsize, grid)
    assert all(1 <= c <= n for c, n in zip(chunk, shape, strict=True))
    assert np.prod(chunk) * itemsize <= 64


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ARRAYS)
def test_chunks_may_be_written_in_any_order_by_many_threads(tmp_path, name):
    array = ARRAYS[name]
    chunk = zarr.chunk_shape(array.shape, array.dtype.itemsize)
    writer = zarr.TensorWriter(tmp_path / "x", name, array.shape, array.dtype, chunk)
    writer.create()
    boxes = list(spans.boxes(array.shape, chunk))
    random.Random(0).shuffle(boxes)
    half = boxes[: len(boxes) // 2]
    for box in half:
        writer.write(box, array[box])
    again = zarr.TensorWriter(tmp_path / "x", name, array.shape, array.dtype, chunk)
    again.create()
    finished = again.finished()
    assert [box for box in boxes if again.has(box, finished)] == half
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda box: again.write(box, array[box]), boxes))
    for box in boxes:
        assert again.read(box).tobytes() == array[box].tobytes()
    stored = read_by_tensorstore(tmp_path / "x")
    assert (stored.dtype, stored.shape) == (array.dtype, array.shape)
    assert stored.tobytes() == array.tobytes()
    assert not list((tmp_path / "x").glob("*.tmp"))


@pytest.mark.usefixtures("small_chunks")
def test_a_chunk_that_is_missing_or_truncated_is_refused_by_its_file(tmp_path):
    array = ARRAYS["matrix"]
    chunk = zarr.chunk_shape(array.shape, 4)
    writer = zarr.TensorWriter(tmp_path / "x", "matrix", array.shape, array.dtype, chunk)
    writer.create()
    first, *_ = spans.boxes(array.shape, chunk)
    with pytest.raises(CheckpointError, match=r"c\.0\.0: cannot be read \(No such file"):
        writer.read(first)
    writer.write(first, array[first])
    file = tmp_path / "x" / "c.0.0"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"c\.0\.0: damaged"):
        writer.read(first)


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint32", "int64", "float16", "bfloat16", "float64", "float8_e4m3fn"]
)
def test_tensorstore_and_orbax_read_arrays_of_every_dtype(tmp_path, dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    value = np.arange(70).reshape(7, 10).astype(dtype)
    with checkpoints.writing(tmp_path / "x", {"w": (value.shape, dtype)}) as writer:
        writer.append("w", value.reshape(-1))
        writer.finish(**ABOUT)
    loaded = ocp.load_checkpointables(tmp_path / "x", {"params": None})["params"]["w"]
    for array in (read_by_tensorstore(tmp_path / "x" / "params" / "w"), loaded):
        assert (array.dtype, array.tobytes()) == (dtype, value.tobytes())
    assert checkpoints.restore(tmp_path / "x")["w"].tobytes() == value.tobytes()
    checkpoints.verify(tmp_path / "x")
