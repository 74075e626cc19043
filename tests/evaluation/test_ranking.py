import dataclasses
import functools

import jax
import numpy as np
import pytest
from t5.evaluation.metrics import rank_classification

from m2l import models
from m2l.data.pipeline import RankingExample
from m2l.errors import EvaluationError
from m2l.evaluation import ranking

EOS = 1


def _example(rng, inputs, choices, right=0):
    ids = [np.append(rng.integers(3, 1000, n), EOS).astype(np.int32) for n in choices]
    return RankingExample(
        inputs=rng.integers(3, 1000, inputs).astype(np.int32),
        choices=tuple(ids),
        is_correct=tuple(index == right for index in range(len(ids))),
        inputs_text="",
        choices_text=tuple("" for _ in ids),
        truncated=False,
    )


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    shapes = [(5, (1, 1)), (30, (2, 3, 1)), (17, (1, 4)), (33, (1, 1)), (9, (5, 1, 2, 2, 3))]
    return [_example(rng, *shape) for shape in shapes]


@pytest.fixture(scope="module")
def scores(tiny_config, tiny_params, examples):
    return ranking.score_examples(tiny_config, tiny_params, examples, batch_size=2)


def test_a_score_is_the_summed_log_softmax_of_the_choice_and_its_eos(
    tiny_config, tiny_params, examples, scores
):
    apply = jax.jit(functools.partial(models.apply, tiny_config))
    for example, of_one in zip(examples[:2], scores, strict=False):
        for choice, score in zip(example.choices, of_one, strict=True):
            batch = {
                "encoder_input_tokens": example.inputs[None],
                "decoder_input_tokens": np.append(0, choice[:-1])[None].astype(np.int32),
            }
            logits = np.asarray(apply(tiny_params, batch), np.float64)[0]
            log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            expected = log_probabilities[np.arange(len(choice)), choice].sum()
            np.testing.assert_allclose(score, expected, rtol=1e-5)


def test_every_example_is_scored_once_whatever_the_batch_and_the_order(
    tiny_config, tiny_params, examples, scores
):
    done = []
    alone = ranking.score_examples(
        tiny_config, tiny_params, examples[::-1], batch_size=3, on_done=done.append
    )
    assert sum(done) == len(examples)
    assert [len(of_one) for of_one in scores] == [len(e.choices) for e in examples]
    for one, other in zip(scores, alone[::-1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_a_bucket_holds_its_length_and_wastes_less_than_half():
    for length in range(1, 3000):
        size = ranking.bucket(length)
        assert length <= size < max(9, 1.5 * length)
    assert len({ranking.bucket(length) for length in range(1, 513)}) <= 13


def test_other_parameters_do_not_compile_again(tiny_config, tiny_params, examples, scores):
    score = ranking.scorer(tiny_config, "float32")
    compiled = score._cache_size()
    doubled = jax.tree.map(lambda leaf: 2 * leaf, tiny_params)
    again = ranking.score_examples(tiny_config, doubled, examples, batch_size=2)
    assert score._cache_size() == compiled
    assert not np.allclose(again[0], scores[0])


def test_accuracy_is_that_of_t5s_rank_classification(examples):
    rng = np.random.default_rng(1)
    many = [
        dataclasses.replace(examples[0], is_correct=(bool(right), not right))
        for right in rng.integers(0, 2, 50)
    ]
    of_all = [rng.normal(size=2).astype(np.float32) for _ in many]
    rows = [
        ((i, c), right, 1.0, 2) for i, e in enumerate(many) for c, right in enumerate(e.is_correct)
    ]
    flat = [float(score) for of_one in of_all for score in of_one]
    expected = rank_classification(rows, flat, num_classes=2)["accuracy"]
    ranked = ranking.rank("task", many, of_all)
    assert ranked.accuracy == pytest.approx(expected)
    assert (ranked.chance, ranked.ties) == (50.0, 0)


def test_a_tie_counts_by_its_share_and_is_reported(examples):
    three = dataclasses.replace(examples[1], is_correct=(True, False, False))
    tied = np.array([-2.0, -2.0, -2.0], np.float32)
    ranked = ranking.rank("task", [three, three], [tied, np.array([-1.0, -2.0, -2.0])])
    assert ranked.accuracy == pytest.approx(100 * (1 / 3 + 1) / 2)
    assert ranked.ties == 1
    assert ranked.chance == pytest.approx(100 / 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_refused_with_its_example(examples, bad):
    with pytest.raises(EvaluationError, match="task, example 1: its choices scored"):
        ranking.rank("task", [examples[0]] * 2, [np.zeros(2), np.array([0.0, bad])])


def test_an_example_without_a_right_choice_is_refused(examples):
    none = dataclasses.replace(examples[0], is_correct=(False, False))
    with pytest.raises(EvaluationError, match="none of its choices"):
        ranking.rank("task", [none], [np.array([-1.0, -2.0])])


def test_no_examples_have_no_accuracy():
    with pytest.raises(EvaluationError, match="no examples"):
        ranking.rank("task", [], [])
