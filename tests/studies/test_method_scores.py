"""Differences between methods that are more than noise: simultaneous intervals of made-up draws."""

import numpy as np
import pandas as pd
import pytest

from m2l.studies.method_scores import MethodScores


def scores(measured, deviations):
    """Scores whose replicates are the values and these deviations; the last is the base."""
    names = [*(f"method {number}" for number in range(len(measured) - 1)), "base"]
    settings = ["default"] * (len(names) - 1) + [""]
    rows = pd.DataFrame({"method": names, "settings": settings})
    replicates = np.concatenate([[measured], np.asarray(measured) + deviations])
    return MethodScores(rows, {"held_in": replicates})


def test_two_methods_are_compared_by_the_normal_interval_of_their_difference():
    rng = np.random.default_rng(0)
    shared, own = rng.normal(0, 1, (20_000, 1)), rng.normal(0, 0.1, (20_000, 2))
    # The base is the first method: there is one difference.
    deviations = (shared + own)[:, [0, 1, 0]]
    frame = scores([0.5, 0.7, 0.5], deviations).compared("held_in", "default")
    assert list(frame["method"]) == ["method 1", "method 0"]
    # What both share cancels; |z| below 1.96 is 95 % of a normal difference.
    assert frame["bound"][1] == pytest.approx(1.96 * np.sqrt(2) * 0.1, rel=0.02)
    assert frame["behind"][1] == pytest.approx(0.2)
    assert not frame["worse"].any() and not frame["beyond_base"].any()


def test_equal_methods_are_called_worse_in_one_of_twenty_comparisons_however_many_they_are():
    rng, calls = np.random.default_rng(1), 0
    for _ in range(300):
        deviations = rng.normal(0, 1, (500, 8))
        measured = rng.normal(0, 1, 8)  # Only noise, of the same size as the bootstrap's.
        calls += scores(measured, deviations).compared("held_in", "default")["worse"].any()
    assert 1 <= calls <= 30  # 15 are expected, with a standard deviation of 4.


def test_a_method_that_is_behind_in_every_draw_is_worse_and_an_identical_one_is_not():
    deviations = np.random.default_rng(2).normal(0, 1, (500, 1)).repeat(4, axis=1)
    frame = scores([0.5, 0.5, 0.4, 0.45], deviations).compared("held_in", "default")
    assert list(frame["worse"]) == [False, False, True]
    assert list(frame["beyond_base"]) == [True, True, False]
