"""The declarations as tasks and mixtures, under T0's names and conventions."""

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from m2l.data import text_tasks, vocabularies
from m2l.data.prompts import Dataset
from m2l.data.record_table import RecordTable
from m2l.data.text_tasks import SCORE_EVAL, Declared, Rate, TextTask
from m2l.errors import DataError
from m2l.files import split_name
from m2l.tasks import flan, sources

# T0 (Sanh et al., 2022, section 4): a dataset counts once per prompt, and at most this often.
T0_MAX_EXAMPLES = 500_000


def declare(
    vocabulary: str, source: str, declared: Iterable[Dataset], mixtures: Mapping[str, Sequence[str]]
) -> Declared:
    """Declares all tasks and mixtures, in place of those declared before.

    Args:
        vocabulary: What `vocabularies.load` takes.
        source: Where the records of the declared datasets come from (see `m2l.tasks.sources`).
        declared: All datasets.
        mixtures: Mixture name -> task names.

    Returns:
        What was declared before.

    Raises:
        DataError: no such vocabulary, or one that targets cannot go on in.
    """
    inputs = vocabularies.load(vocabulary)
    targets = vocabularies.continuing(inputs)
    # The text continues nothing, and is not a message of a chat.
    bare = vocabularies.load(split_name(vocabulary)[1])
    declared = tuple(declared)
    corpus_records = records_of(source, sources.CORPUS)
    corpus = TextTask(sources.LANGUAGE_MODELING, corpus_records, None, None, bare, bare)
    tasks: list[TextTask] = []
    rates: dict[str, Rate] = {}
    prompts = Counter(sources.asked(dataset) for dataset in declared for _ in dataset.prompts)
    for dataset in declared:
        records = records_of(source, dataset)
        rate = functools.partial(_rate, dataset, records, prompts[sources.asked(dataset)])
        for prompt in dataset.prompts:
            name = dataset.task_name(prompt)
            tasks.append(TextTask(name, records, dataset, prompt, inputs, targets))
            rates[name] = rate
    twins = [task.name + SCORE_EVAL for task in tasks if task.with_choices]
    counted = Counter([*(task.name for task in tasks), *twins, *sources.PRETRAINING, *mixtures])
    if twice := [name for name, count in counted.items() if count > 1]:
        raise DataError(
            f"two tasks or mixtures are called {twice[0]!r}: your own JSON lines and one of source "
            f"{source!r}; give yours another name"
        )
    # What another source had may have changed when it is asked again; the microworld never does.
    for key in list(_records):
        replaced = key[1].records is not None and key[1] not in declared
        if replaced or key[0] not in (source, "microworld"):
            del _records[key]
    by_mixture = {
        name: {member: rates[member] for member in members} for name, members in mixtures.items()
    }

    def to_seqio() -> None:
        from m2l.tasks import seqio_registry

        seqio_registry.register(tasks, corpus, by_mixture)

    by_name = {task.name: task for task in (corpus, *tasks)}
    return text_tasks.declare(Declared(by_name, by_mixture, (sources.SPAN_CORRUPTION,), to_seqio))


def _rate(dataset: Dataset, records: RecordTable, prompts: int) -> float:
    """Returns a task's share of a mixture, counted when the mixture is first read."""

    def size() -> int:
        return records.split("train").size

    if dataset.category == flan.MIXTURE:
        return flan.rate(dataset, size)
    return float(T0_MAX_EXAMPLES // prompts if size() > T0_MAX_EXAMPLES else size())


_records: dict[tuple[str, Dataset], RecordTable] = {}


def records_of(source: str, dataset: Dataset) -> RecordTable:
    """Returns a dataset's records: read once, whichever prompts and vocabularies they meet."""
    if (source, dataset) not in _records:
        read = functools.partial(sources.read, source, dataset)
        splits = sources.splits(source, dataset)
        # One's own functions say nothing of what they read: their records do.
        origin = functools.partial(sources.origin, source) if dataset.records is None else None
        table = RecordTable(dataset.name, dataset.fields, splits, read, origin)
        _records[source, dataset] = table
    return _records[source, dataset]
