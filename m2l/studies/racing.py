"""Races: candidates are scored on more and more examples, as long as they may be the best.

Maron and Moore 1994, "Hoeffding Races", here with a paired bootstrap in place of Hoeffding's bound.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from m2l import models
from m2l.data.vocabularies import Vocabulary
from m2l.evaluation.evaluator import Evaluator
from m2l.evaluation.task_data import TaskData
from m2l.typing import Params

DRAWS = 500
"""How often a race draws examples."""
LEAST_RACED = 20
"""Examples of an aim that have to be scored before a candidate can lose."""
_PARTS = (slice(0, None, 8), slice(4, None, 8), slice(2, None, 4), slice(1, None, 2))
"""Of each task's examples, what is scored before the first look, the second..., and at the end."""

Values = dict[str, list[float]]
"""By task, the part of the score of each example that was scored."""


class ChoosingHalf:
    """The half of the data that chooses, in blocks: a race scores one after the other.

    A block has a part of each task, scored in as few lists of examples as can be: full batches.

    Args:
        aims: The tasks of each aim.
        config: The models' configuration.
        vocabulary: The models'.
        batch_size: Examples in a batch, at most.
        confidence: How sure a race has to be, from 0 to 1; None: there is one block, and no race.
    """

    def __init__(
        self,
        aims: Sequence[Sequence[TaskData]],
        config: models.Config,
        vocabulary: Vocabulary,
        batch_size: int,
        confidence: float | None,
    ):
        self._confidence = confidence
        self.aims = [[task.info.name for task in tasks] for tasks in aims]
        self._metrics = {task.info.name: task.metric for tasks in aims for task in tasks}
        self._pools: list[dict[str, list[tuple[str, int]]]] = []
        pools: list[TaskData] = []
        for block in range(1 if confidence is None else len(_PARTS)):
            alike: dict[tuple[object, ...], list[TaskData]] = {}
            for task in itertools.chain(*aims):
                key = task.info.kind, task.metric, task.generative_score, task.max_length
                alike.setdefault(key, []).append(task)
            members = {}
            for tasks in alike.values():
                part = slice(None) if confidence is None else _PARTS[block]
                examples = [example for task in tasks for example in task.examples[part]]
                if examples:
                    name = f"block {block} {len(members)}"
                    members[name] = [(t.info.name, len(t.examples[part])) for t in tasks]
                    info = dataclasses.replace(tasks[0].info, name=name)
                    pools.append(dataclasses.replace(tasks[0], info=info, examples=examples))
            self._pools.append(members)
        self._evaluator = Evaluator(config, pools, vocabulary, batch_size=batch_size)

    @property
    def blocks(self) -> int:
        """How many there are."""
        return len(self._pools)

    def counts(self, blocks: int) -> dict[str, int]:
        """Returns by task how many examples the first blocks have."""
        counts = dict.fromkeys(self._metrics, 0)
        for members in self._pools[:blocks]:
            for name, count in itertools.chain(*members.values()):
                counts[name] += count
        return counts

    def add(self, params: Params, block: int, values: Values) -> Values:
        """Returns the values with those of a block at their ends."""
        scored = self._evaluator.values(params, only=list(self._pools[block]))
        extended = {name: [*values.get(name, ())] for name in self._metrics}
        for pool, members in self._pools[block].items():
            parts = iter(scored[pool])
            for name, count in members:
                extended[name] += itertools.islice(parts, count)
        return extended

    def scores(self, values: Values) -> tuple[float, ...]:
        """Returns for each aim the mean score of its tasks, in percent."""
        return tuple(
            self._mean(tasks, [float(np.mean(values[name])) for name in tasks])
            for tasks in self.aims
        )

    def _mean(self, tasks: Sequence[str], means: Sequence[float]) -> float:
        """Returns the mean over tasks of their scores, which follow from means over examples."""
        is_likelihood = [self._metrics[name] == "reference_likelihood" for name in tasks]
        means_T = np.asarray(means)
        return float(np.where(is_likelihood, 100 * np.exp(means_T), means_T).mean())

    def lost(self, values: Values, blocks: int, rival: Values) -> list[float] | None:
        """Returns the differences from a rival if all are shown to be below 0, else None.

        By a paired bootstrap: of the n examples of each task n - 1 are drawn, for the variance
        would be too small otherwise (McCarthy and Snowden 1985); nothing is shown by tasks of which
        one example was scored.

        Args:
            values: Of the candidate, of the first blocks.
            blocks: How many.
            rival: The rival's, of all blocks.
        """
        counts, rng = self.counts(blocks), np.random.default_rng(0)
        differences = []
        for tasks in self.aims:
            sizes_T = np.array([counts[name] for name in tasks])
            if sizes_T.min() < 2 or sizes_T.sum() < LEAST_RACED:
                return None
            pair = [
                np.concatenate([side[name][: counts[name]] for name in tasks])
                for side in (values, rival)
            ]
            seen = self._difference(tasks, pair, np.arange(sizes_T.sum()), sizes_T)
            if seen >= 0:
                return None
            drawn_T, first_T = sizes_T - 1, np.cumsum(sizes_T) - sizes_T
            size_D, first_D = np.repeat(sizes_T, drawn_T), np.repeat(first_T, drawn_T)
            draws = [
                self._difference(tasks, pair, first_D + rng.integers(0, size_D), drawn_T)
                for _ in range(DRAWS)
            ]
            if np.quantile(draws, self._confidence) >= 0:
                return None
            differences.append(seen)
        return differences

    def _difference(
        self,
        tasks: Sequence[str],
        pair: Sequence[np.ndarray],
        numbers: np.ndarray,
        sizes_T: np.ndarray,
    ) -> float:
        """Returns how much more the first of a pair scores on examples that are sorted by task."""
        first_T = np.cumsum(sizes_T) - sizes_T
        means = [np.add.reduceat(values_N[numbers], first_T) / sizes_T for values_N in pair]
        return self._mean(tasks, means[0]) - self._mean(tasks, means[1])


def front_of(scores: Sequence[Sequence[float]]) -> list[int]:
    """Returns the places of what nothing is better than in every aim, the best of the first first.

    Of equal ones it is the first.
    """
    front: list[int] = []
    for place in sorted(range(len(scores)), key=lambda place: [-s for s in scores[place]]):
        if not front or all(
            any(own > other for own, other in zip(scores[place], scores[each], strict=True))
            for each in front
        ):
            front.append(place)
    return front
