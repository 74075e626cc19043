"""Tasks whose records become texts and whose texts become tokens: m2l's own registry.

They are read without seqio and TensorFlow. `m2l.tasks.register` puts the same tasks into seqio's
registry, whose own readers give the same examples.
"""

import functools
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import numpy as np

from m2l.data.prompts import Dataset, Prompt
from m2l.data.raw_records import Record
from m2l.data.record_table import RecordTable
from m2l.data.rendering import Texts, renderer
from m2l.data.vocabularies import Prompted, Vocabulary, few_shot_text
from m2l.errors import DataError, UnknownNameError

SCORE_EVAL = "_score_eval"
"""What the name of a task's twin in seqio's registry ends in, which has a row for each choice."""

Rate = Callable[[], float]


@dataclass(frozen=True, eq=False)
class TextTask:
    """A task: records, what texts they become, and what encodes these.

    Attributes:
        name: Its name, as in seqio's registry.
        records: Its records.
        dataset: The declaration of the records; None of plain text, which is a target of no inputs.
        prompt: What asks about them; None of plain text.
        inputs: The vocabulary of the inputs, which get no EOS.
        targets: That of the targets, which end in EOS.
    """

    name: str
    records: RecordTable
    dataset: Dataset | None
    prompt: Prompt | None
    inputs: Vocabulary
    targets: Vocabulary

    @functools.cached_property
    def render(self) -> Callable[[Record], Texts]:
        """A function of a record that returns its texts (see `rendering.renderer`)."""
        if self.dataset is None or self.prompt is None:
            return lambda record: {"inputs": "", "targets": record["text"]}
        return renderer(self.dataset, self.prompt)

    @property
    def with_choices(self) -> bool:
        """Whether its answers are chosen, and not free."""
        return self.prompt is not None and self.prompt.answer_choices is not None

    @property
    def free(self) -> bool:
        """Whether it is answered in free text."""
        return self.prompt is not None and self.prompt.answer_choices is None

    def texts(self, split: str, number: int) -> Texts:
        """Returns the texts of a record of a split, by its number.

        Raises:
            DataError: no texts can be made of it.
        """
        try:
            return self.render(self.records.split(split).record(number))
        except (DataError, ValueError, LookupError) as error:
            raise DataError(unusable(self.name, error)) from error


def unusable(name: str, error: Exception) -> str:
    """Says that a task or mixture has a record that no example can be made of."""
    first = str(getattr(error, "message", error)).partition("\n")[0]
    return f"{name!r}: a record cannot be made into an example: {first}"


def encode(vocabulary: Vocabulary, texts: Sequence[str], name: str) -> list[np.ndarray]:
    """Returns the ids of texts, int32 each.

    Raises:
        DataError: a text that the vocabulary, or its chat template, cannot encode; of task `name`.
    """
    try:
        return [np.array(ids, np.int32) for ids in vocabulary.encode_all(texts)]
    except (DataError, ValueError) as error:
        raise DataError(unusable(name, error)) from error


def encode_few_shot(
    vocabulary: Vocabulary, prompts: Sequence[Prompted], name: str
) -> list[tuple[np.ndarray, str]]:
    """Returns the ids of inputs behind their shots, int32 each, and these as one text.

    Raises:
        DataError: as `encode`.
    """
    try:
        rows = vocabulary.encode_few_shot(prompts)
    except (DataError, ValueError) as error:
        raise DataError(unusable(name, error)) from error
    return [
        (np.array(ids, np.int32), few_shot_text(*prompt))
        for ids, prompt in zip(rows, prompts, strict=True)
    ]


def truncated(ids: np.ndarray, length: int, eos_id: int | None) -> tuple[np.ndarray, bool]:
    """Returns ids cut to a length, EOS put behind them if there is one, and whether any were cut.

    What is cut off makes room for EOS: a target that was cut short still ends.
    """
    most = length if eos_id is None else length - 1
    end = [] if eos_id is None else [eos_id]
    return np.append(ids[:most], np.array(end, np.int32)), len(ids) > most


# ---- The registry


class Declared(NamedTuple):
    """The tasks and mixtures that there are.

    Attributes:
        tasks: The tasks by name.
        mixtures: Of each mixture, its tasks' names and how often each is drawn, relatively.
        others: The names of tasks that only seqio can read.
        to_seqio: Puts all of them into seqio's registry, unless they are there.
    """

    tasks: Mapping[str, TextTask]
    mixtures: Mapping[str, Mapping[str, Rate]]
    others: Collection[str]
    to_seqio: Callable[[], None]


_declared = Declared({}, {}, (), lambda: None)


def declare(declared: Declared) -> Declared:
    """Makes these the tasks and mixtures that there are; returns those that there were."""
    global _declared
    before, _declared = _declared, declared
    return before


def find_task(name: str) -> TextTask | None:
    """Returns the task of that name; None if only seqio's registry can have it."""
    return _declared.tasks.get(name)


def members(kind: str, name: str, split: str) -> dict[TextTask, Rate] | None:
    """Returns the tasks of a task or mixture that have a split, and their rates.

    `a+b` is the mixture of the tasks of both, at the rates that they have there. The tasks of a
    mixture are in the order of their names, as in seqio.

    Returns:
        None if it, or part of it, is in seqio's registry alone.

    Raises:
        UnknownNameError: there is none; the message calls it `kind`.
        DataError: none of its tasks has the split.
    """
    tasks = _declared.tasks
    rates: dict[str, Rate] = {}
    parts = list(dict.fromkeys(name.split("+")))
    for part in parts:
        if part in tasks:
            rates[part] = functools.partial(_size, tasks[part])
        elif part in _declared.mixtures:
            rates |= _declared.mixtures[part]
        else:
            check_known(kind, part)
            return None
    names = sorted(rates)
    splits = {split for task in names for split in tasks[task].records.splits}
    if split not in splits:
        raise DataError(f"{name!r} has no split {split!r}; it has {', '.join(sorted(splits))}")
    having = [task for task in names if split in tasks[task].records.splits]
    return {tasks[task]: rates[task] for task in having}


def _size(task: TextTask) -> float:
    return float(task.records.split("train").size)


def check_known(kind: str, name: str) -> None:
    """Checks that a name may be in seqio's registry, without importing it for nothing.

    Raises:
        UnknownNameError: it is not; the message calls it `kind`.
    """
    twins = {name + SCORE_EVAL for name, task in _declared.tasks.items() if task.with_choices}
    if name in twins.union(_declared.others):
        return
    # Whoever has tasks of their own in it has imported it.
    seqio = sys.modules.get("seqio")
    more = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()} if seqio else set()
    if name not in more:
        refuse(kind, name, more)


def refuse(kind: str, name: str, more: Collection[str] = ()) -> NoReturn:
    """Raises UnknownNameError for a name that is in neither registry.

    Args:
        kind: What the message calls it.
        name: The name.
        more: The names in seqio's registry.
    """
    raise UnknownNameError(
        kind, name, {*_declared.tasks, *_declared.mixtures, *_declared.others, *more}
    )


def fill_seqio() -> None:
    """Puts what is declared into seqio's registry, unless it is there."""
    _declared.to_seqio()
