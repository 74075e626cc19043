"""The bootstrap against closed forms and scipy's."""

import numpy as np
import pytest
from scipy import stats

from m2l.evaluation import bootstrap


def of(values, metric="accuracy"):
    return bootstrap.statistic(metric, [{"value": value} for value in values])


def test_the_interval_of_a_mean_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(0).choice([0.0, 50.0, 100.0], 200, p=[0.3, 0.1, 0.6])
    wanted = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    result = bootstrap.interval([of(values)], [len(values)], draws=4000)
    # 4,000 draws leave its ends uncertain by about a twentieth of its width.
    assert result == pytest.approx([wanted.low, wanted.high], abs=0.6)


def test_one_seed_gives_one_interval_and_equal_values_one_without_width():
    values = np.random.default_rng(0).normal(size=30)
    intervals = [bootstrap.interval([of(values)], [30], draws=50, seed=seed) for seed in (0, 0, 1)]
    assert intervals[0] == intervals[1] != intervals[2]
    assert bootstrap.interval([of([70.0] * 9)], [9]) == [70.0, 70.0]


def test_a_paired_difference_is_sure_where_two_intervals_overlap():
    rng = np.random.default_rng(2)
    hard = rng.normal(50, 40, 300)
    # Better by a little on every example: to an unpaired test that is nothing.
    result = bootstrap.paired([of(hard)], [of(hard + 1 + rng.normal(0, 2, 300))], [300])
    assert 0.5 < result.low < result.value < result.high < 1.5 and result.p < 0.01
    low, high = bootstrap.interval([of(hard)], [300])
    assert high - low > 4


def test_its_p_is_about_that_of_the_paired_t_test():
    rng = np.random.default_rng(6)
    one = rng.normal(0, 1, 400)
    other = one + rng.normal(0.08, 1, 400)
    wanted = stats.ttest_rel(other, one).pvalue
    result = bootstrap.paired([of(one)], [of(other)], [400], draws=4000)
    assert 0.02 < wanted < 0.4
    assert result.p == pytest.approx(wanted, rel=0.3)


def test_models_that_are_the_same_do_not_differ():
    values = np.random.default_rng(0).normal(size=20)
    result = bootstrap.paired([of(values)], [of(values)], [20])
    assert (result.value, result.low, result.high, result.p) == (0, 0, 0, 1)


def test_a_likelihood_is_the_geometric_mean_and_bleu_the_corpus():
    logs = np.log([0.5, 0.125])
    assert of(logs, "reference_likelihood")(np.array([0, 1])) == pytest.approx(25.0)
    lines = [
        {"references": ["the cat sat on the mat"], "prediction": "the cat sat on the mat"},
        {"references": ["a dog barked at the moon"], "prediction": "birds sing in the morning air"},
    ]
    bleu = bootstrap.statistic("bleu", lines)
    assert bleu(np.array([0, 0])) == pytest.approx(100.0)
    assert 0 < bleu(np.array([0, 1])) < 100


def test_over_tasks_the_variances_of_means_add_up_whatever_their_sizes():
    rng = np.random.default_rng(3)
    few, many = rng.normal(40, 20, 50), rng.normal(70, 5, 400)
    low, high = bootstrap.interval([of(few), of(many)], [50, 400], draws=4000)
    sd = np.sqrt(few.var() / 50 + many.var() / 400) / 2
    mean = (few.mean() + many.mean()) / 2
    # Of 4,000 draws a quantile is known to about a twentieth of the width.
    assert [low, high] == pytest.approx([mean - 1.96 * sd, mean + 1.96 * sd], abs=0.2 * sd)


def test_a_paired_mean_of_two_tasks_is_the_mean_of_differences():
    rng = np.random.default_rng(4)
    one, other = rng.normal(50, 9, 60), rng.normal(55, 9, 60)
    single = bootstrap.paired([of(one)], [of(other)], [60])
    both = bootstrap.paired([of(one), of(other)], [of(other), of(other)], [60, 60])
    assert both.value == pytest.approx(single.value / 2)
    assert both.low < both.value < both.high
