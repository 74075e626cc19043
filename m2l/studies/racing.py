"""Races: candidates are scored on more and more examples, as long as they may be the best.

Maron and Moore 1994, "Hoeffding Races", here with a paired bootstrap in place of Hoeffding's bound.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from m2l import models
from m2l.data.vocabularies import Vocabulary
from m2l.evaluation import bootstrap
from m2l.evaluation.bootstrap import Statistic
from m2l.evaluation.evaluator import Evaluator
from m2l.evaluation.task_data import TaskData
from m2l.typing import Params

DRAWS = 200
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
    """

    def __init__(
        self,
        aims: Sequence[Sequence[TaskData]],
        config: models.Config,
        vocabulary: Vocabulary,
        batch_size: int,
        racing: bool,
    ):
        self.aims = [[task.info.name for task in tasks] for tasks in aims]
        self._metrics = {task.info.name: task.metric for tasks in aims for task in tasks}
        self._pools: list[dict[str, list[tuple[str, int]]]] = []
        pools: list[TaskData] = []
        for block in range(len(_PARTS) if racing else 1):
            alike: dict[tuple[object, ...], list[TaskData]] = {}
            for task in itertools.chain(*aims):
                key = task.info.kind, task.metric, task.generative_score, task.max_length
                alike.setdefault(key, []).append(task)
            members = {}
            for tasks in alike.values():
                part = _PARTS[block] if racing else slice(None)
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

    def _statistic(self, values: Values, tasks: Sequence[str]) -> Statistic:
        """Returns the mean over tasks of their scores, of any of the tasks' examples together."""
        parts_N = np.concatenate([values[name] for name in tasks])
        task_N = np.repeat(np.arange(len(tasks)), [len(values[name]) for name in tasks])
        likelihood_T = np.array([self._metrics[name] == "reference_likelihood" for name in tasks])

        def mean(numbers: np.ndarray) -> float:
            drawn_T = np.bincount(task_N[numbers], minlength=len(tasks))
            sums_T = np.bincount(task_N[numbers], parts_N[numbers], minlength=len(tasks))
            means_T = sums_T / np.maximum(drawn_T, 1)
            means_T = np.where(likelihood_T, 100 * np.exp(means_T), means_T)
            return float(means_T[drawn_T > 0].mean())

        return mean

    def scores(self, values: Values) -> tuple[float, ...]:
        """Returns for each aim the mean score of its tasks, in percent."""
        sizes = [sum(len(values[name]) for name in tasks) for tasks in self.aims]
        pairs = zip(self.aims, sizes, strict=True)
        return tuple(self._statistic(values, tasks)(np.arange(size)) for tasks, size in pairs)

    def lost(self, values: Values, blocks: int, rival: Values) -> list[float] | None:
        """Returns the differences from a rival if all are shown to be below 0, else None.

        Examples of all tasks are drawn together: of those of each task, of which a first block has
        one or two, the variance would be underestimated.

        Args:
            values: Of the candidate, of the first blocks.
            blocks: How many.
            rival: The rival's, of all blocks.
        """
        counts = self.counts(blocks)
        seen = {name: rival[name][:count] for name, count in counts.items()}
        ahead = zip(self.scores(seen), self.scores(values), strict=True)
        if any(own >= other for other, own in ahead):
            return None
        differences = []
        for tasks in self.aims:
            tasks = [name for name in tasks if counts[name]]
            size = sum(counts[name] for name in tasks)
            if size < LEAST_RACED:
                return None
            pair = ([self._statistic(each, tasks)] for each in (seen, values))
            difference = bootstrap.paired(*pair, [size], draws=DRAWS)
            if difference.high >= 0:
                return None
            differences.append(difference.value)
        return differences


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
