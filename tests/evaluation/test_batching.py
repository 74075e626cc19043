"""Few shapes, no example dropped or doubled, and the same scores whatever the batches."""

import dataclasses

import jax
import numpy as np
import pytest

from m2l import models
from m2l.data import layouts
from m2l.data.examples import GenerationExample, RankingExample
from m2l.evaluation import batching, generation, ranking
from m2l.models import LlamaConfig

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


@pytest.mark.parametrize(
    ("most", "counts", "devices", "wanted"),
    [
        (24, [50], 1, 17),  # 51 rows; 72 of 24
        (24, [100] * 12, 1, 20),  # none too many
        (32, [7, 5], 1, 7),  # 14 rows; 15 of 5
        (32, [100], 8, 24),  # 120 rows; 128 of 32
        (24, [64], 8, 16),
        (64, [50], 8, 56),  # one batch, which the devices divide
        (32, [0], 1, 1),
        (32, [], 1, 1),
    ],
)
def test_batches_are_of_the_size_with_the_fewest_rows(most, counts, devices, wanted):
    assert batching.fitting_size(most, counts, devices) == wanted


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


@pytest.mark.parametrize("windows", [(), (9, 0)], ids=["full", "windows"])
def test_what_all_inputs_begin_with_is_read_once_and_changes_no_score(windows):
    config = LlamaConfig(
        vocab_size=1152, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, windows=windows,
    )  # fmt: skip
    params = models.init(config, jax.random.key(0))
    rng = np.random.default_rng(3)
    header = ids(rng, 29)
    examples = [
        dataclasses.replace(example, inputs=np.concatenate([header, example.inputs]))
        for example in (ranked(rng, rng.integers(2, 20), (1, 3)) for _ in range(7))
    ]
    layout = layouts.PrefixLM(None)
    assert len(batching.shared_prefix(examples, layout)) == 24
    scores = ranking.score_examples(config, params, examples, layout=layout, batch_size=3)
    options = {"layout": layout, "batch_size": 3, "max_length": 6, "eos_id": 1}
    texts = generation.greedy(config, params, examples, **options)
    for number, example in enumerate(examples):
        assert not len(batching.shared_prefix([example], layout))
        (alone,) = ranking.score_examples(config, params, [example], layout=layout)
        np.testing.assert_allclose(scores[number], alone, rtol=1e-5)
        (text,) = generation.greedy(config, params, [example], **options)
        assert texts[number].tolist() == text.tolist()
