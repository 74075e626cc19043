import math

import numpy as np
import pytest

from m2l.checkpoints.spans import cut, run_indices

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
