"""The declarations as seqio Tasks and Mixtures, under T0's names and conventions."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import seqio
import t5.data.postprocessors

from m2l.data import vocabularies
from m2l.data.pipeline import SCORE_EVAL
from m2l.data.preprocessors import append_eos, rank_rows, renderer, span_corruption, tokenize
from m2l.data.prompts import Dataset, Prompt, parse
from m2l.data.raw_records import Tensors
from m2l.data.record_source import RecordSource, RecordTensors
from m2l.errors import DataError
from m2l.evaluation import metrics, seqio_metrics
from m2l.files import split_name
from m2l.tasks import flan, sources
from m2l.typing import Json

# T0 (Sanh et al., 2022, section 4): a dataset counts once per prompt, and at most this often.
T0_MAX_EXAMPLES = 500_000

_ours: set[str] = set()


def register(
    vocabulary: str, source: str, declared: Iterable[Dataset], mixtures: Mapping[str, Sequence[str]]
) -> None:
    """Registers all tasks and mixtures, in place of those registered here before.

    Args:
        vocabulary: What `vocabularies.load` takes.
        source: Where the records of the declared datasets come from (see `m2l.tasks.sources`).
        declared: All datasets.
        mixtures: Mixture name -> task names.

    Raises:
        DataError: no such vocabulary, or one that targets cannot go on in; or someone else
            registered one of the names.
    """
    shared = vocabularies.load(vocabulary)
    features = {
        "inputs": seqio.Feature(vocabulary=shared, add_eos=False),
        "targets": seqio.Feature(vocabulary=vocabularies.continuing(shared), add_eos=True),
    }
    tasks = corpus_tasks(records_of(source, sources.CORPUS), vocabulary)
    rates: dict[str, Callable[[seqio.Task], float]] = {}
    declared = tuple(declared)
    prompts = Counter(sources.asked(dataset) for dataset in declared for _ in dataset.prompts)
    for dataset in declared:
        records = records_of(source, dataset)
        for prompt in dataset.prompts:
            tasks += prompted_tasks(dataset, prompt, records, features)
            rates[dataset.task_name(prompt)] = _rate(dataset, prompts[sources.asked(dataset)])
    counted = Counter([*(task.name for task in tasks), *mixtures])
    if twice := [name for name, count in counted.items() if count > 1]:
        raise DataError(
            f"two tasks or mixtures are called {twice[0]!r}: your own JSON lines and one of source "
            f"{source!r}; give yours another name"
        )
    names = set(counted)
    known = seqio.TaskRegistry.names() | seqio.MixtureRegistry.names()
    if foreign := sorted((names & known) - _ours):
        raise DataError(f"seqio's registry has a task or mixture {foreign[0]!r} that is not m2l's")
    # What another source had may have changed when it is asked again; the microworld never does.
    for key in list(_records):
        replaced = key[1].records is not None and key[1] not in declared
        if replaced or key[0] not in (source, "microworld"):
            del _records[key]
    for name in _ours:
        seqio.TaskRegistry.remove(name)
        seqio.MixtureRegistry.remove(name)
    _ours.clear()
    for task in tasks:
        seqio.TaskRegistry.add_provider(task.name, task)
    for name, members in mixtures.items():
        seqio.MixtureRegistry.add(name, [(member, rates[member]) for member in members])
    _ours.update(names)


def _rate(dataset: Dataset, prompts: int) -> Callable[[seqio.Task], float]:
    """Returns a task's share of a mixture, counted when the mixture is first read."""

    def rate(task: seqio.Task) -> float:
        if dataset.category == flan.MIXTURE:
            return flan.rate(dataset, lambda: task.num_input_examples("train"))
        size = task.num_input_examples("train")
        return float(T0_MAX_EXAMPLES // prompts if size > T0_MAX_EXAMPLES else size)

    return rate


_records: dict[tuple[str, Dataset], RecordTensors] = {}


def records_of(source: str, dataset: Dataset) -> RecordTensors:
    """Returns a dataset's records: read once, whichever prompts and vocabularies they meet."""
    if (source, dataset) not in _records:
        read = functools.partial(sources.read, source, dataset)
        splits = sources.splits(source, dataset)
        _records[source, dataset] = RecordTensors(dataset.name, dataset.fields, splits, read)
    return _records[source, dataset]


def _metric(name: str) -> Callable[..., dict[str, float]]:
    def compute(targets: Sequence[Json], predictions: Sequence[str]) -> dict[str, float]:
        # seqio tells by these two names what a metric is of.
        return metrics.metric(name)(targets, predictions)

    return compute


def _text(output: str, is_target: bool = False, **unused: object) -> str:
    return output if is_target else output.strip()


def _references(
    output: str, example: Mapping[str, Json] | None = None, is_target: bool = False
) -> str | list[str]:
    if not is_target:
        return output.strip()
    return [text.decode() for text in example["references"]]


def prompted_tasks(
    dataset: Dataset, prompt: Prompt, records: RecordTensors, features: Mapping[str, seqio.Feature]
) -> list[seqio.Task]:
    """Returns the task of one prompt and, where it has answer choices, its `_score_eval` twin."""
    name = dataset.task_name(prompt)
    to_tokens = [tokenize, append_eos]
    make = functools.partial(
        seqio.Task,
        source=RecordSource(name, records, renderer(dataset, prompt)),
        output_features=features,
        shuffle_buffer_size=None,
    )
    if prompt.answer_choices is None:
        return [
            make(
                name,
                preprocessors=to_tokens,
                postprocess_fn=_references,
                metric_fns=[_metric(metric) for metric in prompt.metrics],
            )
        ]
    classes = None
    if prompt.fixed_choices:
        classes = ["".join(map(str, parse(choice))) for choice in prompt.answer_choices]
    answers = seqio_metrics.answers(name, classes=classes, metrics=prompt.metrics)
    ranked = seqio_metrics.rank_classification(
        name, num_choices=prompt.num_choices, metrics=prompt.metrics
    )
    return [
        make(name, preprocessors=to_tokens, postprocess_fn=_text, metric_fns=[answers]),
        make(
            name + SCORE_EVAL,
            preprocessors=[rank_rows, *to_tokens],
            postprocess_fn=t5.data.postprocessors.rank_classification,
            metric_fns=[ranked],
        ),
    ]


def corpus_tasks(records: RecordTensors, vocabulary: str) -> list[seqio.Task]:
    """Returns the tasks that base models are pretrained by, from unlabelled text.

    Span corruption for encoder-decoders; for decoders the text itself, as targets of no inputs.
    """
    # The text continues nothing, and is not a message of a chat.
    bare = vocabularies.load(split_name(vocabulary)[1])
    features = {
        "inputs": seqio.Feature(vocabulary=bare, add_eos=False),
        "targets": seqio.Feature(vocabulary=bare, add_eos=True),
    }
    corruption = [functools.partial(tokenize, copy_pretokenized=False), span_corruption, append_eos]
    make = functools.partial(seqio.Task, output_features=features, shuffle_buffer_size=None)

    def text(record: Tensors) -> Tensors:
        return {"targets": record["text"]}

    def text_without_inputs(record: Tensors) -> Tensors:
        return {"inputs": "", "targets": record["text"]}

    return [
        make(
            sources.SPAN_CORRUPTION,
            source=RecordSource(sources.SPAN_CORRUPTION, records, text),
            preprocessors=corruption,
        ),
        make(
            sources.LANGUAGE_MODELING,
            source=RecordSource(sources.LANGUAGE_MODELING, records, text_without_inputs),
            preprocessors=[tokenize, append_eos],
        ),
    ]
