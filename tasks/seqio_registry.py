"""The declared tasks and mixtures as seqio's, under T0's names and conventions."""

import functools
from collections.abc import Callable, Mapping, Sequence

import seqio
import t5.data.postprocessors

from m2l.data.prompts import parse
from m2l.data.raw_records import Record
from m2l.data.record_table import RecordTable
from m2l.data.seqio_preprocessors import append_eos, rank_rows, span_corruption, tokenize
from m2l.data.seqio_source import RecordSource
from m2l.data.seqio_vocabularies import as_seqio
from m2l.data.text_tasks import SCORE_EVAL, Rate, TextTask
from m2l.data.vocabularies import Vocabulary
from m2l.errors import DataError
from m2l.evaluation import metrics, seqio_metrics
from m2l.tasks import sources
from m2l.typing import Json

_ours: set[str] = set()
_corpus: TextTask | None = None


def register(
    text_tasks: Sequence[TextTask], corpus: TextTask, mixtures: Mapping[str, Mapping[str, Rate]]
) -> None:
    """Registers all tasks and mixtures, in place of those registered here before.

    Those of the same call of `m2l.tasks.registry.declare`, told by its corpus, are left as they
    are.

    Args:
        text_tasks: The tasks that have prompts.
        corpus: The task of unlabelled text as it is.
        mixtures: Of each mixture, its tasks and how often each is drawn.

    Raises:
        DataError: someone else registered one of the names.
    """
    global _corpus
    if corpus is _corpus:
        return
    tasks = [_span_corruption(corpus.records, corpus.targets), *_seqio_tasks(corpus)]
    tasks += [task for text_task in text_tasks for task in _seqio_tasks(text_task)]
    names = {*(task.name for task in tasks), *mixtures}
    known = seqio.TaskRegistry.names() | seqio.MixtureRegistry.names()
    if foreign := sorted((names & known) - _ours):
        raise DataError(f"seqio's registry has a task or mixture {foreign[0]!r} that is not m2l's")
    for name in _ours:
        seqio.TaskRegistry.remove(name)
        seqio.MixtureRegistry.remove(name)
    _ours.clear()
    for task in tasks:
        seqio.TaskRegistry.add_provider(task.name, task)
    for name, rates in mixtures.items():
        members = [(task, lambda task, rate=rate: rate()) for task, rate in rates.items()]
        seqio.MixtureRegistry.add(name, members)
    _ours.update(names)
    _corpus = corpus


def _features(task: TextTask) -> dict[str, seqio.Feature]:
    return {
        "inputs": seqio.Feature(vocabulary=as_seqio(task.inputs), add_eos=False),
        "targets": seqio.Feature(vocabulary=as_seqio(task.targets), add_eos=True),
    }


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


def _seqio_tasks(task: TextTask) -> list[seqio.Task]:
    """Returns seqio's task and, where it has answer choices, its `_score_eval` twin."""
    name, prompt, to_tokens = task.name, task.prompt, [tokenize, append_eos]
    kinds = {"inputs": "string", "targets": "string"}
    if prompt is not None:
        kinds |= {"references" if task.free else "answer_choices": "strings"}
    make = functools.partial(
        seqio.Task,
        source=RecordSource(name, task.records, task.render, kinds),
        output_features=_features(task),
        shuffle_buffer_size=None,
    )
    if prompt is None:
        return [make(name, preprocessors=to_tokens)]
    if task.free:
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


def _span_corruption(records: RecordTable, vocabulary: Vocabulary) -> seqio.Task:
    """Returns the task that encoder-decoders are pretrained by, from unlabelled text."""
    feature = functools.partial(seqio.Feature, vocabulary=as_seqio(vocabulary))

    def text(record: Record) -> Record:
        return {"targets": record["text"]}

    return seqio.Task(
        sources.SPAN_CORRUPTION,
        source=RecordSource(sources.SPAN_CORRUPTION, records, text, {"targets": "string"}),
        preprocessors=[
            functools.partial(tokenize, copy_pretokenized=False),
            *(span_corruption, append_eos),
        ],
        output_features={"inputs": feature(add_eos=False), "targets": feature(add_eos=True)},
        shuffle_buffer_size=None,
    )
