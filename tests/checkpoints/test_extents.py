"""Elements are read and written where they lie, in any order, by any number of hands."""

import json
import os
import pickle
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
from m2l.checkpoints import orbax, publishing, safetensors
from m2l.errors import CheckpointError

ABOUT = {
    "model": {"family": "t5"},
    "vocabulary": {"name": "bytes", "size": 7, "fingerprint": "abc"},
    "made_by": {"kind": "test"},
}
ARRAYS = {
    "a/matrix": np.arange(13 * 5, dtype=np.float32).reshape(13, 5),
    "a/wide": np.arange(3 * 40, dtype=np.float32).reshape(3, 40).astype(ml_dtypes.bfloat16),
    "b/deep": np.arange(2 * 3 * 33, dtype=np.float32).reshape(2, 3, 33),
    "vector": np.arange(97, dtype=np.int16),
    "scalar": np.array(2.5, np.float32),
    "nothing": np.zeros((3, 0), np.float32),
}
DESCRIBED = {name: (array.shape, array.dtype) for name, array in ARRAYS.items()}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(orbax, "_CHUNK_BYTES", 64)


def in_orbax(directory):
    return checkpoints.create(directory, DESCRIBED)


def in_safetensors(directory):
    directory.mkdir()
    shards = safetensors.plan_shards(DESCRIBED, 300)
    return safetensors.create(directory, DESCRIBED, shards)


def fill(found):
    for name, extents in found.items():
        extents.write_from(ARRAYS[name].reshape(-1))
    return found


@pytest.mark.parametrize("create", [in_orbax, in_safetensors])
@pytest.mark.parametrize("name", ARRAYS)
def test_any_range_reads_the_elements_that_are_there(tmp_path, create, name):
    extents, flat = fill(create(tmp_path / "x"))[name], ARRAYS[name].reshape(-1)
    assert (extents.dtype, extents.size) == (flat.dtype, flat.size)
    for start in range(0, flat.size + 1, max(1, flat.size // 9)):
        for stop in range(start, flat.size + 1, max(1, flat.size // 11)):
            out = np.empty(stop - start, flat.dtype)
            extents.read_into(out, start)
            np.testing.assert_array_equal(out, flat[start:stop])


@pytest.mark.parametrize("create", [in_orbax, in_safetensors])
def test_blocks_may_be_written_in_any_order_by_many_at_once(tmp_path, create):
    found = create(tmp_path / "x")
    places = [(n, start) for n, array in ARRAYS.items() for start in range(0, array.size, 7)]
    random.Random(0).shuffle(places)

    def write(place):
        name, start = place
        extents = pickle.loads(pickle.dumps(found[name]))
        extents.write_from(ARRAYS[name].reshape(-1)[start : start + 7], start)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, places))
    for name, extents in found.items():
        out = np.empty(extents.size, extents.dtype)
        extents.read_into(out)
        np.testing.assert_array_equal(out, ARRAYS[name].reshape(-1))


@pytest.mark.parametrize("create", [in_orbax, in_safetensors])
def test_files_that_are_cut_or_gone_are_refused_by_name(tmp_path, create):
    extents = fill(create(tmp_path / "x"))["a/matrix"]
    last, out = extents.files()[-1], np.empty(extents.size, extents.dtype)
    os.truncate(last, extents.pieces[-1].offset + 1)
    with pytest.raises(CheckpointError, match="truncated: a/matrix ends after") as caught:
        extents.read_into(out)
    assert str(caught.value).startswith(f"{last}: ")
    last.unlink()
    for move, done in ((extents.read_into, "read"), (extents.write_from, "written")):
        with pytest.raises(CheckpointError, match=rf"cannot be {done} \(No such") as caught:
            move(out)
        assert str(caught.value).startswith(f"{last}: ")


def test_memory_of_another_form_and_ranges_outside_are_refused(tmp_path):
    extents = in_orbax(tmp_path / "x")["vector"]
    for array, start in (
        (np.empty(97, np.uint16), 0),
        (np.empty((1, 97), np.int16), 0),
        (np.empty(194, np.int16)[::2], 0),
        (np.empty(97, np.int16), 1),
        (np.empty(2, np.int16), -1),
    ):
        for move in (extents.read_into, extents.write_from):
            with pytest.raises(ValueError, match="vector: "):
                move(array, start)


def test_an_unfinished_directory_is_taken_up_again_and_becomes_a_checkpoint(tmp_path):
    found = in_orbax(tmp_path / "x")
    found["vector"].write_from(ARRAYS["vector"])
    assert checkpoints.create(tmp_path / "x", DESCRIBED) == found
    assert checkpoints.open_extents(tmp_path / "x", DESCRIBED) == found
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        checkpoints.resolve(tmp_path / "x")
    fill({name: extents for name, extents in found.items() if name != "vector"})
    saved = checkpoints.save(tmp_path / "saved", checkpoints.unflatten(ARRAYS), **ABOUT)
    digests = {name: record["digest"] for name, record in saved.parameters.items()}
    made = checkpoints.describe(tmp_path / "x", tmp_path / "y", DESCRIBED, digests, **ABOUT)
    assert made == saved
    checkpoints.publish(tmp_path / "x", tmp_path / "y")
    assert checkpoints.verify(tmp_path / "y") == saved
    assert not (tmp_path / "x").exists()
    files = {
        str(file.relative_to(root)): file.read_bytes()
        for root in (tmp_path / "y", tmp_path / "saved")
        for file in root.rglob("*")
        if file.is_file()
    }
    for name, content in files.items():
        assert (tmp_path / "y" / name).read_bytes() == content


def test_other_arrays_than_those_that_are_there_are_refused(tmp_path):
    in_orbax(tmp_path / "x")
    for spec in (((13, 4), np.float32), ((13, 5), np.int32)):
        with pytest.raises(CheckpointError, match=r"a/matrix is float32\[13, 5\], its manifest"):
            checkpoints.open_extents(tmp_path / "x", {"a/matrix": spec})
    with pytest.raises(CheckpointError, match=r"zarr\.json: cannot be read \(No such file"):
        checkpoints.open_extents(tmp_path / "x", {"other": ((1,), np.float32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: [], "does not describe a/matrix"),
        (lambda z: {}, "does not describe a/matrix"),
        (lambda z: z | {"shape": 3}, "does not describe a/matrix"),
        (lambda z: z | {"data_type": "float33"}, "does not describe a/matrix"),
        (lambda z: z | {"codecs": [{"name": "gzip"}]}, "not laid out as"),
        (lambda z: z | {"surprise": 1}, "not laid out as"),
        (lambda z: z | {"chunk_grid": grid(3)}, "not laid out as"),
        (lambda z: z | {"chunk_grid": grid(3, 4)}, "not laid out as"),
        (lambda z: z | {"chunk_grid": grid(0, 5)}, "not laid out as"),
        (lambda z: z | {"chunk_grid": grid(3, "5")}, "not laid out as"),
    ],
)
def test_a_zarr_json_that_is_not_of_an_array_of_ours_is_refused(tmp_path, change, message):
    in_orbax(tmp_path / "x")
    file = tmp_path / "x/params/a.matrix/zarr.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoints.open_extents(tmp_path / "x", DESCRIBED)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def grid(*chunk):
    return {"name": "regular", "configuration": {"chunk_shape": list(chunk)}}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=4), st.sampled_from([1, 2, 4]))
def test_chunks_are_consecutive_elements_and_pad_less_than_a_row_each(shape, itemsize):
    chunk = orbax.chunk_shape(tuple(shape), itemsize)
    axis = next((i for i, length in enumerate(chunk) if length > 1), len(chunk))
    if np.prod(shape):
        assert np.prod(chunk) * itemsize <= orbax._CHUNK_BYTES
        assert list(chunk[axis + 1 :]) == shape[axis + 1 :]
        count = [-(-length // rows) for length, rows in zip(shape, chunk, strict=True)]
        row = int(np.prod(shape[axis + 1 :]))
        padding = np.prod(count) * np.prod(chunk) - np.prod(shape)
        assert padding < max(1, np.prod(count) * row)


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint32", "int64", "float16", "bfloat16", "float64", "float8_e4m3fn"]
)
def test_tensorstore_and_orbax_read_arrays_of_every_dtype(tmp_path, dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    value = np.arange(70).reshape(7, 10).astype(dtype)
    with checkpoints.writing(tmp_path / "x", {"w": (value.shape, dtype)}) as writer:
        writer.append("w", value.reshape(-1))
        writer.finish(**ABOUT)
    path = f"{tmp_path}/x/params/w/"
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
    found = ts.open(spec).result().read().result()
    loaded = ocp.load_checkpointables(tmp_path / "x", {"params": None})["params"]["w"]
    # Orbax loads through JAX, which has no 64 bits here.
    for array in (found, loaded) if dtype.itemsize < 8 else (found,):
        assert (array.dtype, array.tobytes()) == (dtype, value.tobytes())


def test_orbax_itself_would_write_the_same_metadata(tmp_path):
    # Orbax refuses to write an array without elements, though it reads them.
    tree = checkpoints.unflatten({n: array for n, array in ARRAYS.items() if array.size})
    context = ocp.Context()
    context.array.saving.use_ocdbt, context.array.saving.use_zarr3 = False, True
    with context:
        ocp.save_checkpointables(tmp_path / "theirs", {"params": tree, "opt_state": {"n": tree}})
    checkpoints.save(tmp_path / "ours", tree, **ABOUT, opt_state={"n": tree})
    for file in ("_CHECKPOINT_METADATA", "params/_METADATA", "opt_state/_METADATA"):
        theirs, ours = (
            json.loads((tmp_path / who / file).read_text()) for who in ("theirs", "ours")
        )
        for content in (theirs, ours):
            content.pop("init_timestamp_nsecs", None), content.pop("commit_timestamp_nsecs", None)
        assert ours == theirs


def test_what_cannot_be_put_on_the_disk_is_not_passed_over(tmp_path):
    file = tmp_path / "file"
    with pytest.raises(FileNotFoundError), publishing.Flusher() as flusher:
        flusher.wrote([file], 1 << 30)
    file.write_text("")
    with publishing.Flusher() as flusher:
        flusher.wrote([file], 1 << 30)
    with pytest.raises(KeyError), publishing.Flusher() as flusher:
        raise KeyError


def test_a_name_that_is_taken_is_not_published_over(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    with pytest.raises(CheckpointError, match="old: exists already"):
        checkpoints.publish(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "new").exists()
