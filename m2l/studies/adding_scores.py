"""What a model scores on a group of tasks, and by how much two models differ on it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from m2l.evaluation import bootstrap
from m2l.evaluation.bootstrap import Difference, Statistic
from m2l.evaluation.results import Result, read_examples, read_result, result_path


@dataclasses.dataclass(frozen=True)
class Scores:
    """A model's results on some tasks.

    Attributes:
        results: A result for each.
        statistics: Of each, the score of any of its examples.
    """

    results: tuple[Result, ...]
    statistics: tuple[Statistic, ...]

    @property
    def mean(self) -> float:
        """Over the tasks, in percent."""
        return fmean(result.score for result in self.results)

    @property
    def _draws(self) -> int:
        return min(bootstrap.draws_of(result.metric) for result in self.results)

    @property
    def _counts(self) -> list[int]:
        return [result.count for result in self.results]

    def interval(self) -> list[float]:
        """Where the mean lies with 95 % confidence."""
        return bootstrap.interval(self.statistics, self._counts, draws=self._draws)

    def against(self, other: "Scores") -> Difference:
        """How much more this model scores in the mean than another on the same examples."""
        return bootstrap.paired(other.statistics, self.statistics, self._counts, draws=self._draws)

    def single(self) -> list["Scores"]:
        """Each task by itself."""
        return [
            Scores((result,), (of,))
            for result, of in zip(self.results, self.statistics, strict=True)
        ]


def read_scores(folder: Path, tasks: Sequence[str]) -> Scores:
    """A model's scores from where an evaluation with examples left them.

    Raises:
        EvaluationError: results or examples are missing or damaged.
    """
    results = tuple(read_result(result_path(folder, task)) for task in tasks)
    statistics = tuple(
        bootstrap.statistic(result.metric, read_examples(folder, result.task)) for result in results
    )
    return Scores(results, statistics)
