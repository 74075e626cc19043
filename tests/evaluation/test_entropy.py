"""Losses of predictions against NumPy, from scores and logits that other tests look after."""

import functools

import jax
import numpy as np
import pytest

from m2l import models
from m2l.data import layouts
from m2l.data.examples import GenerationExample, RankingExample
from m2l.evaluation import batching, ranking
from m2l.evaluation.ranking import mean_cross_entropy, mean_divergence, mean_entropy


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


@pytest.fixture(scope="module")
def teacher_params(tiny_params):
    return jax.tree.map(lambda leaf: 1.5 * leaf, tiny_params)


@pytest.fixture(scope="module")
def learned_by(tiny_config):
    """Jitted: the losses by labels and by a teacher."""
    by_labels = jax.jit(functools.partial(mean_cross_entropy, tiny_config))
    predict = jax.jit(functools.partial(ranking.predictions, tiny_config))
    by_teacher = jax.jit(functools.partial(mean_divergence, tiny_config))
    return by_labels, lambda params, teacher, batch: by_teacher(
        params, (batch, predict(teacher, batch)[0])
    )


def log_softmax(scores):
    scores = np.float64(scores) - np.max(scores)
    return scores - np.log(np.exp(scores).sum())


def test_of_choices_labels_and_a_teacher_compare_the_softmax_over_their_scores(
    tiny_config, tiny_params, teacher_params, examples, learned_by
):
    by_labels, by_teacher = learned_by
    scores, taught = (
        ranking.score_examples(tiny_config, params, examples, batch_size=3)
        for params in (tiny_params, teacher_params)
    )
    for part, batch in batches(tiny_config, examples, 3):
        right_B = np.array([0, 1, 1], np.int32)
        wanted = [-log_softmax(scores[index])[right_B[row]] for row, index in enumerate(part)]
        found = by_labels(tiny_params, (batch, right_B))
        np.testing.assert_allclose(found, np.mean(wanted), rtol=1e-4)
        pairs = [(log_softmax(taught[index]), log_softmax(scores[index])) for index in part]
        wanted = [(np.exp(teacher) * (teacher - model)).sum() for teacher, model in pairs]
        found = by_teacher(tiny_params, teacher_params, batch)
        np.testing.assert_allclose(found, np.mean(wanted), rtol=1e-3, atol=1e-6)
        assert by_teacher(tiny_params, tiny_params, batch) == pytest.approx(0, abs=1e-6)


def test_of_free_text_labels_are_the_targets_tokens_and_a_teachers_part_is_the_cross_entropys(
    tiny_config, tiny_params, teacher_params, learned_by
):
    by_labels, by_teacher = learned_by
    rng = np.random.default_rng(1)
    texts = [
        GenerationExample(ids(rng, 5), ids(rng, size), ("",), "", "", False) for size in (2, 3)
    ]
    [(_, batch)] = batches(tiny_config, texts, 3)
    scores = ranking.score_examples(tiny_config, tiny_params, texts)
    found = by_labels(tiny_params, (batch, np.zeros(3, np.int32)))
    # The mean over the seven tokens.
    np.testing.assert_allclose(found, -np.sum(scores) / 7, rtol=1e-5)
    log_p, model_log_p = (
        np.asarray(ranking.predictions(tiny_config, params, batch)[0], np.float64)
        for params in (teacher_params, tiny_params)
    )
    counted = np.arange(log_p.shape[2]) < batch.sizes_BxC[..., None]
    wanted = (np.exp(log_p) * (log_p - model_log_p)).sum(-1)[counted].mean()
    found = by_teacher(tiny_params, teacher_params, batch)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_its_gradient_is_finite_and_not_zero(tiny_config, tiny_params, examples):
    _, batch = next(batches(tiny_config, examples, 3))
    log_p = ranking.predictions(tiny_config, tiny_params, batch)[0]
    for loss, read in (
        (mean_entropy, batch),
        (mean_cross_entropy, (batch, np.zeros(3, np.int32))),
        (mean_divergence, (batch, np.roll(log_p, 1, axis=0))),
    ):
        gradient = jax.jit(jax.grad(functools.partial(loss, tiny_config)))(tiny_params, read)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
        assert np.abs(gradient["decoder"]["logits"]).max() > 0
