"""From tasks that only seqio can read to training batches and to rows to evaluate by."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import seqio
import tensorflow as tf

from m2l.data import text_tasks
from m2l.data.layouts import Batch, Layout
from m2l.data.seqio_preprocessors import append_eos, tokenize
from m2l.data.seqio_source import RecordSource
from m2l.data.text_tasks import Rate, TextTask
from m2l.errors import DataError
from m2l.typing import Json

_BATCHES_AHEAD = 2
_ROWS_AT_ONCE = 512
Row: TypeAlias = dict[str, Any]  # arrays, and texts


def find(kind: str, name: str, split: str) -> seqio.Task | seqio.Mixture:
    """Returns what is registered under a name, once it is sure that it has the split.

    `a+b` is the mixture of the tasks of both, at the rates that they have there.

    Raises:
        UnknownNameError: nothing is; the message calls it `kind`.
        DataError: it has no such split.
    """
    text_tasks.fill_seqio()
    known = seqio.TaskRegistry.names() | seqio.MixtureRegistry.names()
    parts = []
    for part in dict.fromkeys(name.split("+")):
        if part not in known:
            text_tasks.refuse(kind, part, known)
        parts.append(seqio.get_mixture_or_task(part))
    provider = parts[0] if len(parts) == 1 else _together(name, parts)
    if split not in provider.splits:
        raise DataError(
            f"{name!r} has no split {split!r}; it has {', '.join(sorted(provider.splits))}"
        )
    return provider


def _together(name: str, parts: Sequence[seqio.Task | seqio.Mixture]) -> seqio.Mixture:
    rates: dict[str, Callable[[seqio.Task], float]] = {}
    for part in parts:
        for task in seqio.get_subtasks(part):
            alone = isinstance(part, seqio.Task)
            rates[task.name] = seqio.mixing_rate_num_examples if alone else part.get_rate
    return seqio.Mixture(name.replace("+", "."), list(rates.items()))


def vocabulary_of(mixture: str, split: str) -> seqio.Vocabulary:
    """Returns the vocabulary of a task's or mixture's inputs."""
    task = seqio.get_subtasks(find("task or mixture", mixture, split))[0]
    return task.output_features["inputs"].vocabulary


def sizes(mixture: str, split: str) -> dict[str, int]:
    """Returns how many records each task of a mixture has in a split."""
    tasks = _having(find("task or mixture", mixture, split), split)
    return {task.name: task.num_input_examples(split) for task in tasks}


def text_tasks_of(mixture: str, split: str) -> dict[TextTask, Rate] | None:
    """Returns the tasks of a mixture of seqio's that m2l can read by itself, and their rates.

    Returns:
        None where seqio has to read them: a task is not m2l's, or makes something else of its
        texts.

    Raises:
        UnknownNameError, DataError: as `find`.
    """
    provider = find("task or mixture", mixture, split)
    rates: dict[TextTask, Rate] = {}
    for task in _having(provider, split):
        text_task = text_tasks.find_task(task.name)
        as_text = list(task.preprocessors) == [tokenize, append_eos]
        if text_task is None or not as_text or not isinstance(task.source, RecordSource):
            return None
        rates[text_task] = lambda task=task: provider.get_rate(task)
    return rates


def _having(provider: seqio.Task | seqio.Mixture, split: str) -> list[seqio.Task]:
    return [task for task in seqio.get_subtasks(provider) if split in task.splits]


def as_written() -> tf.data.Options:
    """Runs a dataset as it is: rewriting and tuning it costs more at each start than it saves."""
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    return options


# ---- Training batches


class TfDataIterator(Iterator[Batch]):
    """Batches of a dataset that keeps its position itself, as its sources' cursors."""

    cut = None

    def __init__(self, name: str, dataset: tf.data.Dataset):
        options = as_written()
        options.experimental_symbolic_checkpoint = True
        self._name, self._iterator = name, iter(dataset.with_options(options))

    def __next__(self) -> Batch:
        try:
            return {name: value.numpy() for name, value in next(self._iterator).items()}
        except tf.errors.InvalidArgumentError as error:
            raise DataError(text_tasks.unusable(self._name, error)) from error

    def position(self) -> bytes:
        """Returns the position after the last batch, as TensorFlow writes it."""
        saved = tf.raw_ops.SerializeIterator(resource_handle=self._iterator._iterator_resource)
        return tf.io.serialize_tensor(saved).numpy()

    def move(self, position: bytes) -> None:
        """Moves to a position; raises ValueError where it is damaged."""
        try:
            tf.raw_ops.DeserializeIterator(
                resource_handle=self._iterator._iterator_resource,
                serialized=tf.io.parse_tensor(position, tf.variant),
            )
        except tf.errors.OpError as error:
            raise ValueError(str(error)) from error


def stream(
    mixture: str,
    lengths: Mapping[str, int],
    batch_size: int,
    pack: bool,
    split: str,
    seed: int,
    shard: tuple[int, int],
    layout: Layout,
) -> tuple[TfDataIterator, dict[str, Json]]:
    """Returns batches as seqio makes them, and what else decides them, as JSON values.

    Args:
        mixture: The task's or mixture's name.
        lengths, batch_size, pack, split, seed, shard, layout: As `pipeline.training_batches` takes
            them.

    Raises:
        UnknownNameError, DataError: as `find`.
    """
    provider = find("task or mixture", mixture, split)
    examples = provider.get_dataset(
        dict(lengths),
        split=split,
        shuffle=True,
        seed=seed,
        shard_info=seqio.ShardInfo(index=shard[0], num_shards=shard[1]),
        num_epochs=None,
        # A cache would repeat the first epoch's order, and be part of every saved position.
        try_in_mem_cache=False,
    )
    if examples.element_spec.keys() != lengths.keys():
        examples = examples.map(_only(lengths))
    rows = seqio.EncDecFeatureConverter(pack=pack, bos_id=layout.start_id)(examples, dict(lengths))
    batches = rows.batch(batch_size, drop_remainder=True).prefetch(_BATCHES_AHEAD)
    records = {task.name: _identity(task, split) for task in _having(provider, split)}
    return TfDataIterator(mixture, batches), {"records": records, "tensorflow": tf.__version__}


def _only(names: Collection[str]) -> Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]:
    return tf.autograph.experimental.do_not_convert(lambda row: {name: row[name] for name in names})


def _identity(task: seqio.Task, split: str) -> list[int | None]:
    digest = task.source.digest(split) if isinstance(task.source, RecordSource) else None
    return [task.num_input_examples(split), digest]


# ---- Rows to evaluate by, and examples to look at


def examples(
    name: str, count: int, split: str, lengths: Mapping[str, int]
) -> Iterator[tuple[np.ndarray, np.ndarray, seqio.Vocabulary]]:
    """Yields the tokens of a task's first inputs and targets, and what decodes them."""
    task = find("task", name, split)
    dataset = task.get_dataset(lengths, split=split, shuffle=False, seed=0, try_in_mem_cache=False)
    vocabulary = task.output_features["targets"].vocabulary
    for row in dataset.take(count).as_numpy_iterator():
        yield row["inputs"], row["targets"], vocabulary


def rows(
    kind: str, name: str, split: str, max_examples: int | None, skip: int
) -> tuple[set[str], Iterator[Row]]:
    """Returns the names in a row of a task of seqio's, and its rows, in their order.

    Args:
        kind: What a message calls the task that there is not.
        name: The task's name.
        split: The split to read.
        max_examples: Only the rows of so many records.
        skip: With max_examples, how many records are left out before them.

    Raises:
        UnknownNameError, DataError: as `find`.
    """
    task = find(kind, name, split)
    if max_examples is None:
        dataset = task.get_dataset(None, split=split, shuffle=False, try_in_mem_cache=False)
    else:
        records = task.source.get_dataset(split, shuffle=False).skip(skip).take(max_examples)
        dataset = task.preprocess_postcache(task.preprocess_precache(records), sequence_length=None)
    return set(dataset.element_spec), _numpy_rows(dataset, name)


def _numpy_rows(dataset: tf.data.Dataset, task: str) -> Iterator[Row]:
    try:
        for batch in dataset.ragged_batch(_ROWS_AT_ONCE).with_options(as_written()):
            columns = {name: _by_row(value) for name, value in batch.items()}
            for row in zip(*columns.values(), strict=True):
                yield {name: _as_text(v) for name, v in zip(columns, row, strict=True)}
    except tf.errors.InvalidArgumentError as error:
        raise DataError(text_tasks.unusable(task, error)) from error


def _by_row(values: tf.Tensor | tf.RaggedTensor) -> Iterable[np.ndarray | bytes]:
    if isinstance(values, tf.RaggedTensor):
        return np.split(values.values.numpy(), values.row_splits.numpy()[1:-1])
    return values.numpy()


def _as_text(value: np.ndarray | bytes) -> np.ndarray | str | list[str]:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [text.decode() for text in value]
    return value
