"""How far a score may be off: the bootstrap over examples (Efron and Tibshirani 1993)."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from m2l.evaluation import metrics

Statistic = Callable[[np.ndarray], float]
"""Of the examples whose numbers are given, some of them several times: their score in percent."""

DRAWS = 1000
# Corpus BLEU is computed anew for every draw.
DRAWS_OF_BLEU = 200


def statistic(metric: str, lines: Sequence[Mapping[str, Any]]) -> Statistic:
    """The score of any of the examples, by the metric that stands for their task.

    Args:
        metric: As `Result.metric`.
        lines: Of every example what `results.write_examples` takes.
    """
    if metric == "bleu":
        references = [line["references"] for line in lines]
        predictions = [line["prediction"] for line in lines]
        rules = metrics.bleu_rules(references)

        def corpus(numbers: np.ndarray) -> float:
            drawn = [[of_all[i] for i in numbers] for of_all in (references, predictions)]
            return metrics.bleu(*drawn, rules)["bleu"]

        return corpus
    values = np.array([line["value"] for line in lines], np.float64)
    if metric == "reference_likelihood":
        return lambda numbers: 100.0 * float(np.exp(values[numbers].mean()))
    return lambda numbers: float(values[numbers].mean())


def draws_of(metric: str) -> int:
    """How often examples are drawn."""
    return DRAWS_OF_BLEU if metric == "bleu" else DRAWS


def interval(
    of: Statistic, count: int, *, draws: int = DRAWS, level: float = 0.95, seed: int = 0
) -> list[float]:
    """Between which two values a statistic lies: percentiles over examples drawn with replacement.

    Args:
        of: The statistic.
        count: How many examples there are.
        draws: How often so many are drawn.
        level: The share of draws between the two.
        seed: Of the draws: the same ones for every model.
    """
    return interval_of_mean([of], [count], draws=draws, level=level, seed=seed)


def interval_of_mean(
    of: Sequence[Statistic],
    counts: Sequence[int],
    *,
    draws: int = DRAWS,
    level: float = 0.95,
    seed: int = 0,
) -> list[float]:
    """The same of the mean over tasks, each of which keeps its number of examples in a draw.

    Args:
        of: The statistic of each task.
        counts: How many examples each has.
        draws, level, seed: As `interval` takes them.
    """
    found = [_mean(of, numbers) for numbers in _drawn(counts, draws, seed)]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def _drawn(counts: Sequence[int], draws: int, seed: int) -> Iterator[list[np.ndarray]]:
    """So often: of each task, as many of its examples as it has."""
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield [rng.integers(0, count, count) for count in counts]


def _mean(of: Sequence[Statistic], numbers: Sequence[np.ndarray]) -> float:
    return fmean(one(drawn) for one, drawn in zip(of, numbers, strict=True))


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much more one model scores than another on the same examples.

    Attributes:
        value: The difference in percent.
        low, high: Where it lies with 95 % confidence.
        p: How likely so many draws on one side of 0 are if there is no difference, two-sided.
    """

    value: float
    low: float
    high: float
    p: float


def paired(
    one: Statistic, other: Statistic, count: int, *, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """`other` less `one`; each draw takes the same examples of both (Koehn 2004).

    Args:
        one, other: The statistic of each model on examples of the same numbers.
        count: How many examples there are.
        draws: How often so many are drawn.
        seed: Of the draws.
    """
    return paired_means([one], [other], [count], draws=draws, seed=seed)


def paired_means(
    one: Sequence[Statistic],
    other: Sequence[Statistic],
    counts: Sequence[int],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """The same of two models' means over tasks.

    Args:
        one, other: Each model's statistic of each task.
        counts: How many examples each task has.
        draws, seed: As `paired` takes them.
    """
    drawn = list(_drawn(counts, draws, seed))
    found = np.array([_mean(other, numbers) - _mean(one, numbers) for numbers in drawn])
    low, high = np.quantile(found, [0.025, 0.975])
    beyond = min(int((found <= 0).sum()), int((found >= 0).sum()))
    whole = [np.arange(count) for count in counts]
    p = min(1.0, 2 * (beyond + 1) / (draws + 1))
    return Difference(_mean(other, whole) - _mean(one, whole), float(low), float(high), p)
