import dataclasses
import functools

import jax
import numpy as np
import pytest

from m2l import models
from m2l.data.examples import GenerationExample
from m2l.errors import EvaluationError
from m2l.evaluation import ranking

EOS = 1


def _example(rng, inputs, target):
    return GenerationExample(
        inputs=rng.integers(3, 1000, inputs).astype(np.int32),
        target=np.append(rng.integers(3, 1000, target), EOS).astype(np.int32),
        reference=("x",),
        inputs_text="q",
        reference_text="x",
        truncated=False,
    )


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    return [_example(rng, *shape) for shape in ((5, 1), (30, 9), (17, 3), (6, 2), (18, 13))]


def test_it_is_the_mean_log_softmax_of_a_targets_tokens_and_eos(tiny_config, tiny_params, examples):
    apply = jax.jit(functools.partial(models.apply, tiny_config))
    means, greedy = [], []
    # The last one's target becomes what the model itself would write.
    *examples, last = examples
    written = np.zeros(3, np.int32)
    for place in range(3):
        batch = {
            "encoder_input_tokens": last.inputs[None],
            "decoder_input_tokens": np.append(0, written[:-1])[None].astype(np.int32),
        }
        written[place] = np.asarray(apply(tiny_params, batch))[0, place].argmax()
    examples = [*examples, dataclasses.replace(last, target=written)]
    for example in examples:
        batch = {
            "encoder_input_tokens": example.inputs[None],
            "decoder_input_tokens": np.append(0, example.target[:-1])[None].astype(np.int32),
        }
        logits = np.asarray(apply(tiny_params, batch), np.float64)[0]
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        means.append(log_probabilities[np.arange(len(example.target)), example.target].mean())
        greedy.append(bool((logits.argmax(-1) == example.target).all()))
    assert greedy == [False, False, False, False, True]
    likelihoods = ranking.likelihoods(tiny_config, tiny_params, examples, batch_size=2)
    for example, mean, is_greedy, (score, flag) in zip(
        examples, means, greedy, likelihoods, strict=True
    ):
        assert score == pytest.approx([mean * len(example.target)], rel=1e-5)
        assert flag.tolist() == [is_greedy]
    for batch_size in (2, 32):
        scores = ranking.score_examples(tiny_config, tiny_params, examples, batch_size=batch_size)
        assert [(of_one.shape, of_one.dtype) for of_one in scores] == [((1,), np.float32)] * 5
        figure = ranking.reference_likelihood("task", examples, scores)
        assert figure == pytest.approx(100 * np.exp(np.mean(means)), rel=1e-5)


def test_a_model_that_knows_nothing_gives_every_token_the_same_share(
    tiny_config, tiny_params, examples
):
    decoder = dict(tiny_params["decoder"], logits=0 * tiny_params["decoder"]["logits"])
    scores = ranking.score_examples(tiny_config, dict(tiny_params, decoder=decoder), examples)
    figure = ranking.reference_likelihood("task", examples, scores)
    assert figure == pytest.approx(100 / tiny_config.vocab_size, rel=1e-5)


def test_every_example_counts_the_same_whatever_its_length(examples):
    # Per token 1/2 for the target of two tokens and 1/8 for that of ten: the geometric mean is 1/4.
    scores = [np.array([2 * np.log(1 / 2)]), np.array([10 * np.log(1 / 8)])]
    assert ranking.reference_likelihood("task", examples[:2], scores) == pytest.approx(25.0)


def test_a_target_is_scored_alone_without_a_second_choice_of_padding(
    tiny_config, tiny_params, examples, monkeypatch
):
    shapes = []
    scorer = ranking.scorer(tiny_config, "float32")

    def seen(params, batch):
        shapes.append(batch.choices_BxCxT.shape)
        return scorer(params, batch)

    monkeypatch.setattr(ranking, "scorer", lambda config, dtype: seen)
    ranking.score_examples(tiny_config, tiny_params, examples, batch_size=2)
    assert {shape[:2] for shape in shapes} == {(2, 1)}


def test_parameters_that_are_not_finite_are_refused_with_the_example(
    tiny_config, tiny_params, examples
):
    broken = jax.tree.map(lambda leaf: leaf * np.nan, tiny_params)
    scores = ranking.score_examples(tiny_config, broken, examples)
    with pytest.raises(EvaluationError, match="task, example 0: its reference scored"):
        ranking.reference_likelihood("task", examples, scores)


@pytest.mark.parametrize("bad", [[np.nan], [-np.inf], [], [-1.0, -2.0]])
def test_a_score_that_is_no_log_probability_is_refused(examples, bad):
    with pytest.raises(EvaluationError, match="task, example 1: its reference scored"):
        ranking.reference_likelihood("task", examples[:2], [np.array([-1.0]), np.array(bad)])


def test_no_examples_have_no_likelihood():
    with pytest.raises(EvaluationError, match="no examples"):
        ranking.reference_likelihood("task", [], [])
