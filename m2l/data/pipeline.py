"""From a task or mixture to training batches, resumable at once and exactly."""

import json
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from m2l import files
from m2l.data import layouts, text_tasks
from m2l.data.layouts import Batch, EncoderDecoder, Example, Layout
from m2l.data.record_table import index_shuffle
from m2l.data.rendering import Texts
from m2l.data.text_tasks import Rate, TextTask
from m2l.data.vocabularies import Vocabulary
from m2l.errors import DataError
from m2l.typing import Json

DRAWS_CHUNK = 4096  # draws that are computed at a time
_CHUNK = 128  # examples that are made at a time


class Stream(Protocol):
    """Batches that know where they are in their data."""

    cut: dict[str, int] | None

    def __next__(self) -> Batch:
        """Returns the next batch."""

    def position(self) -> bytes:
        """Returns the position after the last batch."""

    def move(self, position: bytes) -> None:
        """Moves to a position; raises ValueError, KeyError or TypeError where it is damaged."""


def vocabulary_of(mixture: str, split: str = "train") -> Vocabulary:
    """Returns the vocabulary of a task's or mixture's inputs; of seqio's tasks, seqio's.

    Raises:
        UnknownNameError: no such task or mixture.
        DataError: it has no such split.
    """
    rates = text_tasks.members("task or mixture", mixture, split)
    if rates is not None:
        return next(iter(rates)).inputs
    from m2l.data import seqio_pipeline

    return seqio_pipeline.vocabulary_of(mixture, split)


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

    def __init__(self, stream: Stream, made_from: Mapping[str, Json]):
        self._stream, self._made_from = stream, dict(made_from)

    def __next__(self) -> Batch:
        """Returns the next batch: int32 arrays [batch_size, length] by feature name."""
        return next(self._stream)

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
        except (ValueError, KeyError, TypeError) as error:
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
        examples: Callable[[np.ndarray, np.ndarray], Iterator[tuple[Example, tuple[bool, bool]]]],
        batched: Callable[[Iterator[Example]], Iterator[tuple[Batch, int]]],
    ):
        self._sampler, self._make, self._batched = sampler, examples, batched
        self._done = 0
        # Of the examples done, how many had their inputs and their targets cut.
        self._cut: np.ndarray | None = np.zeros(2, np.int64)
        # Whether each further example that was made had its inputs and its targets cut.
        self._ahead: deque[tuple[bool, bool]] = deque()
        self._batches: Iterator[tuple[Batch, int]] | None = None

    def __next__(self) -> Batch:
        if self._batches is None:
            self._ahead.clear()
            self._batches = self._batched(self._examples())
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
        for tasks, counts in self._sampler.pairs(self._done):
            for example, cut in self._make(tasks, counts):
                self._ahead.append(cut)
                yield example

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
    made_from = {
        "mixture": mixture,
        "lengths": dict(lengths),
        "batch_size": batch_size,
        "seed": seed,
        "pack": pack,
        "split": split,
        "shard": list(shard),
        "layout": [type(layout).__name__, layout.start_id],
    }
    rates = text_tasks.members("task or mixture", mixture, split)
    if rates is None:
        from m2l.data import seqio_pipeline

        rates = seqio_pipeline.text_tasks_of(mixture, split)
    if rates is not None:
        made_from["records"] = {task.name: identity(task, split) for task in rates}
        stream = _sampled(mixture, rates, lengths, batch_size, pack, split, seed, shard, layout)
    elif not isinstance(layout, EncoderDecoder):
        raise DataError(
            f"{mixture!r} makes inputs and targets of tokens, not of texts: a decoder cannot be "
            "trained on it; language_modeling is for pretraining decoders"
        )
    else:
        stream, more = seqio_pipeline.stream(
            mixture, lengths, batch_size, pack, split, seed, shard, layout
        )
        made_from |= more
    batches = Batches(stream, made_from)
    if state is not None:
        batches.restore(state)
    return batches


def sizes(mixture: str, split: str) -> dict[str, int]:
    """Returns how many records each task of a mixture has in a split, in the order of the draws.

    Raises:
        UnknownNameError: no such task or mixture.
        DataError: none of its tasks has the split.
    """
    rates = text_tasks.members("task or mixture", mixture, split)
    if rates is None:
        from m2l.data import seqio_pipeline

        return seqio_pipeline.sizes(mixture, split)
    return {task.name: task.records.split(split).size for task in rates}


def identity(task: TextTask, split: str) -> list[int | None]:
    """Returns what tells a task's records from others: how many they are, and their checksum."""
    records = task.records.split(split)
    return [records.size, records.digest]


def _sampled(
    mixture: str,
    rates: Mapping[TextTask, Rate],
    lengths: Mapping[str, int],
    batch_size: int,
    pack: bool,
    split: str,
    seed: int,
    shard: tuple[int, int],
    layout: Layout,
) -> _SampledExamples:
    tasks = list(rates)
    orders = [_order(task, split, seed, shard) for task in tasks]
    shares = [rate() for rate in rates.values()] if len(tasks) > 1 else [1.0]

    def side(
        name: str, texts: Sequence[Texts], vocabulary: Vocabulary, eos_id: int | None
    ) -> list[tuple[np.ndarray, bool]]:
        encoded = text_tasks.encode(vocabulary, [each[name] for each in texts], mixture)
        return [text_tasks.truncated(ids, lengths[name], eos_id) for ids in encoded]

    def examples(
        drawn: np.ndarray, counts: np.ndarray
    ) -> Iterator[tuple[Example, tuple[bool, bool]]]:
        numbers = np.empty(len(drawn), np.int64)
        for task in np.unique(drawn):
            selected = drawn == task
            numbers[selected] = orders[task](counts[selected])
        for first in range(0, len(drawn), _CHUNK):
            chunk = slice(first, first + _CHUNK)
            pairs = zip(drawn[chunk].tolist(), numbers[chunk].tolist(), strict=True)
            texts = [tasks[task].texts(split, number) for task, number in pairs]
            inputs = side("inputs", texts, tasks[0].inputs, None)
            targets = side("targets", texts, tasks[0].targets, tasks[0].targets.eos_id)
            for (input_ids, input_cut), (target_ids, target_cut) in zip(
                inputs, targets, strict=True
            ):
                yield (input_ids, target_ids), (input_cut, target_cut)

    def batched(examples: Iterator[Example]) -> Iterator[tuple[Batch, int]]:
        return layouts.batches(examples, lengths, batch_size, pack, layout)

    return _SampledExamples(MixtureSampler(shares, (seed, shard[0])), examples, batched)


def _order(
    task: TextTask, split: str, seed: int, shard: tuple[int, int]
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a task's endless order: epochs, each a random order of its own.

    Returns:
        A function: how many examples came before, int64 [n] -> the numbers of the next records.

    Raises:
        DataError: the split has fewer records than there are shards: one would get none.
    """
    first, shards = shard
    size = task.records.shared_size(split, shards, task.name)
    local_size = len(range(first, size, shards))
    key = zlib.crc32(f"{seed} {task.name}".encode())  # of a key only 32 bits count

    def numbers(counts: np.ndarray) -> np.ndarray:
        epochs, places = counts // local_size, counts % local_size * shards + first
        result = np.empty(len(counts), np.int64)
        for epoch in np.unique(epochs):
            selected = epochs == epoch
            result[selected] = index_shuffle(places[selected], (key, int(epoch)), size)
        return result

    return numbers
