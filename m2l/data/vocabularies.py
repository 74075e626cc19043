"""Vocabularies: the microworld's, bytes, a SentencePiece model, a checkpoint's own tokenizer."""

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import seqio
import tensorflow as tf

from m2l.data import chat, tokenizer_files
from m2l.data.chat import ChatTemplate
from m2l.data.tokenizer_files import (
    PAD,
    Bytes,
    Files,
    SentencePiece,
    T5SentencePiece,
    TokenizerJson,
    Vocabulary,
)
from m2l.errors import DataError
from m2l.files import split_name
from m2l.typing import JsonObject


def load(name: str) -> seqio.Vocabulary:
    """Loads a vocabulary by name.

    Args:
        name: "microworld" (1,024 ids; any text round trips, by bytes where it must), "bytes"
            (ByT5's, 384 ids), a SentencePiece model such as T5's spiece.model, a tokenizer.json, or
            a directory of tokenizer files. Of a directory, spiece.model decides (T5's and mT5's),
            else tokenizer.json, else tokenizer.model (Llama 2's). "chat:" before a path to a
            tokenizer.json or its directory renders what is encoded by the chat template;
            "chat@2025-01-31:" tells it that day's date, in place of `chat.DATE`. "space:" or
            "nospace:" before a decoder's says whether a space stands between inputs and targets,
            which is else tried out (see `continuing`).

    Raises:
        DataError: the name's prefixes contradict each other, or mean nothing to this tokenizer;
            the file is missing or no tokenizer; T5's does not number padding, end of
            sequence and unknown 0, 1, 2; nothing says which token ends a text; or its chat template
            is missing or fails.
    """
    date, space = _reading(name)
    files = tokenizer_files.read(name)
    if isinstance(files, TokenizerJson):
        if date is None:
            return TokenizerVocabulary(files, space=space)
        directory = tokenizer_files.main_file(name).parent
        template = chat.read(directory, files.special_tokens, date)
        return TokenizerVocabulary(files, template, space)
    if date is not None:
        raise DataError(
            f"vocabulary {name!r}: only a tokenizer.json knows a chat template's special tokens; "
            "leave chat: out"
        )
    if space is not None and not isinstance(files, SentencePiece):
        raise DataError(
            f"vocabulary {name!r}: T5's vocabularies encode targets as they are; leave space: and "
            "nospace: out"
        )
    match files:
        case Bytes():
            return seqio.ByteVocabulary(extra_ids=files.extra_ids)
        case T5SentencePiece():
            return seqio.SentencePieceVocabulary(str(files.file), extra_ids=files.extra_ids)
        case SentencePiece():
            return DecoderSentencePieceVocabulary(files, space)


def _reading(name: str) -> tuple[datetime.date | None, bool | None]:
    """Parses a name's prefixes: a chat's date, None for no chat; whether a space is put."""
    prefixes = split_name(name)[0].split(":")[:-1]
    kinds = [prefix.partition("@")[0] for prefix in prefixes]
    spaces = [kind == "space" for kind in kinds if kind != "chat"]
    if len(spaces) > 1 or kinds.count("chat") > 1:
        raise DataError(
            f"vocabulary {name!r}: expected chat: once at most, and one of space: and nospace:"
        )
    date = None
    for prefix in prefixes:
        if prefix.startswith("chat"):
            try:
                day = prefix.partition("@")[2]
                date = datetime.date.fromisoformat(day) if "@" in prefix else chat.DATE
            except ValueError as error:
                raise DataError(
                    f"vocabulary {name!r}: {day!r} is not a date; expected chat@YYYY-MM-DD:"
                ) from error
    return date, spaces[0] if spaces else None


def describe(vocabulary: seqio.Vocabulary, name: str) -> JsonObject:
    """Describes the vocabulary that a checkpoint was trained with, for its manifest.

    Args:
        vocabulary: From `load`.
        name: The name it was loaded by.

    Returns:
        {"name": a path made absolute, "size": number of ids, sentinels included, "fingerprint":
        sha256 in hexadecimal of what decides the ids}: equal for equal vocabularies, wherever
        their files lie, whichever version wrote them, and with or without "chat:".
    """
    return tokenizer_files.describe(name, _files_of(vocabulary))


def _files_of(vocabulary: seqio.Vocabulary) -> Files:
    match vocabulary:
        case _Continuing():
            return _files_of(vocabulary.inner)
        case TokenizerVocabulary():
            return vocabulary.files
        case DecoderSentencePieceVocabulary():
            return SentencePiece(Path(vocabulary.sentencepiece_model_file), vocabulary.start_id)
        case seqio.SentencePieceVocabulary():
            return T5SentencePiece(Path(vocabulary.sentencepiece_model_file), vocabulary.extra_ids)
        case seqio.ByteVocabulary():
            return Bytes(vocabulary.extra_ids)
    raise TypeError(f"{type(vocabulary).__name__} is not from vocabularies.load")


def settings(vocabulary: seqio.Vocabulary) -> dict[str, str]:
    """Says what a vocabulary's name decides of the texts, where it is not as everywhere.

    Returns:
        "chat_date": the date that a chat template which asks for it is told; "target_space":
        whether a space stands between a decoder's inputs and targets, if the name says so.
    """
    named = {}
    template = getattr(vocabulary, "chat_template", None)
    if template and template.reads_date:
        named["chat_date"] = template.date.isoformat()
    if (space := getattr(vocabulary, "space", None)) is not None:
        named["target_space"] = "space" if space else "none"
    return named


def start_id(vocabulary: Vocabulary) -> int | None:
    """Returns the id that a decoder-only model's rows start with; None for none.

    A tokenizer's own first token where it adds one. T5's vocabularies have none: the models start
    with padding, as T5X's decoder-only models do.
    """
    return getattr(vocabulary, "start_id", PAD)


def continuing(vocabulary: seqio.Vocabulary) -> seqio.Vocabulary:
    """Returns the vocabulary to encode targets with, so that they go on where the inputs end.

    A decoder reads inputs and targets as one text, "inputs targets": encoded apart they must be the
    same ids. Byte-level tokenizers need the space before the target for it, others add it
    themselves; which it is, is tried out, unless the vocabulary's name says it ("space:",
    "nospace:"). Behind a chat's prompt the answer begins without one, unless the name says so too,
    and T5's vocabularies encode targets as they are.

    Returns:
        A vocabulary of the same ids, whose `decode` gives the target back without the space. An
        empty target has no ids.

    Raises:
        DataError: neither way gives the ids of the joint text.
    """
    if not isinstance(vocabulary, TokenizerVocabulary | DecoderSentencePieceVocabulary):
        return vocabulary
    space = vocabulary.space
    if isinstance(vocabulary, TokenizerVocabulary) and vocabulary.chat_template:
        vocabulary, space = TokenizerVocabulary(vocabulary.files), bool(space)
    if space is not None:
        return _Continuing(vocabulary) if space else vocabulary
    first, second, spaced, joint = map(vocabulary.encode, ("a", "b", " b", "a b"))
    if joint == first + second:
        return vocabulary
    if joint == first + spaced:
        return _Continuing(vocabulary)
    raise DataError(
        "this vocabulary's pieces reach over the space between two words, so that inputs and "
        "targets encoded apart are not what they are as one text; to encode them apart all the "
        "same, put space: or nospace: before its name"
    )


class TokenizerVocabulary(seqio.Vocabulary):
    """A tokenizer of Hugging Face's `tokenizers`, as seqio wants one.

    Special tokens written in a text become their ids, as they do in transformers: chat prompts are
    written so. No text gets a first or last token here; seqio's features add EOS, and `start_id`
    says what a row starts with. `pad_id` is 0, though 0 may be a token: m2l pads with 0 and
    tells padding by lengths. Ids beyond the vocabulary decode to nothing.

    Attributes:
        files: The tokenizer and its ends.
        chat_template: By which texts are rendered before they are encoded, if at all.
        space: Whether targets go on behind a space; None: as `continuing` finds.
        start_id: What a row starts with; None if nothing, or if the chat template writes it.
    """

    def __init__(
        self,
        files: TokenizerJson,
        chat_template: ChatTemplate | None = None,
        space: bool | None = None,
    ):
        super().__init__(extra_ids=0)
        self.files, self.chat_template, self.space = files, chat_template, space
        self.start_id = files.start_id
        # A first rendering also shows whether the template works at all.
        if chat_template and self._encode("a")[:1] == [files.start_id]:
            self.start_id = None

    @property
    def bos_id(self) -> int | None:
        """The id that the tokenizer puts in front of a text."""
        return self.files.start_id

    @property
    def eos_id(self) -> int:
        """The id that ends a text."""
        return self.files.eos_id

    @property
    def unk_id(self) -> None:
        """None: nothing is replaced before it is decoded."""

    @property
    def _base_vocab_size(self) -> int:
        return self.files.size

    def _encode(self, text: str) -> list[int]:
        if self.chat_template:
            text = self.chat_template.render(text)
        return self.files.tokenizer.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: Sequence[int]) -> str:
        if ids and ids[-1] == self.eos_id:
            ids = ids[:-1]
        return self.files.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

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

    def _identity(self) -> tuple[str, str | None, datetime.date | None]:
        template = self.chat_template
        date = template.date if template and template.reads_date else None
        return self.files.fingerprint, template and template.source, date

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenizerVocabulary) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())


class DecoderSentencePieceVocabulary(seqio.SentencePieceVocabulary):
    """A decoder's SentencePiece model: the ids are the file's own, and there are no sentinels.

    Special tokens written in a text are encoded letter by letter, not as in transformers.

    Attributes:
        start_id: What a row starts with, if with anything.
        space: Whether targets go on behind a space; None: as `continuing` finds.
    """

    def __init__(self, files: SentencePiece, space: bool | None = None):
        super().__init__(str(files.file), extra_ids=0)
        self.start_id, self.space = files.start_id, space


class _Continuing(seqio.Vocabulary):
    """Encodes texts with a space before them, and takes it away again where it decodes."""

    def __init__(self, inner: seqio.Vocabulary):
        super().__init__(extra_ids=0)
        self.inner = inner
        self.start_id = start_id(inner)

    @property
    def bos_id(self) -> int | None:
        return self.inner.bos_id

    @property
    def eos_id(self) -> int:
        return self.inner.eos_id

    @property
    def unk_id(self) -> int | None:
        return self.inner.unk_id

    @property
    def _base_vocab_size(self) -> int:
        return self.inner._base_vocab_size

    def _encode(self, text: str) -> list[int]:
        return self.inner.encode(text and f" {text}")

    def _decode(self, ids: Iterable[int]) -> str:
        return self.inner.decode(ids).removeprefix(" ")

    def _encode_tf(self, text: tf.Tensor) -> tf.Tensor:
        space = tf.where(tf.equal(text, ""), "", " ")
        return self.inner.encode_tf(tf.strings.join([space, text]))

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.strings.regex_replace(self.inner.decode_tf(ids), r"\A ", "")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Continuing) and self.inner == other.inner

    def __hash__(self) -> int:
        return hash((type(self), self.eos_id, self.vocab_size))
