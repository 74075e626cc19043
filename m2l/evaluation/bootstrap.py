"""Confidence intervals of scores: the bootstrap over examples (Efron and Tibshirani 1993)."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean

import numpy as np

from m2l.evaluation import metrics
from m2l.typing import Json

Statistic = Callable[[np.ndarray], float]
"""The score in percent of the examples of these numbers, of which one may come several times."""

DRAWS = 1000
_LEVEL = 0.95
# Corpus BLEU is computed anew for every draw.
DRAWS_OF_BLEU = 200


def statistic(metric: str, lines: Sequence[Mapping[str, Json]]) -> Statistic:
    """Returns the function that scores any of the examples by their task's headline metric.

    Args:
        metric: As `Result.metric`.
        lines: Of every example what `results.write_examples` takes.
    """
    if metric == "bleu":
        references = [line["references"] for line in lines]
        samples = [line.get("predictions") or [line["prediction"]] for line in lines]
        rules = metrics.bleu_rules(references)

        def corpus(numbers: np.ndarray) -> float:
            drawn = [references[i] for i in numbers]
            columns = [[column[i] for i in numbers] for column in zip(*samples, strict=True)]
            scores = [metrics.bleu(drawn, column, rules)["bleu"] for column in columns]
            return sum(scores) / len(scores)

        return corpus
    values = np.array([line["value"] for line in lines], np.float64)
    if metric == "reference_likelihood":
        return lambda numbers: 100.0 * float(np.exp(values[numbers].mean()))
    return lambda numbers: float(values[numbers].mean())


def draws_of(metric: str) -> int:
    """Returns how often examples are drawn."""
    return DRAWS_OF_BLEU if metric == "bleu" else DRAWS


def interval(
    statistics: Sequence[Statistic],
    counts: Sequence[int],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[float]:
    """Computes the 95 % percentile interval of a mean of statistics over examples drawn again.

    Args:
        statistics: That of each task.
        counts: How many examples each task has; as many are drawn, with replacement.
        draws: How often.
        seed: Of the draws: the same ones for every model.

    Returns:
        Its lower and upper end.
    """
    means = [_mean(statistics, numbers) for numbers in _draw(counts, draws, seed)]
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return [float(low), float(high)]


def _draw(counts: Sequence[int], draws: int, seed: int) -> Iterator[list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield [rng.integers(0, count, count) for count in counts]


def _mean(statistics: Sequence[Statistic], numbers: Sequence[np.ndarray]) -> float:
    return fmean(score(drawn) for score, drawn in zip(statistics, numbers, strict=True))


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much more one model scores than another on the same examples.

    Attributes:
        value: The difference in percent.
        low, high: Its interval of 95 % confidence.
        p: How likely so many draws on one side of 0 are if there is no difference, two-sided.
    """

    value: float
    low: float
    high: float
    p: float


def paired(
    one: Sequence[Statistic],
    other: Sequence[Statistic],
    counts: Sequence[int],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """Compares the means of two models, `other` less `one`, on the same draws (Koehn 2004).

    Args:
        one, other: Each model's statistic of each task, on examples of the same numbers.
        counts: How many examples each task has.
        draws: How often examples are drawn.
        seed: Of the draws.
    """
    differences = np.array(
        [_mean(other, drawn) - _mean(one, drawn) for drawn in _draw(counts, draws, seed)]
    )
    low, high = np.quantile(differences, [0.025, 0.975])
    beyond = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    whole = [np.arange(count) for count in counts]
    p = min(1.0, 2 * (beyond + 1) / (draws + 1))
    return Difference(_mean(other, whole) - _mean(one, whole), float(low), float(high), p)
