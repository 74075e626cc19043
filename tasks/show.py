"""A task's examples as text for people."""

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from m2l.data.examples import generation_examples, ranking_examples
from m2l.data.prompts import TaskInfo
from m2l.data.vocabularies import Vocabulary


def _heading(number: int, inputs: int, cut: bool) -> str:
    return f"--- example {number}: {inputs} input tokens" + (", cut" if cut else "")


def _ranked(info: TaskInfo, n: int, split: str, lengths: Mapping[str, int]) -> Iterator[str]:
    examples = ranking_examples(info.name, split, lengths=lengths, max_examples=n)
    for number, example in enumerate(examples):
        yield _heading(number, len(example.inputs), example.truncated)
        yield example.inputs_text
        for text, right in zip(example.choices_text, example.is_correct, strict=True):
            yield f"  {'*' if right else '-'} {text}"


def _generated(info: TaskInfo, n: int, split: str, lengths: Mapping[str, int]) -> Iterator[str]:
    examples = generation_examples(info.name, split, lengths=lengths, max_examples=n)
    for number, example in enumerate(examples):
        yield _heading(number, len(example.inputs), example.truncated)
        yield example.inputs_text
        alternatives = [text for text in example.reference if text != example.reference_text]
        yield from (f"  = {text}" for text in [example.reference_text, *alternatives])


def _trained(info: TaskInfo, n: int, split: str, lengths: Mapping[str, int]) -> Iterator[str]:
    from m2l.data import seqio_pipeline

    for number, (inputs, targets, vocabulary) in enumerate(
        seqio_pipeline.examples(info.name, n, split, lengths)
    ):
        yield _heading(number, len(inputs), False)
        yield _with_sentinels(inputs, vocabulary)
        yield f"  = {_with_sentinels(targets, vocabulary)}"


def _with_sentinels(tokens: np.ndarray, vocabulary: Vocabulary) -> str:
    """Decodes tokens, with `<0>`, `<1>`, ... where a span was taken out."""
    last = vocabulary.vocab_size - 1
    runs = itertools.groupby(tokens.tolist(), key=lambda token: last - token < vocabulary.extra_ids)
    return " ".join(
        " ".join(f"<{last - token}>" for token in run) if sentinel else vocabulary.decode(list(run))
        for sentinel, run in runs
    )


def render(info: TaskInfo, n: int, split: str, lengths: Mapping[str, int]) -> str:
    """Renders a line about the task, then its examples as a model gets them.

    Args:
        info: The task.
        n: How many examples.
        split: Of which split.
        lengths: {"inputs": S, "targets": T}, in tokens: what is longer is marked as cut.

    Returns:
        Lines of text; the right answer is marked `*` (or `=`, in free text).
    """
    group = "held-out" if info.held_out else "held-in"
    about = [info.category, group, info.kind, *info.metrics]
    examples = {"rank": _ranked, "generate": _generated, "train": _trained}[info.kind]
    return "\n".join([f"{info.name}: {', '.join(about)}", *examples(info, n, split, lengths)])
