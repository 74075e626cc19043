"""Two models on the same examples: by how much they differ, whether by chance, and where."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m2l.errors import EvaluationError
from m2l.evaluation import bootstrap
from m2l.evaluation.results import Result, read_examples, read_results


@dataclasses.dataclass(frozen=True)
class Flip:
    """An example that the two models do not answer alike.

    Attributes:
        number: Its number in the task, from 0.
        inputs: What the models read.
        right: The right answer.
        one, other: What each of them answers; with free text that is not decoded, the probability
            of a token of the reference.
        change: How much more the example adds to the second model's score; 0 where it cannot be
            said of one example (BLEU).
    """

    number: int
    inputs: str
    right: str
    one: str
    other: str
    change: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two results on one task, the examples that are answered differently, largest change first."""

    one: Result
    other: Result
    difference: bootstrap.Difference
    flips: Sequence[Flip]


def compare(one: Path, other: Path) -> tuple[list[Comparison], list[str]]:
    """Compares two folders of `m2l eval --examples`.

    Returns:
        A comparison of each task that both have, and the names of the tasks that only one has.

    Raises:
        EvaluationError: they have no task in common; one was scored on other examples or by another
            metric; results or examples are missing or damaged.
    """
    of_one, of_other = read_results(one), read_results(other)
    both = [task for task in of_one if task in of_other]
    if not both:
        raise EvaluationError(f"{one} and {other} have no task in common")
    found = []
    for task in both:
        first, second = of_one[task], of_other[task]
        if (first.metric, first.task_digest) != (second.metric, second.task_digest):
            raise EvaluationError(
                f"{task}: {one} and {other} were scored on other examples or by another score "
                f"({first.metric} on {first.count}, {second.metric} on {second.count}); evaluate "
                "both anew"
            )
        lines = read_examples(one, task), read_examples(other, task)
        for folder, result, of_folder in zip((one, other), (first, second), lines, strict=True):
            if len(of_folder) != result.count:
                raise EvaluationError(
                    f"{folder}: {task} has {result.count} examples, but {len(of_folder)} are there"
                )
        statistics = [bootstrap.statistic(first.metric, of_folder) for of_folder in lines]
        draws = bootstrap.draws_of(first.metric)
        difference = bootstrap.paired(*statistics, first.count, draws=draws)
        found.append(Comparison(first, second, difference, flips(*lines)))
    return found, sorted(set(of_one) ^ set(of_other))


def flips(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> list[Flip]:
    """The examples that two models answer differently, the largest change of score first."""
    found = []
    for number, (first, second) in enumerate(zip(one, other, strict=True)):
        answers = _answer(first), _answer(second)
        if answers[0] != answers[1]:
            known = first["value"] is not None
            change = second["value"] - first["value"] if known else 0.0
            right = first["choices"][first["right"]] if "choices" in first else None
            right = first["references"][0] if right is None else right
            found.append(Flip(number, first["inputs"], right, *answers, change))
    return sorted(found, key=lambda flip: -abs(flip.change))


def _answer(line: Mapping[str, Any]) -> str:
    if "choices" in line:
        return " = ".join(line["choices"][place] for place in line["taken"])
    if "prediction" in line:
        return line["prediction"]
    return f"log p {line['value']:.2f} a token"
