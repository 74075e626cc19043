"""How an example becomes what a model reads: an encoder-decoder's two sides or a decoder's row."""

import dataclasses
from typing import Any

import numpy as np

from m2l.data import vocabularies
from m2l.errors import DataError


@dataclasses.dataclass(frozen=True)
class EncoderDecoder:
    """Inputs on one side, targets on the other, which starts with `start_id`."""

    start_id: int = 0

    def prompt(self, inputs: np.ndarray) -> tuple[np.ndarray, int]:
        """What is encoded, and the token that starts what follows it."""
        return inputs, self.start_id


@dataclasses.dataclass(frozen=True)
class PrefixLM:
    """Inputs and targets in one row, behind `start_id` if there is one; the loss is the targets'.

    Attention is causal in the inputs too: the published decoders were trained so.
    """

    start_id: int | None

    def prompt(self, inputs: np.ndarray) -> tuple[np.ndarray, int]:
        """The row but for its last token, and this.

        Raises:
            DataError: there is neither an input nor a start token to continue.
        """
        row = inputs if self.start_id is None else np.append(np.int32(self.start_id), inputs)
        if not len(row):
            raise DataError("an example without inputs, and the tokenizer has no token to start by")
        return row[:-1], int(row[-1])


Layout = EncoderDecoder | PrefixLM


def of(config: Any, vocabulary: Any = None) -> Layout:
    """The layout that a model of this config reads.

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
