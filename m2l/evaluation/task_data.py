"""A task's examples, read and tokenised once for every model that is evaluated on them."""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence

from m2l.data.examples import (
    GenerationExample,
    RankingExample,
    generation_examples,
    ranking_examples,
)
from m2l.data.prompts import GENERATIVE_SCORES, TaskInfo
from m2l.data.shots import NONE, TRAINING, Shots
from m2l.errors import DataError, UnknownNameError
from m2l.evaluation import metrics
from m2l.evaluation.decoding import GREEDY, Decoding
from m2l.progress import Progress
from m2l.typing import Json


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's examples, tokenised once and used for every model.

    Attributes:
        info: What the task is.
        examples: RankingExamples of a task with answer choices, GenerationExamples of others.
        max_length: Tokens that may be generated.
        digest: sha256 of everything that decides a score: tokens, choices, answers, metrics,
            and for free text what its score is and, decoding, how many tokens there may be and how
            they are searched.
        generative_score: Of prompts.GENERATIVE_SCORES, what scores a task in free text.
        decoding: How a model's text is decoded.
        shots: What stands before each example, whose tokens hold it.
    """

    info: TaskInfo
    examples: Sequence[RankingExample] | Sequence[GenerationExample]
    max_length: int
    digest: str
    generative_score: str = "decoding"
    decoding: Decoding = GREEDY
    shots: Shots = NONE

    @property
    def decoded(self) -> bool:
        """Whether the model has to write answers."""
        return self.info.kind == "generate" and self.generative_score == "decoding"

    @property
    def metric(self) -> str:
        """The headline metric: the task's own, or "reference_likelihood"."""
        ranked = self.info.kind == "rank"
        return self.info.metric if ranked or self.decoded else "reference_likelihood"

    @property
    def truncated(self) -> int:
        """Examples that lost tokens to the length limits."""
        return sum(example.truncated for example in self.examples)

    @property
    def shots_left_out(self) -> int:
        """Shots that stand before no example, as its inputs with them would be too long."""
        return self.shots.count * len(self.examples) - sum(each.shots for each in self.examples)

    def shots_settings(self) -> dict[str, str]:
        """Returns what the shots are, in words, for a result: nothing without any."""
        if not self.shots.count:
            return {}
        left_out = (
            f"; {self.shots_left_out:,} of {self.shots.count * len(self.examples):,} left out"
        )
        text = f"{self.shots.count} of {TRAINING}, seed {self.shots.seed}"
        return {"shots": text + left_out * bool(self.shots_left_out)}


def load_tasks(
    infos: Iterable[TaskInfo],
    *,
    split: str,
    lengths: Mapping[str, int],
    max_examples: int | None = None,
    skip: int = 0,
    generative_score: str = "decoding",
    decoding: Decoding = GREEDY,
    max_truncated: float = 1.0,
    shots: Shots = NONE,
) -> list[TaskData]:
    """Reads and tokenises the tasks' examples.

    Args:
        infos: What the tasks are; none of kind "train".
        split: The split to read.
        lengths: {"inputs": S, "targets": T}, in tokens: what is longer is cut and counted.
        max_examples: The most examples of each task, drawn from all over the split.
        skip: With max_examples, how many of those drawn first are left out: examples to choose
            by, none of which is among those that a model is judged by.
        generative_score: What scores a task in free text. "decoding": the headline of its own
            metric; the likelihood of its references is another figure. "likelihood": that is
            its score, and nothing is decoded.
        decoding: How text is decoded.
        max_truncated: The share of a task's examples that may be longer than `lengths`.
        shots: Examples of a task's training split that stand before each. Of those that do not fit
            into `lengths` the last are left out, with a warning of how many.

    Raises:
        UnknownNameError: there is no such generative_score.
        DataError: a task has no such split, no examples in it that can be used, or too many that
            are cut.
        EvaluationError: a task is scored by running what the model writes, and that is not
            switched on.
    """
    if generative_score not in GENERATIVE_SCORES:
        raise UnknownNameError("generative_score", generative_score, GENERATIVE_SCORES)
    infos, loaded = list(infos), []
    if generative_score == "decoding":
        metrics.require([metric for info in infos for metric in info.metrics])
    with Progress("read tasks", len(infos), "tasks") as progress:
        for info in infos:
            read = ranking_examples if info.kind == "rank" else generation_examples
            selection = {"max_examples": max_examples, "skip": skip, "shots": shots}
            examples = read(info.name, split, lengths=lengths, **selection)
            if not examples:
                raise DataError(f"task {info.name}: its split {split!r} has no examples")
            settings = generative_score, decoding, shots
            task = TaskData(info, examples, lengths["targets"], "", *settings)
            if task.truncated > max_truncated * len(examples):
                raise DataError(
                    f"task {info.name}: {task.truncated} of {len(examples)} examples are longer "
                    f"than {lengths['inputs']} + {lengths['targets']} tokens, more than the share "
                    f"of {max_truncated:g} that may be cut; allow longer ones or a larger share"
                )
            if task.shots_left_out:
                warnings.warn(
                    f"task {info.name}: {task.shots_left_out} of {shots.count * len(examples)} "
                    f"shots are left out, as inputs have at most {lengths['inputs']} tokens with "
                    "them",
                    stacklevel=2,
                )
            loaded.append(dataclasses.replace(task, digest=_digest(task)))
            progress.update(len(loaded))
    return loaded


CHOOSING = "__choosing"
"""The suffix of the name of a half to choose by."""


def halves(task: TaskData) -> tuple[TaskData, TaskData]:
    """Splits a task's examples into those to choose by and those to judge by.

    They are sorted by their inputs' digests and cut in the middle, where examples of the same
    inputs stay together: no input is in both halves, and the order of a file does not matter.

    Returns:
        The half to choose by, its task's name ending in CHOOSING, and the half to judge by.

    Raises:
        DataError: a half would be empty.
    """
    by_inputs: dict[bytes, list[int]] = {}
    for number, example in enumerate(task.examples):
        digest = hashlib.sha256(example.inputs_text.encode()).digest()
        by_inputs.setdefault(digest, []).append(number)
    chosen: list[int] = []
    for digest in sorted(by_inputs):
        if 2 * (len(chosen) + len(by_inputs[digest])) <= len(task.examples):
            chosen += by_inputs[digest]
    judging = set(range(len(task.examples))) - set(chosen)
    if not chosen or not judging:
        raise DataError(
            f"task {task.info.name}: {len(task.examples)} examples of {len(by_inputs)} different "
            "inputs cannot be halved into some to choose by and some to judge by; give more"
        )

    def part(info: TaskInfo, numbers: Iterable[int]) -> TaskData:
        examples = [task.examples[number] for number in sorted(numbers)]
        half = dataclasses.replace(task, info=info, examples=examples)
        return dataclasses.replace(half, digest=_digest(half))

    choosing_info = dataclasses.replace(task.info, name=task.info.name + CHOOSING)
    return part(choosing_info, chosen), part(task.info, judging)


def _digest(task: TaskData) -> str:
    generated = task.info.kind == "generate"
    decided_by: list[Json] = [task.info.kind, task.info.metrics]
    decided_by += [task.max_length if task.decoded else None]
    decided_by += [task.generative_score] if generated else []
    decided_by += task.decoding.decided_by if task.decoded else []
    decided_by += metrics.require(task.info.metrics) if task.decoded else []
    digest = hashlib.sha256(json.dumps(decided_by).encode())
    for example in task.examples:
        if isinstance(example, RankingExample):
            answer = [[choice.tolist() for choice in example.choices], list(example.is_correct)]
        else:
            answer = [example.target.tolist(), example.reference]
        digest.update(json.dumps([example.inputs.tolist(), answer]).encode())
    return digest.hexdigest()
