"""How examples become rows of fixed length: an encoder-decoder's two sides or a decoder's row."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from m2l.data import vocabularies
from m2l.data.vocabularies import Vocabulary
from m2l.errors import DataError
from m2l.models import Config

Batch = dict[str, np.ndarray]
Example = tuple[np.ndarray, np.ndarray]  # inputs and targets
Sizes = tuple[int, ...]  # in tokens, of each side of a row


@dataclasses.dataclass(frozen=True)
class EncoderDecoder:
    """Inputs on one side, targets on the other, which starts with `start_id`."""

    start_id: int = 0

    def prompt(self, inputs: np.ndarray) -> tuple[np.ndarray, int]:
        """Returns what is encoded, and the token that starts what follows it."""
        return inputs, self.start_id

    def _space(self, lengths: Mapping[str, int]) -> Sizes:
        return lengths["inputs"], lengths["targets"]

    def _sizes(self, example: Example) -> Sizes:
        return len(example[0]), len(example[1])

    def _batch(
        self, examples: list[Example], rows: list[int], space: Sizes, batch_size: int, pack: bool
    ) -> Batch:
        inputs, targets = zip(*examples, strict=True)
        encoder = _TokenGrid(rows, inputs, batch_size, space[0])
        decoder = _TokenGrid(rows, targets, batch_size, space[1])
        tokens = np.concatenate(targets)
        filled = decoder.filled(tokens)
        # Moved by one after the start token; within each example, where they share rows.
        moved = np.roll(filled, 1, axis=1)
        moved[:, 0] = 0
        begins = decoder.filled(decoder.places == 0) == 1
        if pack:
            moved[decoder.filled(decoder.places) == 0] = 0
        moved[begins] = self.start_id
        batch = {
            "encoder_input_tokens": encoder.filled(np.concatenate(inputs)),
            "decoder_target_tokens": filled,
            "decoder_input_tokens": moved,
            "decoder_loss_weights": decoder.filled(tokens != 0),
        }
        return batch | encoder.marks("encoder") | decoder.marks("decoder") if pack else batch


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
        row = np.concatenate([self._start(), inputs])
        if not len(row):
            raise DataError("an example without inputs, and the tokenizer has no token to start by")
        return row[:-1], int(row[-1])

    def _start(self) -> np.ndarray:
        return np.array([] if self.start_id is None else [self.start_id], np.int32)

    def _space(self, lengths: Mapping[str, int]) -> Sizes:
        return (lengths["inputs"] + lengths["targets"],)

    def _sizes(self, example: Example) -> Sizes:
        # A row is what the decoder reads: all tokens but the last.
        return (len(self._start()) + len(example[0]) + len(example[1]) - 1,)

    def _batch(
        self, examples: list[Example], rows: list[int], space: Sizes, batch_size: int, pack: bool
    ) -> Batch:
        start = self._start()
        texts = [np.concatenate([start, *example]) for example in examples]
        prefixes = [len(start) + len(inputs) for inputs, _ in examples]
        grid = _TokenGrid(rows, [text[1:] for text in texts], batch_size, space[0])
        # Padding may have the id of a token: segments, not ids, tell where it is, packed or not.
        return {
            "decoder_input_tokens": grid.filled(np.concatenate([text[:-1] for text in texts])),
            "decoder_target_tokens": grid.filled(np.concatenate([text[1:] for text in texts])),
            "decoder_loss_weights": grid.filled(grid.places >= grid.repeated(prefixes) - 1),
            **grid.marks("decoder"),
        }


Layout = EncoderDecoder | PrefixLM


def of(config: Config, vocabulary: Vocabulary | None = None) -> Layout:
    """Returns the layout that a model of this config reads.

    Args:
        config: The model's configuration.
        vocabulary: The vocabulary; needed for a decoder, whose tokenizer says what starts a
            row.
    """
    if not config.decoder_only:
        return EncoderDecoder(config.decoder_start_token_id)
    if vocabulary is None:
        raise TypeError("a decoder's layout needs its vocabulary")
    return PrefixLM(vocabularies.start_id(vocabulary))


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
    space = layout._space(lengths)
    pending: list[Example] = []
    rows: list[int] = []  # of each pending example
    row, free = 0, space
    for example in examples:
        sizes = layout._sizes(example)
        fits = pack and all(size <= left for size, left in zip(sizes, free, strict=True))
        if pending and not fits:
            row, free = row + 1, space
            if row == batch_size:
                yield layout._batch(pending, rows, space, batch_size, pack), len(pending)
                pending, rows, row = [], [], 0
        pending.append(example)
        rows.append(row)
        free = tuple(left - size for size, left in zip(sizes, free, strict=True))


class _TokenGrid:
    """The rows of a batch, and the places in them of one sequence's tokens after another's."""

    def __init__(
        self, rows: Sequence[int], sequences: Sequence[np.ndarray], batch_size: int, length: int
    ):
        row_numbers = np.asarray(rows)
        self._sizes = sizes = np.array([len(sequence) for sequence in sequences])
        # The first example of each row has number 1 in it.
        starts = np.searchsorted(row_numbers, np.arange(batch_size))
        segments = np.arange(len(rows)) - starts[row_numbers] + 1
        before = np.cumsum(sizes) - sizes
        # Where an example begins in its row: after the examples of the row before it.
        offsets = before - before[starts[row_numbers]]
        self._shape = (batch_size, length)
        self.places = np.arange(sizes.sum()) - self.repeated(before)
        self._segments = self.repeated(segments)
        self._at = self.repeated(row_numbers * length + offsets) + self.places

    def repeated(self, values: np.ndarray | Sequence[int]) -> np.ndarray:
        """Repeats a value of each sequence for each of its tokens."""
        return np.repeat(values, self._sizes)

    def filled(self, values: np.ndarray) -> np.ndarray:
        """Fills int32 [batch_size, length], 0 where no token is."""
        filled = np.zeros(self._shape[0] * self._shape[1], np.int32)
        filled[self._at] = values
        return filled.reshape(self._shape)

    def marks(self, side: str) -> Batch:
        """Returns the ids and positions that tell the examples of a row apart."""
        return {
            f"{side}_segment_ids": self.filled(self._segments),
            f"{side}_positions": self.filled(self.places),
        }
