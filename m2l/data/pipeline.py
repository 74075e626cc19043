"""From a registered seqio task or mixture to training batches, resumable at once and exactly."""

import functools
import json
import os
import weakref
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf
from tensorflow.python.ops import cond_v2

from m2l import files
from m2l.data import layouts
from m2l.data.layouts import Batch, EncoderDecoder, Example, Layout
from m2l.data.preprocessors import append_eos, tokenize
from m2l.data.record_source import RecordSource
from m2l.errors import DataError, UnknownNameError
from m2l.typing import Json

SCORE_EVAL = "_score_eval"

_BATCHES_AHEAD = 2
DRAWS_CHUNK = 4096  # draws that are computed at a time
_CHUNK = 128  # examples that are handed to NumPy at a time
_CHUNKS_AHEAD = 8
_CALLS = min(os.cpu_count() or 1, 16)


def find(kind: str, name: str, split: str) -> seqio.Task | seqio.Mixture:
    """Returns what is registered under a name, once it is sure that it has the split.

    `a+b` is the mixture of the tasks of both, at the rates that they have there.

    Raises:
        UnknownNameError: nothing is; the message calls it `kind`.
        DataError: it has no such split.
    """
    known = seqio.TaskRegistry.names() | seqio.MixtureRegistry.names()
    parts = []
    for part in dict.fromkeys(name.split("+")):
        if part not in known:
            raise UnknownNameError(kind, part, known)
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


def vocabulary_of(mixture: str, split: str = "train") -> seqio.Vocabulary:
    """Returns the vocabulary of a task's or mixture's inputs.

    Raises:
        UnknownNameError, DataError: as `find`.
    """
    task = seqio.get_subtasks(find("task or mixture", mixture, split))[0]
    return task.output_features["inputs"].vocabulary


def as_written() -> tf.data.Options:
    """Runs a dataset as it is: rewriting and tuning it costs more at each start than it saves."""
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    return options


def unusable(name: str, error: tf.errors.OpError) -> str:
    """Says that a task or mixture has a record that no example can be made of."""
    return f"{name!r}: a record cannot be made into an example: {error.message.splitlines()[0]}"


class MixtureSampler:
    """An endless random sequence of tasks, each drawn in proportion to its rate.

    Source: Philox (Salmon et al., 2011) keyed by the seeds, at the number of the draw.

    Args:
        rates: One positive number a task.
        seeds: Two integers: other seeds, another sequence.
    """

    def __init__(self, rates: Sequence[float], seeds: tuple[int, int]):
        self._ends = np.cumsum(np.asarray(rates, np.float64))
        self._ends /= self._ends[-1]
        self._key = np.array([seed % 2**64 for seed in seeds], np.uint64)
        self._counted = 0, np.zeros(len(rates), np.int64)

    def _chunk(self, number: int) -> np.ndarray:
        """Tasks int32 [DRAWS_CHUNK] of the draws from DRAWS_CHUNK * number on."""
        # Philox gives four words at each count.
        bits = np.random.Philox(key=self._key, counter=number * DRAWS_CHUNK // 4).random_raw(
            DRAWS_CHUNK
        )
        shares = (bits >> np.uint64(11)) * 2.0**-53
        return np.searchsorted(self._ends, shares, side="right").astype(np.int32)

    def move(self, position: int, counts: Sequence[int]) -> None:
        """Takes over what `counts(position)` gave, to spare counting again.

        Raises:
            ValueError: these are not the counts of a position.
        """
        if len(counts) != len(self._ends) or sum(counts) != position or min(counts) < 0:
            raise ValueError(f"counts {counts!r:.80} do not add up to {position}")
        self._counted = position, np.asarray(counts, np.int64)

    def counts(self, position: int) -> np.ndarray:
        """Counts how often each task is drawn before a position: int64 [tasks]."""
        start, counts = self._counted
        if position < start:
            start, counts = 0, np.zeros_like(counts)
        counts = counts.copy()
        for number in range(start // DRAWS_CHUNK, -(-position // DRAWS_CHUNK)):
            first = max(start - number * DRAWS_CHUNK, 0)
            drawn = self._chunk(number)[first : position - number * DRAWS_CHUNK]
            counts += np.bincount(drawn, minlength=len(counts))
        self._counted = position, counts
        return counts.copy()

    def pairs(self, position: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the draws from a position on, in chunks, endlessly.

        Yields:
            Tasks int32 [n], and how often each had been drawn before, int64 [n].
        """
        counts = self.counts(position)
        while True:
            number, first = divmod(position, DRAWS_CHUNK)
            tasks = self._chunk(number)[first:]
            order = np.argsort(tasks, kind="stable")
            drawn = np.bincount(tasks, minlength=len(counts))
            ranks = np.arange(len(tasks)) - np.repeat(np.cumsum(drawn) - drawn, drawn)
            before = np.empty(len(tasks), np.int64)
            before[order] = counts[tasks[order]] + ranks
            counts += drawn
            position += len(tasks)
            yield tasks, before


class Batches(Iterator[Batch]):
    """Endless training batches, and the position after the last one returned.

    Iterating raises DataError where a record cannot be made into an example.

    Args:
        stream: Where the batches come from.
        made_from: What decides them, as JSON values.
    """

    def __init__(self, stream: "_SampledExamples | TfDataIterator", made_from: Mapping[str, Json]):
        self._stream, self._made_from = stream, dict(made_from)

    def __next__(self) -> Batch:
        """Returns the next batch: int32 arrays [batch_size, length] by feature name."""
        try:
            return next(self._stream)
        except tf.errors.InvalidArgumentError as error:
            raise DataError(unusable(self._made_from["mixture"], error)) from error

    @property
    def cut(self) -> dict[str, int] | None:
        """The number of examples in the batches returned, and of those that were cut.

        {"examples", "inputs_cut", "targets_cut"}, counted from the beginning of the data, also
        after `restore`; None of a pipeline of seqio's own, which cuts without a count, and after
        a position that was saved without one.
        """
        return self._stream.cut

    def state(self) -> bytes:
        """Returns the position, at most a few kilobytes; batches read ahead are not part of it."""
        header = json.dumps(self._made_from, sort_keys=True).encode()
        return header + b"\n" + self._stream.position()

    def restore(self, state: bytes) -> None:
        """Moves to a position that `state` gave, in time that does not depend on the position.

        Raises:
            DataError: it was saved from other data, or with other settings; names the first.
        """
        header, _, position = state.partition(b"\n")
        source = "the saved position in the data"
        was = files.parse_json(header, source, kind=dict, advice="start without it")
        for name, value in self._made_from.items():
            if was.get(name) != value:
                raise DataError(
                    f"the saved position in the data belongs to {name} {was.get(name)!r:.200}, "
                    f"this run has {value!r:.200}; continue with the same setting, or start "
                    "without the position"
                )
        try:
            self._stream.move(position)
        except (ValueError, KeyError, TypeError, tf.errors.OpError) as error:
            first = str(error).splitlines()[0]
            raise DataError(f"the saved position in the data is damaged: {first}") from error


class _SampledExamples(Iterator[Batch]):
    """Batches of tasks whose records become one example each.

    What is drawn are (task, count) pairs, count being how often the task was drawn before: they
    follow from the seed and the number of the draw, so a position is that number, and one function
    makes the example of a pair, whatever the number of tasks. Rows are packed in order, so the
    examples in the batches handed out are the draws behind them.
    """

    def __init__(
        self,
        sampler: MixtureSampler,
        example: Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]],
        batched: Callable[[Iterator[Example]], Iterator[tuple[Batch, int]]],
    ):
        self._sampler, self._example, self._batched = sampler, example, batched
        self._done = 0
        # Of the examples done, how many had their inputs and their targets cut.
        self._cut: np.ndarray | None = np.zeros(2, np.int64)
        # Whether each further example that was made had its inputs and its targets cut.
        self._ahead: deque[np.ndarray] = deque()
        self._batches: Iterator[tuple[Batch, int]] | None = None
        self._running: list[Generator[Example, None, None]] = []
        # TensorFlow must let go of a generator of Python's while there still is a Python.
        weakref.finalize(self, _close, self._running)

    def __next__(self) -> Batch:
        if self._batches is None:
            _close(self._running)
            self._ahead.clear()
            self._running.append(self._examples())
            self._batches = self._batched(self._running[0])
        batch, examples = next(self._batches)
        self._done += examples
        cut = [self._ahead.popleft() for _ in range(examples)]
        if self._cut is not None:
            self._cut += np.sum(cut, axis=0)
        return batch

    @property
    def cut(self) -> dict[str, int] | None:
        if self._cut is None:
            return None
        inputs, targets = self._cut.tolist()
        return {"examples": self._done, "inputs_cut": inputs, "targets_cut": targets}

    def _examples(self) -> Generator[Example, None, None]:
        pairs = tf.data.Dataset.from_generator(
            functools.partial(self._sampler.pairs, self._done),
            output_signature=(tf.TensorSpec([None], tf.int32), tf.TensorSpec([None], tf.int64)),
        )
        examples = pairs.unbatch().map(self._example, num_parallel_calls=_CALLS)
        chunks = examples.ragged_batch(_CHUNK).prefetch(_CHUNKS_AHEAD).with_options(as_written())
        for inputs, targets, cut_flags in chunks:
            rows = _sequences(inputs), _sequences(targets), cut_flags.numpy()
            for input_ids, target_ids, is_cut in zip(*rows, strict=True):
                self._ahead.append(is_cut)
                yield input_ids, target_ids

    def position(self) -> bytes:
        counts = self._sampler.counts(self._done).tolist()
        cut = None if self._cut is None else self._cut.tolist()
        return json.dumps({"examples": self._done, "counts": counts, "cut": cut}).encode()

    def move(self, position: bytes) -> None:
        saved = files.parse_json(position, "the saved position in the data", kind=dict)
        self._sampler.move(int(saved["examples"]), saved["counts"])
        self._done, self._batches = int(saved["examples"]), None
        # An older m2l did not count.
        cut = saved.get("cut")
        self._cut = None if cut is None else np.array(cut, np.int64).reshape(2)


def _close(running: list[Generator[Example, None, None]]) -> None:
    while running:
        running.pop().close()


def _sequences(ragged: tf.RaggedTensor) -> list[np.ndarray]:
    return np.split(ragged.values.numpy(), ragged.row_splits.numpy()[1:-1])


class TfDataIterator(Iterator[Batch]):
    """Batches of a dataset that keeps its position itself, as its sources' cursors."""

    cut = None

    def __init__(self, dataset: tf.data.Dataset):
        options = as_written()
        options.experimental_symbolic_checkpoint = True
        self._iterator = iter(dataset.with_options(options))

    def __next__(self) -> Batch:
        return {name: value.numpy() for name, value in next(self._iterator).items()}

    def position(self) -> bytes:
        saved = tf.raw_ops.SerializeIterator(resource_handle=self._iterator._iterator_resource)
        return tf.io.serialize_tensor(saved).numpy()

    def move(self, position: bytes) -> None:
        tf.raw_ops.DeserializeIterator(
            resource_handle=self._iterator._iterator_resource,
            serialized=tf.io.parse_tensor(position, tf.variant),
        )


def training_batches(
    mixture: str,
    *,
    lengths: Mapping[str, int],
    batch_size: int,
    seed: int,
    pack: bool = True,
    split: str = "train",
    shard: tuple[int, int] = (0, 1),
    layout: Layout = EncoderDecoder(),  # noqa: B008, frozen
    state: bytes | None = None,
) -> Batches:
    """Returns batches of a registered task or mixture, in the names of seqio's feature converters.

    The same arguments give the same batches in every process and on every machine.

    Args:
        mixture: The task's or mixture's name.
        lengths: Tokens per row, {"inputs": S, "targets": T}: longer examples are cut (targets keep
            their EOS), shorter ones padded or packed.
        batch_size: Rows in a batch; with several shards, in each shard's batch.
        seed: Decides the order of the records and of the tasks.
        pack: Whether several examples share a row, told apart by segment ids.
        split: The split to read.
        shard: (this process's number, how many processes); each reads its own part of the records.
        layout: What the model reads; `layouts.of` gives it.
        state: A position from `Batches.state`, to continue exactly there.

    Returns:
        Batches of encoder_input_tokens [B, S], decoder_target_tokens, decoder_input_tokens and
        decoder_loss_weights [B, T], int32; packed, encoder_ and decoder_ segment_ids and positions
        as well. Of a decoder: no encoder_ ones, the others [B, S + T], always with segment_ids and
        positions.

    Raises:
        UnknownNameError: no such task or mixture.
        DataError: a split that none of its tasks has, or has records in; a position of other data.
    """
    provider = find("task or mixture", mixture, split)
    tasks = [task for task in seqio.get_subtasks(provider) if split in task.splits]
    made_from = {
        "mixture": mixture,
        "records": {task.name: _identity(task, split) for task in tasks},
        "lengths": dict(lengths),
        "batch_size": batch_size,
        "seed": seed,
        "pack": pack,
        "split": split,
        "shard": list(shard),
        "layout": [type(layout).__name__, layout.start_id],
        "tensorflow": tf.__version__,
    }

    if all(
        isinstance(task.source, RecordSource) and list(task.preprocessors) == [tokenize, append_eos]
        for task in tasks
    ):
        stream = _sampled(provider, tasks, lengths, batch_size, pack, split, seed, shard, layout)
    elif not isinstance(layout, EncoderDecoder):
        raise DataError(
            f"{mixture!r} makes inputs and targets of tokens, not of texts: a decoder cannot be "
            "trained on it; language_modeling is for pretraining decoders"
        )
    else:
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
        rows = seqio.EncDecFeatureConverter(pack=pack, bos_id=layout.start_id)(
            examples, dict(lengths)
        )
        stream = TfDataIterator(
            rows.batch(batch_size, drop_remainder=True).prefetch(_BATCHES_AHEAD)
        )
    batches = Batches(stream, made_from)
    if state is not None:
        batches.restore(state)
    return batches


def _only(names: Collection[str]) -> Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]:
    return tf.autograph.experimental.do_not_convert(lambda row: {name: row[name] for name in names})


def _sampled(
    provider: seqio.Task | seqio.Mixture,
    tasks: Sequence[seqio.Task],
    lengths: Mapping[str, int],
    batch_size: int,
    pack: bool,
    split: str,
    seed: int,
    shard: tuple[int, int],
    layout: Layout,
) -> _SampledExamples:
    readers = [task.source.endless(split, seed, shard, only=lengths) for task in tasks]
    rates = [provider.get_rate(task) for task in tasks] if len(tasks) > 1 else [1.0]
    features = tasks[0].output_features

    def tokens(name: str, text: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns what `tokenize` and `append_eos` make of a text, and whether it was cut."""
        feature, length = features[name], lengths[name]
        ids = feature.vocabulary.encode_tf(text)
        most = length - 1 if feature.add_eos else length
        end = [feature.vocabulary.eos_id] if feature.add_eos else []
        return tf.concat([ids[:most], tf.constant(end, tf.int32)], axis=0), tf.size(ids) > most

    @tf.autograph.experimental.do_not_convert
    def example(task: tf.Tensor, count: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        # As tf.switch_case, but the branches stay functions. Inlined, as it has them, all of a
        # hundred are walked through for every example, to find out that they are not taken.
        texts = cond_v2.indexed_case(
            task,
            [functools.partial(make, count) for make in readers],
            lower_using_switch_merge=False,
        )
        inputs, inputs_cut = tokens("inputs", texts["inputs"])
        targets, targets_cut = tokens("targets", texts["targets"])
        return inputs, targets, tf.cast(tf.stack([inputs_cut, targets_cut]), tf.int32)

    def batched(examples: Iterator[Example]) -> Iterator[tuple[Batch, int]]:
        return layouts.batches(examples, lengths, batch_size, pack, layout)

    return _SampledExamples(MixtureSampler(rates, (seed, shard[0])), example, batched)


def _identity(task: seqio.Task, split: str) -> list[int | None]:
    """Returns what tells a task's records from others: how many they are, and their checksum."""
    digest = task.source.digest(split) if isinstance(task.source, RecordSource) else None
    return [task.num_input_examples(split), digest]
