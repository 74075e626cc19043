"""The instruction mixture without any of the study's tasks: the embedded data's, or FLAN v2's.

The embedded data has a dataset per task family. The other sources have one for each of the FLAN
Collection's submixes but T0's own (Longpre et al., 2023), as DataProvenanceInitiative publishes
them. flan_removed.csv lists the tasks in them that T0 was trained or evaluated on, with the reason.
"""

import csv
import dataclasses
import functools
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from m2l.data.prompts import Dataset, written_out
from m2l.data.raw_records import Hub, Record, held_back
from m2l.errors import DataError, UnknownNameError

MIXTURE = "flan_without_t0"
# Chung et al. (2022) cap what a task may contribute to the mixture at 30,000 examples.
MAX_EXAMPLES = 30_000
# The columns of a submix's records that `kept` reads.
FIELDS = ("inputs", "targets", "task_name", "template_type")
_PREFIX = "flan_"


class Submix(NamedTuple):
    """Part of the FLAN Collection.

    Attributes:
        rate: Its share of FLAN's mixture; T0's submix, left out here, has the .32 missing from 1.
        max_examples: How many examples one of its tasks may contribute.
        template_types: In how many ways it asks each: without and with examples to follow, with
            and perhaps without a choice of answers. FLAN gives all ways the same weight.
    """

    rate: float
    max_examples: int
    template_types: int


# FLAN's own numbers: flan/v2/run_example.py and flan/v2/mixtures.py.
SUBMIXES = {
    "flan2021": Submix(0.40, 30_000, 4),
    "niv2": Submix(0.20, 5_000, 2),
    "cot": Submix(0.05, 100_000, 2),
    "dialog": Submix(0.03, 200_000, 2),
}


@functools.cache
def datasets(source: str) -> tuple[Dataset, ...]:
    """Returns the mixture's datasets, each of one task.

    Args:
        source: A kind of source. "microworld" has families, read off its validation split; all
            others have FLAN's submixes, whose validation split is held back.
    """
    if source != "microworld":
        return tuple(map(_dataset, SUBMIXES))
    from m2l.tasks import microworld

    instructions = microworld.instructions("validation")
    choices = {record["task"]: record["answer_choices"] is not None for record in instructions}
    return tuple(
        written_out(_PREFIX + name, category=MIXTURE, choices=choices[name])
        for name in sorted(choices)
    )


def _dataset(submix: str) -> Dataset:
    named = written_out(
        _PREFIX + submix,
        category=MIXTURE,
        choices=False,
        hub=Hub(f"DataProvenanceInitiative/{submix}_submix_original"),
        licence="each task's own",
        paper="Longpre et al. (2023)",
    )
    return dataclasses.replace(named, splits=held_back(field="inputs"))


def family(dataset: Dataset) -> str:
    """Returns the family, or submix, whose instructions one of the datasets holds."""
    return dataset.name.removeprefix(_PREFIX)


def rate(dataset: Dataset, size: Callable[[], int]) -> float:
    """Returns a dataset's share of the mixture: a submix's is FLAN's, a family's its capped size.

    Args:
        dataset: One of `datasets`.
        size: Counts the records it has to train on; called only where they matter.
    """
    if dataset.hub is not None:
        return SUBMIXES[family(dataset)].rate
    return float(min(size(), MAX_EXAMPLES))


def unversioned(task_name: str) -> str:
    """Strips the version of its dataset from a task's name: `glue/mrpc` of `glue/mrpc:2.0.0`.

    FLAN's code and the published data differ in versions, which must not let a task through.
    """
    return re.sub(r":\d+(\.\d+)*$", "", task_name)


@functools.cache
def removed(submix: str) -> frozenset[str]:
    """Returns the tasks of a submix that are left out, without versions.

    Raises:
        UnknownNameError: no such submix.
    """
    if submix not in SUBMIXES:
        raise UnknownNameError("submix of FLAN", submix, SUBMIXES)
    table = Path(__file__).with_name("flan_removed.csv")
    with table.open(encoding="utf-8", newline="") as rows:
        return frozenset(
            unversioned(row["task"]) for row in csv.DictReader(rows) if row["submix"] == submix
        )


def kept(submix: str, records: Iterable[Record]) -> Iterator[Record]:
    """Yields what the mixture takes of a submix, in order: `inputs` and `targets`.

    Left out are the removed tasks, whatever their version; of every other task all but the first
    `max_examples`, an equal part of them for each template type; and records without a prompt or an
    answer. When all has been read, a warning says which of the removed tasks never came: their
    names may have changed.

    Args:
        submix: Of SUBMIXES.
        records: Records with FIELDS.

    Raises:
        UnknownNameError: no such submix.
        DataError: a record that lacks one of FIELDS, or has no text there.
    """
    unwanted = removed(submix)
    most = SUBMIXES[submix].max_examples // SUBMIXES[submix].template_types
    left_out: Counter[str] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    for number, record in enumerate(records):
        for field in FIELDS:
            if not isinstance(record.get(field), str):
                raise DataError(
                    f"FLAN's submix {submix}, record {number}: {field} is "
                    f"{record.get(field)!r:.60}, expected a text"
                )
        task = unversioned(record["task_name"])
        way = (task, record["template_type"])
        if task in unwanted:
            left_out[task] += 1
        elif counts[way] < most and record["inputs"].strip() and record["targets"].strip():
            counts[way] += 1
            yield {"inputs": record["inputs"], "targets": record["targets"]}
    if unmatched := sorted(unwanted - left_out.keys()):
        more = f" and {len(unmatched) - 3} more" if len(unmatched) > 3 else ""
        warnings.warn(
            f"FLAN's submix {submix}: {left_out.total()} records of {len(left_out)} tasks were "
            f"left out; {len(unmatched)} of the tasks to leave out never came: "
            f"{', '.join(unmatched[:3])}{more}",
            stacklevel=2,
        )
