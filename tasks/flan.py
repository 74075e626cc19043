"""The instruction mixture without any of the study's tasks, one dataset per task family."""

import functools
import importlib

from m2l.data.prompts import Dataset, written_out

MIXTURE = "flan_without_t0"
# Chung et al. (2022) cap what a task may contribute to the mixture at 30,000 examples.
MAX_EXAMPLES = 30_000
_PREFIX = "flan_"


@functools.cache
def datasets(source: str) -> tuple[Dataset, ...]:
    """The families of a source's instructions, read off its validation split.

    Args:
        source: A module of m2l.tasks with `instructions(split)`.
    """
    instructions = importlib.import_module(f"m2l.tasks.{source}").instructions("validation")
    choices = {record["task"]: record["answer_choices"] is not None for record in instructions}
    return tuple(
        written_out(_PREFIX + name, category=MIXTURE, choices=choices[name])
        for name in sorted(choices)
    )


def family(dataset: Dataset) -> str:
    """The family whose instructions one of the datasets holds."""
    return dataset.name.removeprefix(_PREFIX)
