"""Rows are what seqio's feature converter makes of the same examples, and lose none."""

import itertools

import numpy as np
import pytest
import seqio
import tensorflow as tf

from m2l.data import layouts

LENGTHS = {"inputs": 24, "targets": 10}


def examples(n, seed=0):
    random = np.random.default_rng(seed)
    sizes = zip(random.integers(1, 25, n), random.integers(1, 11, n), strict=True)
    return [
        (random.integers(1, 99, a).astype(np.int32), random.integers(1, 99, b).astype(np.int32))
        for a, b in sizes
    ]


def seqios(made, batch_size, pack):
    rows = tf.data.Dataset.from_generator(
        lambda: ({"inputs": inputs, "targets": targets} for inputs, targets in made),
        output_signature={name: tf.TensorSpec([None], tf.int32) for name in LENGTHS},
    )
    rows = seqio.EncDecFeatureConverter(pack=pack)(rows, LENGTHS)
    return list(rows.batch(batch_size, drop_remainder=True).as_numpy_iterator())


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_batches_are_those_of_seqios_converter(pack, seed):
    # seqio begins a new row after as many examples as a row has tokens at most.
    made = examples(max(LENGTHS.values()), seed)
    ours = list(layouts.batches(iter(made), LENGTHS, 2, pack))
    theirs = seqios(made, 2, pack)
    # The last batch of a finite dataset is only complete once the next example does not fit.
    assert 3 < len(theirs) - 1 <= len(ours) <= len(theirs)
    for (batch, _), their in zip(ours, theirs, strict=False):
        assert batch.keys() == their.keys()
        for name in batch:
            assert batch[name].dtype == np.int32
            np.testing.assert_array_equal(batch[name], their[name], err_msg=name)


@pytest.mark.parametrize("pack", [True, False])
def test_the_examples_of_a_batch_are_counted(pack):
    made = examples(200)
    done = 0
    for batch, count in itertools.islice(layouts.batches(iter(made), LENGTHS, 3, pack), 6):
        targets = batch["decoder_target_tokens"]
        expected = np.concatenate([target for _, target in made[done : done + count]])
        assert targets[targets != 0].tolist() == expected.tolist()
        done += count


def test_an_example_without_inputs_keeps_its_place():
    nothing, one = np.zeros(0, np.int32), np.ones(10, np.int32)
    made = [(nothing, one), (one, one), (nothing, one)]
    [(batch, count)] = layouts.batches(iter([*made, made[0]]), LENGTHS, 3, pack=True)
    assert count == 3
    assert batch["encoder_segment_ids"].max(axis=1).tolist() == [0, 1, 0]
    assert batch["decoder_target_tokens"].all()
