"""The rule of choice, by hand."""

import pytest

from m2l.errors import ConfigError
from m2l.studies.adding_skills import CurvePoint, Tolerance, choose, steps_of

CURVE = [CurvePoint(0.2, 60.0, 50.0), CurvePoint(0.5, 59.0, 70.0), CurvePoint(0.8, 55.0, 80.0)]


@pytest.mark.parametrize(
    ("tolerance", "weight", "within"),
    [
        ("0", 0.2, True),
        ("1", 0.5, True),  # 59 is just enough
        ("0.9", 0.2, True),
        ("2%", 0.5, True),  # 58.8
        ("8%", 0.5, True),  # 55.2
        ("8.5%", 0.8, True),  # 54.9
        ("100%", 0.8, True),
    ],
)
def test_the_best_skill_of_those_that_keep_enough(tolerance, weight, within):
    choice = choose(CURVE, 60.0, Tolerance.parse(tolerance))
    assert (choice.point.weight, choice.within) == (weight, within)


def test_if_none_keeps_enough_the_one_that_loses_least():
    choice = choose(CURVE, 70.0, Tolerance.parse("2%"))
    assert (choice.point.weight, choice.within) == (0.2, False)


def test_of_equal_ones_the_one_that_keeps_more_then_the_smaller_weight():
    same = [CurvePoint(0.9, 60.0, 70.0), CurvePoint(0.3, 60.0, 70.0), CurvePoint(0.1, 59.5, 70.0)]
    assert choose(same, 60.0, Tolerance.parse("1")).point.weight == 0.3
    assert choose(same, 90.0, Tolerance.parse("1")).point.weight == 0.3


def test_a_merge_that_gains_on_what_is_kept_is_within():
    assert choose([CurvePoint(0.4, 61.0, 10.0)], 60.0, Tolerance.parse("0%")).within


def test_no_curve_gives_no_choice():
    with pytest.raises(ConfigError, match="no weights"):
        choose([], 60.0, Tolerance.parse("1"))


@pytest.mark.parametrize("text", ["", "%", "two", "-1", "101%", "nan", "2%%"])
def test_a_tolerance_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="expected 2%"):
        Tolerance.parse(text)


def test_steps_are_those_of_the_passes_and_at_least_one():
    assert [steps_of(2, 600, 8), steps_of(1, 601, 8), steps_of(0.001, 5, 8)] == [150, 76, 1]
