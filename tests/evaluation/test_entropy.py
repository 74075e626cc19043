"""The entropy of predictions against NumPy, from scores and logits that other tests look after."""

import functools

import jax
import numpy as np
import pytest

from m2l import models
from m2l.data import layouts
from m2l.data.examples import GenerationExample, RankingExample
from m2l.evaluation import batching, ranking
from m2l.evaluation.ranking import mean_entropy


def ids(rng, size):
    return np.append(rng.integers(3, 1000, size), 1).astype(np.int32)


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    made = []
    for sizes in ((2, 3, 1), (1, 2), (3, 3, 2), (2, 1)):
        choices = tuple(ids(rng, size) for size in sizes)
        right = tuple(index == 0 for index in range(len(sizes)))
        made.append(RankingExample(ids(rng, 6), choices, right, "", ("",) * len(sizes), False))
    return made


def batches(config, examples, size):
    return batching.batches(examples, size, layouts.of(config))


def test_of_choices_it_is_the_mean_entropy_of_the_softmax_over_their_scores(
    tiny_config, tiny_params, examples
):
    scores = ranking.score_examples(tiny_config, tiny_params, examples, batch_size=3)
    entropy = jax.jit(functools.partial(mean_entropy, tiny_config))
    for part, batch in batches(tiny_config, examples, 3):
        wanted = []
        for index in part:
            p = np.exp(np.float64(scores[index]) - scores[index].max())
            p /= p.sum()
            wanted.append(-(p * np.log(p)).sum())
        # Rows and choices that are padding are in every batch here.
        np.testing.assert_allclose(entropy(tiny_params, batch), np.mean(wanted), rtol=1e-4)


def test_of_free_text_it_is_the_mean_entropy_of_the_next_token(tiny_config, tiny_params):
    rng = np.random.default_rng(1)
    texts = [
        GenerationExample(ids(rng, 5), ids(rng, size), ("",), "", "", False) for size in (2, 3)
    ]
    [(_, batch)] = batches(tiny_config, texts, 3)
    found = jax.jit(functools.partial(mean_entropy, tiny_config))(tiny_params, batch)
    apply = jax.jit(functools.partial(models.apply, tiny_config))
    wanted = []
    for text in texts:
        row = {
            "encoder_input_tokens": text.inputs[None],
            # One length for both: what comes after a position does not matter to it.
            "decoder_input_tokens": np.resize(np.append(0, text.target[:-1]), (1, 4)),
        }
        logits = np.asarray(apply(tiny_params, row), np.float64)[0, : len(text.target)]
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        wanted += list(-(p * np.log(p)).sum(-1))
    np.testing.assert_allclose(found, np.mean(wanted), rtol=1e-4)


def test_its_gradient_is_finite_and_not_zero(tiny_config, tiny_params, examples):
    _, batch = next(batches(tiny_config, examples, 3))
    gradient = jax.jit(jax.grad(functools.partial(mean_entropy, tiny_config)))(tiny_params, batch)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.abs(gradient["decoder"]["logits"]).max() > 0
