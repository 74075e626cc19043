"""How examples become rows of fixed length: an encoder-decoder's two sides or a decoder's row."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from m2l.data import vocabularies
from m2l.data.tokenizer_files import Vocabulary
from m2l.errors import DataError
from m2l.models import Config


@dataclasses.dataclass(frozen=True)
class EncoderDecoder:
    """Inputs on one side, targets on the other, which starts with `start_id`."""

    start_id: int = 0

    def prompt(self, inputs: np.ndarray) -> tuple[np.ndarray, int]:
        """Returns what is encoded, and the token that starts what follows it."""
        return inputs, self.start_id


@dataclasses.dataclass(frozen=True)
class PrefixLM:
    """Inputs and targets in one row, after `start_id` if there is one; the loss is the targets'.

    Attention is causal in the inputs too: the published decoders were trained so.
    """

    start_id: int | None

    def prompt(self, inputs: np.ndarray) -> tuple[np.ndarray, int]:
        """Returns the row but for its last token, and this.

        Raises:
            DataError: there is neither an input nor a start token to continue.
        """
        row = inputs if self.start_id is None else np.append(np.int32(self.start_id), inputs)
        if not len(row):
            raise DataError("an example without inputs, and the tokenizer has no token to start by")
        return row[:-1], int(row[-1])


Layout = EncoderDecoder | PrefixLM


def of(config: Config, vocabulary: Vocabulary | None = None) -> Layout:
    """Returns the layout that a model of this config reads.

    Args:
        config: The model's configuration.
        vocabulary: The seqio vocabulary; needed for a decoder, whose tokenizer says what starts a
            row.
    """
    if not config.decoder_only:
        return EncoderDecoder(config.decoder_start_token_id)
    if vocabulary is None:
        raise TypeError("a decoder's layout needs its vocabulary")
    return PrefixLM(vocabularies.start_id(vocabulary))


# ---- Rows

Batch = dict[str, np.ndarray]
Example = tuple[np.ndarray, np.ndarray]


def batches(
    examples: Iterable[Example],
    lengths: Mapping[str, int],
    batch_size: int,
    pack: bool,
    layout: Layout = EncoderDecoder(),
) -> Iterator[tuple[Batch, int]]:
    """Fills batches of rows with examples, in order.

    A row takes examples as long as the next one fits into what is left of its inputs and of its
    targets (of a decoder: of the row of both); unpacked, one each. seqio's packing is the same but
    that it begins a new row after every so many examples.

    Args:
        examples: Inputs int32 [<= S] and targets int32 [1 .. T] of one example after the other.
        lengths: {"inputs": S, "targets": T}.
        batch_size: Rows in a batch.
        pack: Whether examples share rows.
        layout: How an example becomes a row.

    Yields:
        A batch, int32 arrays [batch_size, S] or [batch_size, T] by feature name (of a decoder
        [batch_size, S + T]), and how many examples it holds. A last batch that is not full is left
        out.
    """
    two_sides = isinstance(layout, EncoderDecoder)
    space = (lengths["inputs"], lengths["targets"])
    space = space if two_sides else (sum(space), 0)
    added = 0 if two_sides or layout.start_id is None else 1
    pending: list[Example] = []
    rows: list[int] = []  # of each example that is held
    row, left = 0, space
    for inputs, targets in examples:
        # The row of a decoder is what it reads: all tokens but the last.
        sizes = len(inputs), len(targets)
        sizes = sizes if two_sides else (sum(sizes) + added - 1, 0)
        fits = pack and sizes[0] <= left[0] and sizes[1] <= left[1]
        if pending and not fits:
            row, left = row + 1, space
            if row == batch_size:
                yield _filled(pending, rows, space, batch_size, pack, layout), len(pending)
                pending, rows, row = [], [], 0
        pending.append((inputs, targets))
        rows.append(row)
        left = left[0] - sizes[0], left[1] - sizes[1]


class _TokenGrid:
    """The rows of a batch, and the places in them of one example's tokens after another's."""

    def __init__(self, rows: list[int], sizes: np.ndarray, batch_size: int, length: int):
        row_numbers = np.asarray(rows)
        # The first example of each row has number 1 in it.
        starts = np.searchsorted(row_numbers, np.arange(batch_size))
        segments = np.arange(len(rows)) - starts[row_numbers] + 1
        before = np.cumsum(sizes) - sizes
        # Where an example begins in its row: after the examples of the row before it.
        offsets = before - before[starts[row_numbers]]
        self.before, self._shape = before, (batch_size, length)
        self.places = np.arange(sizes.sum()) - np.repeat(before, sizes)
        self.segments = np.repeat(segments, sizes)
        self._at = np.repeat(row_numbers * length + offsets, sizes) + self.places

    def filled(self, values: np.ndarray) -> np.ndarray:
        """Fills int32 [batch_size, length], 0 where no token is."""
        filled = np.zeros(self._shape[0] * self._shape[1], np.int32)
        filled[self._at] = values
        return filled.reshape(self._shape)

    def marks(self, side: str) -> Batch:
        """Returns the ids and positions that tell the examples of a row apart."""
        return {
            f"{side}_segment_ids": self.filled(self.segments),
            f"{side}_positions": self.filled(self.places),
        }


def _filled(
    examples: list[Example],
    rows: list[int],
    space: tuple[int, int],
    batch_size: int,
    pack: bool,
    layout: Layout,
) -> Batch:
    if isinstance(layout, EncoderDecoder):
        return _two_sides(examples, rows, space, batch_size, pack, layout.start_id)
    return _one_row(examples, rows, space[0], batch_size, layout.start_id)


def _sizes(sequences: Iterable[np.ndarray]) -> np.ndarray:
    return np.array([len(sequence) for sequence in sequences])


def _two_sides(
    examples: list[Example],
    rows: list[int],
    space: tuple[int, int],
    batch_size: int,
    pack: bool,
    start_id: int,
) -> Batch:
    inputs, targets = zip(*examples, strict=True)
    encoder = _TokenGrid(rows, _sizes(inputs), batch_size, space[0])
    decoder = _TokenGrid(rows, _sizes(targets), batch_size, space[1])
    tokens = np.concatenate(targets)
    filled = decoder.filled(tokens)
    # Moved by one after the start token; within each example, where they share rows.
    moved = np.roll(filled, 1, axis=1)
    moved[:, 0] = 0
    begins = decoder.filled(decoder.places == 0) == 1
    if pack:
        moved[decoder.filled(decoder.places) == 0] = 0
    moved[begins] = start_id
    batch = {
        "encoder_input_tokens": encoder.filled(np.concatenate(inputs)),
        "decoder_target_tokens": filled,
        "decoder_input_tokens": moved,
        "decoder_loss_weights": decoder.filled(tokens != 0),
    }
    return batch | encoder.marks("encoder") | decoder.marks("decoder") if pack else batch


def _one_row(
    examples: list[Example], rows: list[int], length: int, batch_size: int, start_id: int | None
) -> Batch:
    start = np.array([] if start_id is None else [start_id], np.int32)
    whole = [np.concatenate([start, *example]) for example in examples]
    prefixes = _sizes(inputs for inputs, _ in examples) + len(start)
    sizes = _sizes(whole) - 1
    grid = _TokenGrid(rows, sizes, batch_size, length)
    # Padding may have the id of a token: segments, not ids, tell where it is, packed or not.
    return {
        "decoder_input_tokens": grid.filled(np.concatenate([row[:-1] for row in whole])),
        "decoder_target_tokens": grid.filled(np.concatenate([row[1:] for row in whole])),
        "decoder_loss_weights": grid.filled(grid.places >= np.repeat(prefixes, sizes) - 1),
        **grid.marks("decoder"),
    }
