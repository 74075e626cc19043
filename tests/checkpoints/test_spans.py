import math
import os
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from m2l import checkpoints
from m2l.checkpoints import publishing, safetensors
from m2l.checkpoints.spans import cut, run_indices
from m2l.errors import CheckpointError

GRIDS = [
    ((), ()), ((7,), None), ((7,), (3,)), ((0, 4), (1, 4)), ((6, 8), None), ((6, 8), (2, 8)),
    ((6, 8), (6, 2)), ((6, 8), (4, 3)), ((1, 8), (1, 3)), ((5, 4, 6), (5, 4, 3)),
    ((5, 4, 6), (5, 2, 6)), ((5, 4, 6), (2, 2, 6)), ((5, 4, 6), (2, 3, 4)), ((5, 4, 6), (5, 3, 4)),
    ((3, 1, 4, 5), (2, 1, 3, 2)), ((3, 2, 4, 5), (3, 2, 3, 2)), ((2, 3, 4, 5), (1, 3, 4, 5)),
    ((2, 3, 4, 5), (2, 3, 4, 5)), ((4, 3, 2, 2), (4, 1, 2, 1)),
]  # fmt: skip


@pytest.mark.parametrize("block", [1, 5, 12, 1000])
@pytest.mark.parametrize(("shape", "chunk"), GRIDS, ids=str)
def test_spans_cover_an_array_once_and_no_span_crosses_a_chunk(shape, chunk, block):
    array = np.arange(math.prod(shape)).reshape(shape)
    covered = []
    for span in cut("a", shape, chunk, block):
        assert 0 < span.size <= block and span.name == "a"
        positions = [span.position(element) for element in range(span.size)]
        if span.index is not None:
            assert array[span.index].reshape(-1).tolist() == positions
        if chunk:
            places = np.stack(np.unravel_index(positions, shape), -1) // np.array(chunk)
            assert len(np.unique(places, axis=0)) == 1
        covered += positions
    assert sorted(covered) == array.reshape(-1).tolist()


@pytest.mark.parametrize("chunk", [(64, 16), (48, 64)])
def test_a_box_of_a_matrix_is_one_span_where_a_block_holds_it(chunk):
    spans = list(cut("a", (64, 64), chunk, 1 << 20))
    assert len(spans) == math.prod(-(-64 // c) for c in chunk)


def test_run_indices_select_a_run_in_order():
    array = np.arange(60).reshape(3, 4, 5)
    for start in range(0, 60, 7):
        for stop in range(start, 61, 5):
            parts = list(run_indices(array.shape, start, stop))
            elements = [x for index, _, _ in parts for x in np.atleast_1d(array[index]).reshape(-1)]
            assert sorted(elements) == list(range(start, stop))
            for index, first, last in parts:
                assert np.atleast_1d(array[index]).reshape(-1).tolist() == list(range(first, last))


ARRAYS = {
    "a/matrix": np.arange(13 * 5, dtype=np.float32).reshape(13, 5),
    "a/wide": np.arange(3 * 40, dtype=np.float32).reshape(3, 40).astype(ml_dtypes.bfloat16),
    "b/deep": np.arange(2 * 3 * 33, dtype=np.float32).reshape(2, 3, 33),
    "vector": np.arange(97, dtype=np.int16),
    "scalar": np.array(2.5, np.float32),
    "nothing": np.zeros((3, 0), np.float32),
}
DESCRIBED = {name: (array.shape, array.dtype) for name, array in ARRAYS.items()}


def create(directory):
    directory.mkdir()
    shards = safetensors.plan_shards(DESCRIBED, 300)
    return safetensors.create(directory, DESCRIBED, shards)


def fill(found):
    for name, extents in found.items():
        extents.write_from(ARRAYS[name].reshape(-1))
    return found


@pytest.mark.parametrize("name", ARRAYS)
def test_any_range_reads_the_elements_that_are_there(tmp_path, name):
    extents, flat = fill(create(tmp_path / "x"))[name], ARRAYS[name].reshape(-1)
    assert (extents.dtype, extents.size) == (flat.dtype, flat.size)
    for start in range(0, flat.size + 1, max(1, flat.size // 9)):
        for stop in range(start, flat.size + 1, max(1, flat.size // 11)):
            out = np.empty(stop - start, flat.dtype)
            extents.read_into(out, start)
            np.testing.assert_array_equal(out, flat[start:stop])


def test_blocks_may_be_written_in_any_order_by_many_at_once(tmp_path):
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


def test_files_that_are_cut_or_gone_are_refused_by_name(tmp_path):
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
    extents = create(tmp_path / "x")["vector"]
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
