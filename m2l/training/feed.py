"""The rows of a batch that a process feeds, from data that is read in a fixed number of streams.

A run's streams are as many as its processes fed shares of a batch when it began, and remain so: a
batch is always the rows of all streams, in order. Where the number of shares changes, a process
reads several streams, or some rows of one, so no example is lost or read twice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from m2l import models, partitioning
from m2l.data import layouts, pipeline
from m2l.errors import ConfigError
from m2l.training.settings import TrainSettings

Batch = Mapping[str, np.ndarray]
Positions = list[bytes | None]
"""A position in each stream; None for those that this process does not read."""


class BatchStream(Protocol):
    """Batches with a position to resume from: `pipeline.Batches`, `Synthetic`."""

    cut: dict[str, int] | None

    def __next__(self) -> Batch:
        """Returns the next batch."""
        ...

    def state(self) -> bytes:
        """Returns the position after the last batch."""
        ...


OpenStream = Callable[[tuple[int, int], bytes | None], BatchStream]
"""Opens stream (number, of how many) at a position; None: at its beginning."""


class Feed(Iterator[dict[str, np.ndarray]]):
    """This process's rows of one batch after the other.

    Args:
        open_stream: Opens a stream.
        rows: How many rows a batch has, of all processes together.
        share: Which share of it this process feeds: (its number, how many there are).
        positions: Where to resume, one for each stream; None: as many streams as shares, from their
            beginnings.

    Raises:
        ConfigError: The rows cannot be divided evenly into streams.
    """

    def __init__(
        self,
        open_stream: OpenStream,
        rows: int,
        share: tuple[int, int],
        positions: Positions | None = None,
    ):
        positions = [None] * share[1] if positions is None else positions
        self._count = len(positions)
        if rows % self._count or rows % share[1]:
            raise ConfigError(
                f"batch_size {rows} cannot be split evenly into {self._count} streams of data and "
                f"{share[1]} shares"
            )
        stream_rows, share_rows = rows // self._count, rows // share[1]
        first, last = share[0] * share_rows, (share[0] + 1) * share_rows
        self._parts: dict[int, slice] = {}
        self._owned: list[int] = []
        for number in range(self._count):
            begin = number * stream_rows
            low, high = max(first, begin), min(last, begin + stream_rows)
            if low < high:
                self._parts[number] = slice(low - begin, high - begin)
                if low == begin:
                    self._owned.append(number)
        self._streams = {n: open_stream((n, self._count), positions[n]) for n in self._parts}

    def __next__(self) -> dict[str, np.ndarray]:
        batches = [(next(self._streams[n]), rows) for n, rows in self._parts.items()]
        return {
            name: np.concatenate([batch[name][rows] for batch, rows in batches])
            for name in batches[0][0]
        }

    def positions(self) -> Positions:
        """Returns the position of each stream that this process reads, after the last batch."""
        return [
            self._streams[n].state() if n in self._streams else None for n in range(self._count)
        ]

    @property
    def cut(self) -> dict[str, int] | None:
        """The sums of `pipeline.Batches.cut` over the streams whose first row is this share's.

        None where streams do not count; zeros where another share counts for this one.
        """
        counts = {number: stream.cut for number, stream in self._streams.items()}
        if any(count is None for count in counts.values()):
            return None
        names = next(iter(counts.values()))
        return {name: sum(counts[number][name] for number in self._owned) for name in names}


def merged_positions(parts: Sequence[Positions]) -> list[bytes]:
    """Returns the position in each stream of those that the processes know.

    Args:
        parts: `Feed.positions` of every process.
    """
    return [next(p for p in streams if p is not None) for streams in zip(*parts, strict=True)]


OpenFeed = Callable[[Positions | None], Feed]


def opener(
    config: models.Config,
    settings: TrainSettings,
    share: tuple[int, int],
    synthetic: bool,
    validation: str = "",
) -> OpenFeed:
    """Returns a function that opens this process's batches at positions; None: at the beginning.

    Args:
        config: The model's configuration.
        settings: The run's.
        share: Which share of a batch this process feeds.
        synthetic: Whether they are random tokens.
        validation: The mixture whose validation split is read; "": the run's own, to train on.
    """
    mixture = validation or settings.mixture

    def open_stream(stream: tuple[int, int], position: bytes | None) -> BatchStream:
        rows = settings.batch_size // stream[1]
        if synthetic:
            return Synthetic(config, settings.lengths, rows)
        return pipeline.training_batches(
            mixture,
            lengths=settings.lengths,
            batch_size=rows,
            seed=settings.seed,
            pack=settings.pack,
            split="validation" if validation else "train",
            shard=stream,
            layout=layouts.of(config, pipeline.vocabulary_of(mixture)),
            state=position,
        )

    return lambda positions: Feed(open_stream, settings.batch_size, share, positions)


class Synthetic(Iterator[dict[str, np.ndarray]]):
    """One batch of random tokens, again and again, in the names of the pipeline's.

    Args:
        config: The model's configuration.
        lengths: {"inputs": S, "targets": T}.
        rows: Rows in a batch.
    """

    cut = None  # tokens, of no examples

    def __init__(self, config: models.Config, lengths: Mapping[str, int], rows: int):
        rng = np.random.default_rng(0)
        sizes = {"encoder": lengths["inputs"], "decoder": lengths["targets"]}
        if config.decoder_only:
            sizes = {"decoder": sum(sizes.values())}
        names = [f"{side}_input_tokens" for side in sizes] + ["decoder_target_tokens"]
        self._batch = {
            name: rng.integers(2, config.vocab_size, (rows, sizes[name[:7]]), dtype=np.int32)
            for name in names
        }
        for side, length in sizes.items():
            self._batch[f"{side}_segment_ids"] = np.ones((rows, length), np.int32)
            positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
            self._batch[f"{side}_positions"] = positions
        self._batch["decoder_loss_weights"] = np.ones((rows, sizes["decoder"]), np.int32)

    def __next__(self) -> dict[str, np.ndarray]:
        return self._batch

    def state(self) -> bytes:
        """Returns the one position that there is."""
        return b"synthetic"


def place(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """Places this process's rows of a batch on the mesh, as parts of the global batch."""
    sharding = partitioning.batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }
