"""T0's prompts of your own checkout of promptsource, over the records of another source.

Every template of a declared dataset is a dataset of one task, under T0's name of it.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from m2l.data import promptsource
from m2l.data.prompts import Dataset, written_out
from m2l.data.raw_records import Record
from m2l.errors import DataError
from m2l.tasks import t0_held_in, t0_held_out

Render = Callable[[Iterable[Record]], Iterator[Record]]

# Its target is a choice and one more word: none of the choices is ever right. It is free text here.
_NOT_RANKED = {("imdb", "Negation template for positive and negative")}
_METRICS = {"Squad": ("squad",), "BLEU": ("rouge", "bleu"), "ROUGE": ("rouge", "bleu")}


class _Prompted(NamedTuple):
    dataset: Dataset
    base: Dataset
    template: promptsource.Template


@functools.cache
def _prompted(root: Path) -> dict[str, _Prompted]:
    prompted: dict[str, _Prompted] = {}
    without = []
    for base in (*t0_held_in.DATASETS, *t0_held_out.DATASETS):
        if not base.promptsource:
            continue
        if not promptsource.path(root, base.promptsource).exists():
            without.append(base.promptsource)
            continue
        for template in promptsource.templates(root, base.promptsource):
            if (template.folder, template.name) in _NOT_RANKED:
                template = dataclasses.replace(template, ranked=False)
            name = promptsource.task_name(base, template)
            if name in prompted:
                raise DataError(f"{template} and {prompted[name].template} both make {name}")
            prompted[name] = _Prompted(_dataset(name, base, template), base, template)
    if not prompted:
        raise DataError(f"{root}: it has no templates of the declared datasets")
    if without:
        warnings.warn(
            f"{root} has no templates of {', '.join(dict.fromkeys(without))}: these datasets have "
            "no tasks",
            stacklevel=2,
        )
    return prompted


def _dataset(name: str, base: Dataset, template: promptsource.Template) -> Dataset:
    known = (_METRICS[metric] for metric in template.metrics if metric in _METRICS)
    return written_out(
        name,
        category=base.category,
        choices=template.answer_choices is not None and template.ranked,
        splits=base.splits,
        metrics=next(known, ("squad",)),
        original_task=template.original_task,
        held_out=base.held_out,
        hub=base.hub,
        licence=base.licence,
        paper=base.paper,
        part_of=base.name,
    )


def datasets(root: Path | None = None) -> tuple[Dataset, ...]:
    """Returns the templates of the declared datasets, each a dataset of one task.

    Args:
        root: The checkout; None for the one that M2L_PROMPTSOURCE_DIR names.

    Raises:
        DataError: there is no checkout, or its templates cannot be read.
    """
    return tuple(one.dataset for one in _prompted(root or promptsource.checkout()).values())


def template(dataset: Dataset, root: Path | None = None) -> tuple[Dataset, Render]:
    """Returns what a dataset of `datasets(root)` is made of.

    Returns:
        The declared dataset whose records it prompts; and a function that makes examples of one
        split's records, leaving out those that the template does not ask about.
    """
    _, base, template = _of(dataset, root)

    def render(records: Iterable[Record]) -> Iterator[Record]:
        for number, record in enumerate(records):
            example = template.render(record, number)
            if example is not None:
                yield example

    return base, render


def columns(dataset: Dataset, root: Path | None = None) -> tuple[str, ...]:
    """Returns the columns that the dataset's template names, sorted; some are undeclared."""
    return tuple(sorted(_of(dataset, root).template.columns))


def _of(dataset: Dataset, root: Path | None) -> _Prompted:
    root = root or promptsource.checkout()
    if dataset.name not in _prompted(root):
        raise DataError(f"{root} has no template {dataset.name!r}; register the tasks again")
    return _prompted(root)[dataset.name]
