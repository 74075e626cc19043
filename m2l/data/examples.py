"""From a registered seqio task to the examples that models are evaluated by."""

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import seqio
import tensorflow as tf

from m2l.data.pipeline import SCORE_EVAL, as_written, find, unusable
from m2l.data.record_source import RecordSource
from m2l.errors import DataError

_ROWS_AT_ONCE = 512
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
    """

    inputs: np.ndarray
    choices: tuple[np.ndarray, ...]
    is_correct: tuple[bool, ...]
    inputs_text: str
    choices_text: tuple[str, ...]
    truncated: bool


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
    """

    inputs: np.ndarray
    target: np.ndarray
    reference: tuple[str, ...]
    inputs_text: str
    reference_text: str
    truncated: bool


def _in_order(task: seqio.Task, split: str, max_examples: int | None, skip: int) -> tf.data.Dataset:
    """Returns a task's rows, of all records or of so many from all over the split."""
    if max_examples is None:
        return task.get_dataset(None, split=split, shuffle=False, try_in_mem_cache=False)
    if not isinstance(task.source, RecordSource):  # someone else's task
        records = task.source.get_dataset(split, shuffle=False).skip(skip).take(max_examples)
        return task.preprocess_postcache(task.preprocess_precache(records), sequence_length=None)
    records = task.source.sample(split, max_examples, skip)
    return task.preprocess_postcache(records, sequence_length=None)


def _rows(dataset: tf.data.Dataset, task: str) -> Iterator[Row]:
    """Yields a task's rows as NumPy values."""
    try:
        for batch in dataset.ragged_batch(_ROWS_AT_ONCE).with_options(as_written()):
            columns = {name: _by_row(value) for name, value in batch.items()}
            for row in zip(*columns.values(), strict=True):
                yield dict(zip(columns, row, strict=True))
    except tf.errors.InvalidArgumentError as error:
        raise DataError(unusable(task, error)) from error


def _by_row(values: tf.Tensor | tf.RaggedTensor) -> Iterable[np.ndarray | bytes]:
    if isinstance(values, tf.RaggedTensor):
        return np.split(values.values.numpy(), values.row_splits.numpy()[1:-1])
    return values.numpy()


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
) -> list[RankingExample]:
    """Reads the examples of a task with answer choices, from the rows of its `_score_eval` twin.

    Args:
        task: The task's name, or its twin's.
        split: The split to read.
        lengths: {"inputs": S, "targets": T}, in tokens: what is longer is cut and flagged.
        max_examples: Only so many examples (not rows), drawn from all over the split.
        skip: With max_examples, so many that would be drawn first are left out.

    Raises:
        UnknownNameError: no such task with answer choices.
        DataError: an example without inputs, with an empty choice, with choices that are the same
            tokens, without a right choice or with rows missing; names task and example.
    """
    twin = find("task with answer choices", task.removesuffix(SCORE_EVAL) + SCORE_EVAL, split)
    dataset = _in_order(twin, split, max_examples, skip)
    groups = itertools.groupby(_rows(dataset, task), key=lambda row: int(row["idx"][0]))
    return [_ranking_example(task, number, list(rows), lengths) for number, rows in groups]


def _ranking_example(
    task: str, number: int, rows: list[Row], lengths: Mapping[str, int]
) -> RankingExample:
    place = f"task {task!r}, example {number}"
    if [int(row["idx"][1]) for row in rows] != list(range(len(rows))) or len(rows) < 2:
        raise DataError(f"{place}: the rows of its choices are incomplete or out of order")
    # A text that a record offers twice (some of CosmosQA do) is one choice.
    by_text = {row["targets_pretokenized"].decode(): row for row in reversed(rows)}
    rows = [row for row in rows if by_text[row["targets_pretokenized"].decode()] is row]
    if len(rows) < 2:
        raise DataError(f"{place}: all its choices are the same text")
    texts = tuple(row["targets_pretokenized"].decode() for row in rows)
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
        inputs_text=rows[0]["inputs_pretokenized"].decode(),
        choices_text=texts,
        truncated=truncated,
    )


def generation_examples(
    task: str,
    split: str,
    *,
    lengths: Mapping[str, int],
    max_examples: int | None = None,
    skip: int = 0,
) -> list[GenerationExample]:
    """Reads the examples of a task that is answered in free text.

    Args:
        task: The task's name.
        split: The split to read.
        lengths: {"inputs": S, "targets": T}, in tokens: what is longer is cut and flagged.
        max_examples: Only so many examples, drawn from all over the split.
        skip: With max_examples, so many that would be drawn first are left out.

    Raises:
        UnknownNameError: no such task.
        DataError: it has answer choices; or an example has no inputs, or none has an answer. Those
            without an answer are left out, with a warning that says how many.
    """
    provider = find("task", task, split)
    dataset = _in_order(provider, split, max_examples, skip)
    if "references" not in dataset.element_spec:
        raise DataError(f"task {task!r} is not answered in free text: nothing to compare with")
    examples, blank = [], 0
    for number, row in enumerate(_rows(dataset, task)):
        place = f"task {task!r}, example {number}"
        # To say nothing would match a blank reference exactly.
        texts = (text.decode() for text in row["references"])
        reference = tuple(text for text in texts if text.strip())
        if not reference or len(row["targets"]) < 2:
            blank += 1
            continue
        inputs, target = _cut_inputs(row, lengths, place), _cut_targets(row, lengths)
        examples.append(
            GenerationExample(
                inputs=inputs,
                target=target,
                reference=reference,
                inputs_text=row["inputs_pretokenized"].decode(),
                reference_text=row["targets_pretokenized"].decode(),
                truncated=len(inputs) < len(row["inputs"]) or len(target) < len(row["targets"]),
            )
        )
    if blank and not examples:
        raise DataError(f"task {task!r}, split {split!r}: no example has an answer to compare with")
    if blank:
        warnings.warn(
            f"task {task!r}, split {split!r}: {blank} examples without an answer to compare with "
            "are left out",
            stacklevel=2,
        )
    return examples
