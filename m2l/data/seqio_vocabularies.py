"""Vocabularies as seqio's own, for its registry."""

import functools
from collections.abc import Sequence

import numpy as np
import seqio
import tensorflow as tf

from m2l.data.tokenizer_files import Bytes, T5SentencePiece
from m2l.data.vocabularies import Vocabulary
from m2l.errors import DataError


@functools.lru_cache(maxsize=8)
def as_seqio(vocabulary: Vocabulary) -> seqio.Vocabulary:
    """Returns seqio's vocabulary of the same ids: its own class where it has one."""
    match vocabulary.files:
        case Bytes(extra_ids):
            return seqio.ByteVocabulary(extra_ids)
        case T5SentencePiece(file, extra_ids):
            return seqio.SentencePieceVocabulary(str(file), extra_ids)
    return PythonVocabulary(vocabulary)


class PythonVocabulary(seqio.Vocabulary):
    """A vocabulary of m2l's that seqio has no class for, called from graphs."""

    def __init__(self, inner: Vocabulary):
        super().__init__(extra_ids=0)
        self.inner = inner

    @property
    def bos_id(self) -> int | None:
        """The id that the tokenizer puts in front of a text."""
        return self.inner.bos_id

    @property
    def eos_id(self) -> int:
        """The id that ends a text."""
        return self.inner.eos_id

    @property
    def unk_id(self) -> int | None:
        """What ids beyond the vocabulary are decoded as."""
        return self.inner.unk_id

    @property
    def _base_vocab_size(self) -> int:
        return self.inner.vocab_size

    def _encode(self, text: str) -> list[int]:
        return self.inner.encode(text)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(ids)

    def _encode_tf(self, text: tf.Tensor) -> tf.Tensor:
        # Outside a graph, numpy_function would take the null bytes off a text's end.
        if tf.executing_eagerly():
            return tf.constant(self._encode_bytes(text.numpy()), tf.int32)
        ids = tf.numpy_function(self._encode_bytes, [text], tf.int32, stateful=False)
        ids.set_shape([None])
        return ids

    def _encode_bytes(self, text: bytes) -> np.ndarray:
        try:
            return np.array(self._encode(text.decode(errors="replace")), np.int32)
        except DataError as error:
            # TensorFlow hands a ValueError on as what it is, an invalid argument.
            raise ValueError(str(error)) from error

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        if tf.executing_eagerly():
            return tf.constant(self._decode_rows(ids.numpy()), tf.string)
        texts = tf.numpy_function(self._decode_rows, [ids], tf.string, stateful=False)
        texts.set_shape(ids.shape[:-1])
        return texts

    def _decode_rows(self, ids: np.ndarray) -> bytes | np.ndarray:
        if ids.ndim == 1:
            return self.decode(ids.tolist()).encode()
        return np.array([self._decode_rows(row) for row in ids], object)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PythonVocabulary) and self.inner == other.inner

    def __hash__(self) -> int:
        return hash(self.inner)
