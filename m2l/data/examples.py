"""From a task to the examples that models are evaluated by."""

import itertools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from m2l.data import example_cache
from m2l.data.shots import NONE, TRAINING, DrawnShots, Shots
from m2l.data.text_tasks import SCORE_EVAL, TextTask, check_known, encode, find_task
from m2l.errors import DataError

_EXAMPLES_AT_ONCE = 512
Row: TypeAlias = dict[str, Any]  # arrays, and texts as bytes


@dataclass(frozen=True, eq=False)
class RankingExample:
    """A question and the answers to choose from.

    Attributes:
        inputs: int32 [S], no EOS.
        choices: Per choice int32 [T], EOS last.
        is_correct: Per choice, whether it is the right one; exactly one is.
        inputs_text: The inputs as text, before any were cut off.
        choices_text: The choices as text.
        truncated: Whether the inputs or a choice were longer than allowed, and were cut.
        shots: How many shots stand before them, in `inputs` and `inputs_text`.
    """

    inputs: np.ndarray
    choices: tuple[np.ndarray, ...]
    is_correct: tuple[bool, ...]
    inputs_text: str
    choices_text: tuple[str, ...]
    truncated: bool
    shots: int = 0


@dataclass(frozen=True, eq=False)
class GenerationExample:
    """A question that is answered in free text.

    Attributes:
        inputs: int32 [S], no EOS.
        target: int32 [T], what a model is trained to answer, cut as in training; EOS last.
        reference: Every text that counts as right, as the metrics want it; none is blank.
        inputs_text: The inputs as text, before any were cut off.
        reference_text: The target as text, before any was cut off.
        truncated: Whether the inputs or the target were longer than allowed, and were cut.
        shots: How many shots stand before them, in `inputs` and `inputs_text`.
    """

    inputs: np.ndarray
    target: np.ndarray
    reference: tuple[str, ...]
    inputs_text: str
    reference_text: str
    truncated: bool
    shots: int = 0


def _rows(
    task: TextTask,
    suffix: str,
    split: str,
    max_examples: int | None,
    skip: int,
    shots: Shots,
    input_length: int,
) -> Iterator[Row]:
    """Yields the rows that seqio would make, of all records or of some from all over the split.

    One for each record; of its twin of suffix SCORE_EVAL, one for each answer choice.
    """
    if split not in task.records.splits:
        splits = ", ".join(sorted(task.records.splits))
        raise DataError(f"{task.name + suffix!r} has no split {split!r}; it has {splits}")
    if max_examples is None:
        numbers = np.arange(task.records.split(split).size)
    else:
        numbers = task.records.sample(split, max_examples, skip)
    drawn = DrawnShots(task, shots) if shots.count else None
    for first in range(0, len(numbers), _EXAMPLES_AT_ONCE):
        chunk = numbers[first : first + _EXAMPLES_AT_ONCE].tolist()
        texts = [task.texts(split, number) for number in chunk]
        answers = [each["answer_choices"] if suffix else [each["targets"]] for each in texts]
        inputs_texts = [each["inputs"] for each in texts]
        if drawn:
            inputs = drawn.encode(inputs_texts, input_length)
        else:
            ids = encode(task.inputs, inputs_texts, task.name)
            inputs = list(zip(ids, inputs_texts, itertools.repeat(0), strict=False))
        targets = iter(encode(task.targets, [*itertools.chain(*answers)], task.name))
        for place, example in enumerate(texts):
            for choice, answer in enumerate(answers[place]):
                yield {
                    "idx": (first + place, choice),
                    "inputs": inputs[place][0],
                    "inputs_pretokenized": inputs[place][1],
                    "shots": inputs[place][2],
                    "targets": np.append(next(targets), np.int32(task.targets.eos_id)),
                    "targets_pretokenized": answer,
                    "is_correct": answer == example["targets"],
                    "references": example.get("references", ()),
                }


def _foreign_rows(
    kind: str, name: str, split: str, max_examples: int | None, skip: int, shots: Shots
) -> tuple[set[str], Iterator[Row]]:
    """Returns the rows of a task that is in seqio's registry alone, and their names."""
    check_known(kind, name)
    if shots.count:
        raise DataError(f"task {name!r} is in seqio's registry alone: no shots can be rendered")
    from m2l.data import seqio_pipeline

    return seqio_pipeline.rows(kind, name, split, max_examples, skip)


def _cut_inputs(row: Row, lengths: Mapping[str, int], place: str) -> np.ndarray:
    inputs = row["inputs"][: lengths["inputs"]]
    if not len(inputs):
        raise DataError(f"{place}: its inputs are empty")
    return inputs


def _cut_targets(row: Row, lengths: Mapping[str, int]) -> np.ndarray:
    # As append_eos_after_trim does: what is cut off makes room for the last token, EOS.
    return np.append(row["targets"][:-1][: lengths["targets"] - 1], row["targets"][-1])


def ranking_examples(
    task: str,
    split: str,
    *,
    lengths: Mapping[str, int],
    max_examples: int | None = None,
    skip: int = 0,
    shots: Shots = NONE,
) -> list[RankingExample]:
    """Reads the examples of a task with answer choices, from the rows of its `_score_eval` twin.

    Args:
        task: The task's name, or its twin's.
        split: The split to read.
        lengths: {"inputs": S, "targets": T}, in tokens: what is longer is cut and flagged.
        max_examples: Only so many examples (not rows), drawn from all over the split.
        skip: With max_examples, so many that would be drawn first are left out.
        shots: Examples that stand before each; where all is longer than S, fewer.

    Raises:
        UnknownNameError: no such task with answer choices.
        DataError: an example without inputs, with an empty choice, with choices that are the same
            tokens, without a right choice or with rows missing; names task and example.
    """
    kind, name = "task with answer choices", task.removesuffix(SCORE_EVAL)
    text_task = find_task(name)
    if text_task is None or not text_task.with_choices:
        _, rows = _foreign_rows(kind, name + SCORE_EVAL, split, max_examples, skip, shots)
        return _ranking_examples(task, rows, lengths)
    options = max_examples, skip, shots
    file = _file(text_task, split, lengths, *options)
    if file and (stored := example_cache.read(file)):
        return [_ranking_of(*example) for example in stored[0]]
    rows = _rows(text_task, SCORE_EVAL, split, *options, lengths["inputs"])
    examples = _ranking_examples(task, rows, lengths)
    if file:
        example_cache.write(
            file,
            [
                (
                    [example.inputs, *example.choices],
                    [example.inputs_text, *example.choices_text],
                    (example.is_correct.index(True), int(example.truncated) + 2 * example.shots),
                )
                for example in examples
            ],
            {},
        )
    return examples


def _file(
    task: TextTask,
    split: str,
    lengths: Mapping[str, int],
    max_examples: int | None,
    skip: int,
    shots: Shots,
) -> Path | None:
    if split not in task.records.splits:
        return None
    selection = {"max_examples": max_examples, "skip": skip if max_examples else 0}
    if shots.count:
        training = task.records.origin(TRAINING) if TRAINING in task.records.splits else None
        if training is None:
            return None
        selection["shots"] = [shots.count, shots.seed, training]
    return example_cache.path(task, split, lengths=dict(lengths), **selection)


def _ranking_of(ids: list[np.ndarray], texts: list[str], flags: tuple[int, int]) -> RankingExample:
    choices, right = tuple(ids[1:]), flags[0]
    is_correct = tuple(number == right for number in range(len(choices)))
    shots, truncated = divmod(flags[1], 2)
    return RankingExample(
        ids[0], choices, is_correct, texts[0], tuple(texts[1:]), bool(truncated), shots
    )


def _ranking_examples(
    task: str, rows: Iterator[Row], lengths: Mapping[str, int]
) -> list[RankingExample]:
    groups = itertools.groupby(rows, key=lambda row: int(row["idx"][0]))
    return [_ranking_example(task, number, list(group), lengths) for number, group in groups]


def _ranking_example(
    task: str, number: int, rows: list[Row], lengths: Mapping[str, int]
) -> RankingExample:
    place = f"task {task!r}, example {number}"
    if [int(row["idx"][1]) for row in rows] != list(range(len(rows))) or len(rows) < 2:
        raise DataError(f"{place}: the rows of its choices are incomplete or out of order")
    # A text that a record offers twice (some of CosmosQA do) is one choice.
    by_text = {row["targets_pretokenized"]: row for row in reversed(rows)}
    rows = [row for row in rows if by_text[row["targets_pretokenized"]] is row]
    if len(rows) < 2:
        raise DataError(f"{place}: all its choices are the same text")
    texts = tuple(row["targets_pretokenized"] for row in rows)
    choices = []
    for row, text in zip(rows, texts, strict=True):
        if len(row["targets"]) < 2:
            raise DataError(f"{place}: the choice {text!r} has no tokens but the end")
        choices.append(_cut_targets(row, lengths))
    for a, b in itertools.combinations(range(len(choices)), 2):
        if np.array_equal(choices[a], choices[b]):
            raise DataError(
                f"{place}: the choices {texts[a]!r} and {texts[b]!r} are the same tokens, so no "
                "score can tell them apart; make them differ, or allow longer targets"
            )
    is_correct = tuple(bool(row["is_correct"]) for row in rows)
    if sum(is_correct) != 1:
        raise DataError(f"{place}: {sum(is_correct)} of its {len(rows)} choices are its target")
    inputs = _cut_inputs(rows[0], lengths, place)
    truncated = len(inputs) < len(rows[0]["inputs"]) or any(
        len(choice) < len(row["targets"]) for choice, row in zip(choices, rows, strict=True)
    )
    return RankingExample(
        inputs=inputs,
        choices=tuple(choices),
        is_correct=is_correct,
        inputs_text=rows[0]["inputs_pretokenized"],
        choices_text=texts,
        truncated=truncated,
        shots=rows[0].get("shots", 0),
    )


def generation_examples(
    task: str,
    split: str,
    *,
    lengths: Mapping[str, int],
    max_examples: int | None = None,
    skip: int = 0,
    shots: Shots = NONE,
) -> list[GenerationExample]:
    """Reads the examples of a task that is answered in free text.

    Args:
        task: The task's name.
        split: The split to read.
        lengths: {"inputs": S, "targets": T}, in tokens: what is longer is cut and flagged.
        max_examples: Only so many examples, drawn from all over the split.
        skip: With max_examples, so many that would be drawn first are left out.
        shots: Examples that stand before each; where all is longer than S, fewer.

    Raises:
        UnknownNameError: no such task.
        DataError: it has answer choices; or an example has no inputs, or none has an answer. Those
            without an answer are left out, with a warning that says how many.
    """
    text_task, file = find_task(task), None
    options = max_examples, skip, shots
    if text_task is not None:
        is_free = text_task.free
        rows = _rows(text_task, "", split, *options, lengths["inputs"])
    else:
        names, rows = _foreign_rows("task", task, split, *options)
        is_free = "references" in names
    if not is_free:
        raise DataError(f"task {task!r} is not answered in free text: nothing to compare with")
    if text_task is not None:
        file = _file(text_task, split, lengths, *options)
    if file and (stored := example_cache.read(file)):
        examples = [_generation_of(*example) for example in stored[0]]
        _warn_of_blanks(task, split, stored[1]["blank"])
        return examples
    examples, blank = [], 0
    for number, row in enumerate(rows):
        place = f"task {task!r}, example {number}"
        # To say nothing would match a blank reference exactly.
        reference = tuple(text for text in row["references"] if text.strip())
        if not reference or len(row["targets"]) < 2:
            blank += 1
            continue
        inputs, target = _cut_inputs(row, lengths, place), _cut_targets(row, lengths)
        examples.append(
            GenerationExample(
                inputs=inputs,
                target=target,
                reference=reference,
                inputs_text=row["inputs_pretokenized"],
                reference_text=row["targets_pretokenized"],
                truncated=len(inputs) < len(row["inputs"]) or len(target) < len(row["targets"]),
                shots=row.get("shots", 0),
            )
        )
    if blank and not examples:
        raise DataError(f"task {task!r}, split {split!r}: no example has an answer to compare with")
    if file:
        stored = [
            (
                [example.inputs, example.target],
                [example.inputs_text, example.reference_text, *example.reference],
                (0, int(example.truncated) + 2 * example.shots),
            )
            for example in examples
        ]
        example_cache.write(file, stored, {"blank": blank})
    _warn_of_blanks(task, split, blank)
    return examples


def _generation_of(
    ids: list[np.ndarray], texts: list[str], flags: tuple[int, int]
) -> GenerationExample:
    shots, truncated = divmod(flags[1], 2)
    return GenerationExample(*ids, tuple(texts[2:]), texts[0], texts[1], bool(truncated), shots)


def _warn_of_blanks(task: str, split: str, blank: int) -> None:
    if blank:
        warnings.warn(
            f"task {task!r}, split {split!r}: {blank} examples without an answer to compare with "
            "are left out",
            stacklevel=3,
        )
