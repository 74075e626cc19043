"""Few shapes, no example dropped or doubled, and the same scores whatever the batches."""

import numpy as np
import pytest

from m2l.data import layouts
from m2l.data.examples import GenerationExample, RankingExample
from m2l.evaluation import batching, ranking

LAYOUT = layouts.EncoderDecoder()


def ids(rng, size):
    return np.append(rng.integers(3, 1000, size), 1).astype(np.int32)


def ranked(rng, inputs, sizes):
    choices = tuple(ids(rng, size) for size in sizes)
    right = tuple(place == 0 for place in range(len(sizes)))
    return RankingExample(ids(rng, inputs), choices, right, "", ("",) * len(sizes), False)


@pytest.fixture(scope="module")
def tasks():
    rng = np.random.default_rng(0)
    choices = [
        ranked(rng, rng.integers(1, 500), rng.integers(1, 30, rng.integers(2, 9)))
        for _ in range(200)
    ]
    texts = [
        GenerationExample(
            ids(rng, rng.integers(1, 300)), ids(rng, rng.integers(1, 60)), ("",), "", "", False
        )
        for _ in range(100)
    ]
    return [choices, texts]


def test_a_bucket_holds_its_length_and_wastes_less_than_half():
    for length in range(1, 3000):
        size = batching.bucket(length)
        assert length <= size < max(9, 1.5 * length)
    assert len({batching.bucket(length) for length in range(1, 513)}) <= 13


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_every_example_is_in_one_batch_whole_and_shapes_are_at_most_eight(tasks, batch_size):
    shapes = batching.common_shapes(tasks, batch_size, LAYOUT)
    assert len(shapes) <= batching.MAX_SHAPES
    used = set()
    for examples in tasks:
        seen = []
        for part, batch in batching.batches(examples, batch_size, LAYOUT, shapes):
            seen += part
            used.add((batch.prefix_BxS.shape, batch.choices_BxCxT.shape))
            assert len(batch.lengths_B) == batch_size
            for row, index in enumerate(part):
                length = batch.lengths_B[row]
                assert np.array_equal(batch.prefix_BxS[row, :length], examples[index].inputs)
                assert not batch.prefix_BxS[row, length:].any()
                texts = batching.scored(examples[index])
                for column, size in enumerate(batch.sizes_BxC[row]):
                    found = batch.choices_BxCxT[row, column]
                    wanted = texts[column] if column < len(texts) else []
                    assert np.array_equal(found[:size], wanted) and not found[size:].any()
            assert not batch.sizes_BxC[len(part) :].any()
        assert sorted(seen) == list(range(len(examples)))
    assert len(used) <= batching.MAX_SHAPES


def test_shapes_that_are_alike_become_one_and_those_that_are_not_stay_apart():
    rng = np.random.default_rng(1)
    alike = [[ranked(rng, length, (3, 3)) for length in [250] * 99 + [200]]]
    assert len(batching.common_shapes(alike, 10, LAYOUT)) == 1
    apart = [[ranked(rng, length, (3, 3)) for length in [500] * 50 + [20] * 50]]
    assert len(batching.common_shapes(apart, 10, LAYOUT)) == 2


def test_scores_are_the_same_for_any_batch_size_bucket_and_order(tiny_config, tiny_params):
    rng = np.random.default_rng(2)
    examples = [ranked(rng, rng.integers(1, 60), (1, 3, 2)[: rng.integers(2, 4)]) for _ in range(9)]
    layout = layouts.of(tiny_config)
    wanted = None
    for batch_size, shapes in ((1, [(64, 3, 4)]), (4, [(32, 3, 4), (96, 4, 12)]), (9, None)):
        for turn in (1, -1):
            turned = examples[::turn]
            parts = batching.batches(turned, batch_size, layout, shapes)
            found = ranking.score_examples(tiny_config, tiny_params, turned, parts=parts)[::turn]
            wanted = wanted or found
            for one, other in zip(found, wanted, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5)
                assert one.argmax() == other.argmax()
