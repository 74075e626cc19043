import dataclasses
import functools

import jax
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics
from t5.evaluation.metrics import f1_score_with_invalid, rank_classification

from m2l import models
from m2l.data import layouts
from m2l.data.examples import RankingExample
from m2l.errors import EvaluationError, UnknownNameError
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


def test_other_parameters_do_not_compile_again(tiny_config, tiny_params, examples, scores):
    score = ranking.scorer(tiny_config, "float32")
    compiled = score._cache_size()
    doubled = jax.tree.map(lambda leaf: 2 * leaf, tiny_params)
    again = ranking.score_examples(tiny_config, doubled, examples, batch_size=2)
    assert score._cache_size() == compiled
    assert not np.allclose(again[0], scores[0])


def labelled(example, labels):
    """Copies of an example whose right choices are those."""
    places = range(len(example.choices))
    return [
        dataclasses.replace(example, is_correct=tuple(place == label for place in places))
        for label in labels
    ]


def test_accuracy_and_f1_are_those_of_t5s_rank_classification(examples):
    rng = np.random.default_rng(1)
    many = labelled(examples[0], rng.integers(0, 2, 50))
    of_all = [rng.normal(size=2).astype(np.float32) for _ in many]
    rows = [
        ((i, c), right, 1.0, 2) for i, e in enumerate(many) for c, right in enumerate(e.is_correct)
    ]
    flat = [float(score) for of_one in of_all for score in of_one]
    expected = rank_classification(rows, flat, num_classes=2)
    ranked = ranking.rank("task", many, of_all, metrics=("accuracy", "f1"))
    assert ranked.figures == pytest.approx(
        {"accuracy": expected["accuracy"], "f1": expected["f1"], "chance": 50.0}
    )
    assert ranked.ties == 0
    # By tokens, of choices of different lengths, it is t5's normalised figure.
    uneven = labelled(dataclasses.replace(examples[0], choices=examples[1].choices[:2]), [0, 1])
    uneven = [uneven[right] for right in rng.integers(0, 2, 50)]
    rows = [
        ((i, c), right, 1.0, len(e.choices[c]))
        for i, e in enumerate(uneven)
        for c, right in enumerate(e.is_correct)
    ]
    low = [of_one - 5 for of_one in of_all]
    flat = [float(score) for of_one in low for score in of_one]
    expected = rank_classification(rows, flat, num_classes=2, normalize_by_target_length=True)
    found = ranking.accuracy_by_rule("task", uneven, low, low)
    assert found["accuracy_per_token"] == pytest.approx(expected["accuracy"])
    assert found["accuracy_per_token"] != pytest.approx(
        ranking.rank("task", uneven, low).figures["accuracy"]
    )


def test_f1_is_of_the_second_choice(examples):
    rng = np.random.default_rng(2)
    # One example in five is of class 1: F1 of the other class, or of both, is far from its own.
    labels = (rng.random(60) < 0.2).astype(int)
    of_all = [rng.normal(size=2) for _ in labels]
    ranked = ranking.rank("task", labelled(examples[0], labels), of_all, metrics=("f1",))
    chosen = np.argmax(of_all, axis=1)
    assert ranked.figures["f1"] == pytest.approx(100 * sklearn_metrics.f1_score(labels, chosen))


def test_a_tie_is_the_wrong_class_to_f1_as_no_class_is_to_t5(examples):
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 60)
    of_all = [rng.integers(0, 3, 2).astype(np.float32) for _ in labels]
    tied = np.array([one == other for one, other in of_all])
    chosen = np.where(tied, -1, np.argmax(of_all, axis=1))
    ranked = ranking.rank("task", labelled(examples[0], labels), of_all, metrics=("f1",))
    assert ranked.ties == tied.sum() > 10
    assert ranked.figures["f1"] == pytest.approx(f1_score_with_invalid(labels, chosen)["f1"])


@pytest.mark.filterwarnings("error")
def test_f1_is_zero_where_class_1_is_neither_right_nor_chosen(examples):
    ranked = ranking.rank(
        "task", labelled(examples[0], [0, 0]), [np.array([2.0, 1.0])] * 2, metrics=("f1",)
    )
    assert ranked.figures["f1"] == 0.0


def test_spearman_is_scipys_with_a_tie_as_the_mean_of_its_classes(examples):
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 5, 40)
    of_all = [np.eye(5)[label] + rng.normal(size=5) for label in labels]
    chosen = [float(np.argmax(of_one)) for of_one in of_all]
    many = labelled(examples[4], labels)
    ranked = ranking.rank("task", many, of_all, metrics=("accuracy", "spearman"))
    expected = 100 * stats.spearmanr(chosen, labels).statistic
    assert ranked.figures["spearman"] == pytest.approx(expected) and expected > 30
    of_all[0], chosen[0] = np.array([7.0, 0.0, 0.0, 7.0, 7.0]), (0 + 3 + 4) / 3
    ranked = ranking.rank("task", many, of_all, metrics=("spearman",))
    expected = 100 * stats.spearmanr(chosen, labels).statistic
    assert ranked.figures["spearman"] == pytest.approx(expected)


@pytest.mark.filterwarnings("error")
def test_spearman_of_answers_that_are_all_the_same_is_zero(examples):
    same = [np.array([0.0, 1.0, 0.0, 0.0, 0.0])] * 3
    for labels in ([0, 2, 4], [3, 3, 3]):
        many = labelled(examples[4], labels)
        assert ranking.rank("task", many, same, metrics=("spearman",)).figures["spearman"] == 0.0
    different = [np.eye(5)[place] for place in range(3)]
    ranked = ranking.rank("task", many, different, metrics=("spearman",))
    assert ranked.figures["spearman"] == 0.0


def test_metrics_of_classes_are_refused_where_choices_are_no_classes(examples):
    of_all = [np.arange(len(example.choices), dtype=float) for example in examples]
    for name in ("f1", "spearman"):
        with pytest.raises(EvaluationError, match=f"task: {name} needs the same choices"):
            ranking.rank("task", examples, of_all, metrics=("accuracy", name))
    with pytest.raises(EvaluationError, match="2 choices, not of 3"):
        ranking.rank("task", examples[1:2], of_all[1:2], metrics=("f1",))
    with pytest.raises(UnknownNameError, match="'spearman'"):
        ranking.rank("task", examples, of_all, metrics=("accuracy", "spearmen"))


def test_a_tie_counts_by_its_share_and_is_reported(examples):
    three = dataclasses.replace(examples[1], is_correct=(True, False, False))
    tied = np.array([-2.0, -2.0, -2.0], np.float32)
    ranked = ranking.rank("task", [three, three], [tied, np.array([-1.0, -2.0, -2.0])])
    assert ranked.figures == pytest.approx({"accuracy": 100 * (1 / 3 + 1) / 2, "chance": 100 / 3})
    assert ranked.ties == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_refused_with_its_example(examples, bad):
    with pytest.raises(EvaluationError, match="task, example 1: its choices scored"):
        ranking.rank("task", [examples[0]] * 2, [np.zeros(2), np.array([0.0, bad])])


def test_an_example_without_exactly_one_right_choice_is_refused(examples):
    for is_correct, says in (((False, False), "none of its choices"), ((True, True), "2 of its")):
        odd = dataclasses.replace(examples[0], is_correct=is_correct)
        with pytest.raises(EvaluationError, match=f"task, example 0: {says}"):
            ranking.rank("task", [odd], [np.array([-1.0, -2.0])])


def test_a_choice_without_a_score_is_refused(examples):
    for scores in ([-1.0], [-1.0, -2.0, -3.0]):
        with pytest.raises(EvaluationError, match=f"example 0: {len(scores)} scores of 2 choices"):
            ranking.rank("task", [examples[0]], [np.array(scores)])


def test_no_examples_have_no_accuracy():
    with pytest.raises(EvaluationError, match="no examples"):
        ranking.rank("task", [], [])


def test_each_rule_compares_what_it_says(examples):
    one = dataclasses.replace(examples[1], choices_text=("né", "", "abcd"))
    scores, empty = [np.array([-6.0, -8.0, -3.0])], [np.array([-1.0, -9.0, -2.0])]
    wanted = {
        "sum": [-6, -8, -3],
        "per_token": [-6 / 3, -8 / 4, -3 / 2],
        # Bytes, not letters; an empty text counts as one.
        "per_byte": [-6 / 3, -8 / 1, -3 / 4],
        "calibrated": [-5, 1, -1],
    }
    assert tuple(wanted) == ranking.RULES
    for rule, values in wanted.items():
        [found] = ranking.rule_scores(rule, [one], scores, empty)
        np.testing.assert_allclose(found, values)
    figures = ranking.accuracy_by_rule("task", [one], scores, empty)
    assert figures == {
        "accuracy_per_token": 0.0,
        "accuracy_per_byte": 0.0,
        "accuracy_calibrated": 0.0,
    }
    with pytest.raises(UnknownNameError, match="'per_token'"):
        ranking.rule_scores("per_tokens", [one], scores, empty)


def test_calibration_scores_every_different_choice_once_after_an_empty_input(
    tiny_config, tiny_params, examples
):
    many = [*examples, *examples]
    layout = layouts.of(tiny_config)
    made, places = ranking.empty_inputs(many, layout, EOS)
    assert sum(len(one.choices) for one in made) == sum(len(one.choices) for one in examples)
    assert all(one.inputs.tolist() == [EOS] for one in made)
    scores = ranking.score_examples(tiny_config, tiny_params, made, batch_size=2)
    for example, of_one in zip(many, places, strict=True):
        alone = dataclasses.replace(example, inputs=np.array([EOS], np.int32))
        [wanted] = ranking.score_examples(tiny_config, tiny_params, [alone], batch_size=1)
        found = [scores[row][column] for row, column in of_one]
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_where_rows_begin_with_a_token_the_empty_input_is_this_alone(examples):
    for start, inputs in ((7, []), (None, [EOS])):
        made, _ = ranking.empty_inputs(examples, layouts.PrefixLM(start), EOS)
        assert all(one.inputs.tolist() == inputs for one in made)


def test_how_many_scores_are_not_finite_is_said(examples):
    with pytest.raises(EvaluationError, match="2 of 3 examples have scores that are not finite"):
        bad = np.array([0.0, np.nan])
        ranking.rank("task", [examples[0]] * 3, [bad, np.zeros(2), bad])
