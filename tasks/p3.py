"""T0's prompted data as it was published (Sanh et al., 2022): bigscience/P3, a config per prompt.

p3_prompts.csv has a row for each config of a declared dataset: its name (T0's of the task), the
dataset, whether it asks what the dataset was made to ask, its answer choices (none, fixed, or
varying with the record) and its metrics.
"""

import csv
import dataclasses
import functools
from pathlib import Path

from m2l.data.prompts import Dataset, written_out
from m2l.data.raw_records import Hub, Part, Record, Splits
from m2l.errors import UnknownNameError
from m2l.tasks import t0_held_in, t0_held_out

REPO = "bigscience/P3"
# T0 renamed the rounds' splits of ANLI, so that P3's names are ours but for this one.
_NAMED_OTHERWISE = {("wiki_bio", "validation"): "val"}
# What T0 wrote where a split has no labels.
_NO_LABEL = "<NO LABEL>"

with Path(__file__).with_name("p3_prompts.csv").open(encoding="utf-8", newline="") as _table:
    _PROMPTS = tuple(csv.DictReader(_table))

DATASETS = frozenset(prompt["dataset"] for prompt in _PROMPTS)  # the names of those P3 has


@functools.cache
def datasets() -> tuple[Dataset, ...]:
    """Returns P3's configs, each a dataset of one task that bears the config's name.

    Every one is `part_of` the declared dataset that it prompts.

    Raises:
        UnknownNameError: the table names a dataset that is not declared.
    """
    declared = {base.name: base for base in (*t0_held_in.DATASETS, *t0_held_out.DATASETS)}
    declared_prompts = []
    for prompt in _PROMPTS:
        if prompt["dataset"] not in declared:
            raise UnknownNameError("dataset in p3_prompts.csv", prompt["dataset"], declared)
        base = declared[prompt["dataset"]]
        declared_prompts.append(_dataset(prompt, base))
    return tuple(declared_prompts)


def _dataset(prompt: dict[str, str], base: Dataset) -> Dataset:
    named = written_out(
        prompt["config"],
        category=base.category,
        choices=prompt["choices"] != "none",
        metrics=tuple(prompt["metrics"].split()),
        original_task=prompt["original_task"] == "1",
        held_out=base.held_out,
        hub=Hub(REPO, prompt["config"]),
        licence=base.licence,
        paper=base.paper,
        part_of=base.name,
        complaint=_complaint,
    )
    return dataclasses.replace(named, splits=_splits(base))


def _complaint(example: Record) -> str:
    if example["targets"] == _NO_LABEL:
        return "it has no label: the split is not one to use"
    return ""


def _splits(base: Dataset) -> Splits:
    """Returns the splits with labels.

    Where part of one is held back the record's number decides: P3 keeps the order of its sources,
    so that a record is on the same side with every prompt, which no field could tell.
    """
    return {
        ours: Part(theirs.split, field="", held_back=theirs.held_back)
        if isinstance(theirs, Part)
        else _NAMED_OTHERWISE.get((base.name, ours), ours)
        for ours, theirs in base.splits.items()
    }


def fields(dataset: Dataset) -> tuple[str, ...]:
    """Returns the columns of P3 that `record` needs for one of `datasets()`."""
    return tuple(
        field if field == "answer_choices" else f"{field}_pretokenized" for field in dataset.fields
    )


def record(raw: Record) -> Record:
    """Returns an example: `inputs`, `targets` and, where P3 has them, `answer_choices`, stripped.

    P3 has a space before every target. A choice that is listed twice is kept once: which of
    two same answers is right cannot be asked.
    """
    example: dict[str, object] = {
        "inputs": raw["inputs_pretokenized"].strip(),
        "targets": raw["targets_pretokenized"].strip(),
    }
    if raw.get("answer_choices") is not None:
        stripped = (choice.strip() for choice in raw["answer_choices"])
        example["answer_choices"] = list(dict.fromkeys(stripped))
    return example
