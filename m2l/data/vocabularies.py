"""Vocabularies: the microworld's, bytes, a SentencePiece model, a checkpoint's own tokenizer."""

import abc
import datetime
import itertools
from collections.abc import Iterable, Sequence
from typing import ClassVar

from m2l.data import chat, tokenizer_files
from m2l.data.chat import ChatTemplate
from m2l.data.tokenizer_files import (
    EOS,
    PAD,
    UNKNOWN,
    Bytes,
    Files,
    SentencePiece,
    T5SentencePiece,
    TokenizerJson,
)
from m2l.errors import DataError
from m2l.files import split_name
from m2l.typing import JsonObject

Prompted = tuple[str, Sequence[tuple[str, str]]]
"""Inputs, and the inputs and targets that stand before them."""


def few_shot_text(inputs: str, shots: Sequence[tuple[str, str]], space: str = " ") -> str:
    """Returns inputs behind examples: each one's inputs and target, then an empty line."""
    return "".join(f"{before}{space}{target}\n\n" for before, target in shots) + inputs


class Vocabulary(abc.ABC):
    """What turns texts into ids and back, by its own library: neither seqio nor TensorFlow.

    Attributes:
        files: What decides the ids.
        eos_id: The id that ends a text.
        bos_id: The id that its tokenizer puts in front of a text, if any.
        unk_id: What ids beyond the vocabulary are decoded as; None: nothing is replaced.
        extra_ids: How many of the ids, the last ones, are sentinels.
        start_id: What a decoder-only model's row starts with; None for none.
        chat_template: By which texts are rendered before they are encoded, if at all.
        space: Whether targets go on behind a space; None: as `continuing` finds.
    """

    files: Files
    pad_id: ClassVar[int] = PAD
    eos_id: int = EOS
    bos_id: int | None = None
    unk_id: int | None = UNKNOWN
    extra_ids: int = 0
    start_id: int | None = PAD
    chat_template: ChatTemplate | None = None
    space: bool | None = None

    @property
    def vocab_size(self) -> int:
        """How many ids there are, sentinels included."""
        return self.files.size

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without EOS."""
        return self.encode_all([text])[0]

    def encode_turns(self, turns: Sequence[str]) -> list[int]:
        """Returns the ids of a conversation's prompt; without a chat template, of its last turn."""
        return self.encode(turns[-1])

    @abc.abstractmethod
    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, as `encode` does, in one call of the library."""

    def encode_few_shot(self, prompts: Sequence[Prompted]) -> list[list[int]]:
        """Returns the ids of inputs behind their shots, all as one text; turns of a chat."""
        space = "" if self.space is False else " "
        return self.encode_all([few_shot_text(*prompt, space) for prompt in prompts])

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, up to the first EOS."""
        ids = [int(i) for i in ids]
        if self.unk_id is not None:
            ids = [self.unk_id if i >= self.vocab_size else i for i in ids]
        return self._decode(ids[: ids.index(self.eos_id) + 1] if self.eos_id in ids else ids)

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Returns the text of ids that end in the first EOS, if there is one."""

    def _identity(self) -> tuple[object, ...]:
        template = self.chat_template
        date = template.date if template and template.reads_date else None
        return type(self), self.files.fingerprint, template and template.source, date

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())


def load(name: str) -> Vocabulary:
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
            return ByteVocabulary(files)
        case T5SentencePiece() | SentencePiece():
            return SentencePieceVocabulary(files, space)


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


def describe(vocabulary: Vocabulary, name: str) -> JsonObject:
    """Describes the vocabulary that a checkpoint was trained with, for its manifest.

    Args:
        vocabulary: From `load`.
        name: The name it was loaded by.

    Returns:
        {"name": a path made absolute, "size": number of ids, sentinels included, "fingerprint":
        sha256 in hexadecimal of what decides the ids}: equal for equal vocabularies, wherever
        their files lie, whichever version wrote them, and with or without "chat:".
    """
    return tokenizer_files.describe(name, vocabulary.files)


def settings(vocabulary: Vocabulary) -> dict[str, str]:
    """Says what a vocabulary's name decides of the texts, where it is not as everywhere.

    Returns:
        "chat_date": the date that a chat template which asks for it is told; "target_space":
        whether a space stands between a decoder's inputs and targets, if the name says so.
    """
    named = {}
    template = vocabulary.chat_template
    if template and template.reads_date:
        named["chat_date"] = template.date.isoformat()
    if vocabulary.space is not None:
        named["target_space"] = "space" if vocabulary.space else "none"
    return named


def start_id(vocabulary: Vocabulary) -> int | None:
    """Returns the id that a decoder-only model's rows start with; None for none.

    A tokenizer's own first token where it adds one. T5's vocabularies have none, nor have seqio's:
    the models start with padding, as T5X's decoder-only models do.
    """
    return getattr(vocabulary, "start_id", PAD)


def continuing(vocabulary: Vocabulary) -> Vocabulary:
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
    if not isinstance(vocabulary.files, TokenizerJson | SentencePiece):
        return vocabulary
    space = vocabulary.space
    if vocabulary.chat_template:
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


class ByteVocabulary(Vocabulary):
    """ByT5's: the bytes of a text's UTF-8, after three special ids."""

    _FIRST = 3

    def __init__(self, files: Bytes):
        self.files, self.extra_ids = files, files.extra_ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [[byte + self._FIRST for byte in text.encode()] for text in texts]

    def _decode(self, ids: list[int]) -> str:
        content = bytes(i - self._FIRST for i in ids if self._FIRST <= i < self._FIRST + 256)
        return content.decode(errors="ignore")


class SentencePieceVocabulary(Vocabulary):
    """T5's SentencePiece model with sentinels behind it, or a decoder's own, which has none.

    A decoder's special tokens written in a text are encoded letter by letter, not as in
    transformers.
    """

    def __init__(self, files: T5SentencePiece | SentencePiece, space: bool | None = None):
        self.files, self.space = files, space
        self._pieces = files.processor()
        self.eos_id, self.unk_id = self._pieces.eos_id(), self._pieces.unk_id()
        self.bos_id = self._pieces.bos_id()
        if isinstance(files, T5SentencePiece):
            self.extra_ids = files.extra_ids
        else:
            self.start_id = files.start_id

    @property
    def sentencepiece_model_file(self) -> str:
        """The path of the model."""
        return str(self.files.file)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return self._pieces.EncodeAsIds(list(texts))

    def _decode(self, ids: list[int]) -> str:
        return self._pieces.DecodeIds(ids)


class TokenizerVocabulary(Vocabulary):
    """A tokenizer of Hugging Face's `tokenizers`.

    Special tokens written in a text become their ids, as they do in transformers: chat prompts are
    written so. No text gets a first or last token here; examples get EOS, and `start_id` says what
    a row starts with: nothing, if the chat template writes it. `pad_id` is 0, though 0 may be a
    token: m2l pads with 0 and tells padding by lengths. Ids beyond the vocabulary decode to
    nothing.
    """

    unk_id = None

    def __init__(
        self,
        files: TokenizerJson,
        chat_template: ChatTemplate | None = None,
        space: bool | None = None,
    ):
        self.files, self.chat_template, self.space = files, chat_template, space
        self.eos_id, self.bos_id, self.start_id = files.eos_id, files.start_id, files.start_id
        # A first rendering also shows whether the template works at all.
        if chat_template and self.encode("a")[:1] == [files.start_id]:
            self.start_id = None

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        if self.chat_template:
            texts = [self.chat_template.render(text) for text in texts]
        return self._encode(texts)

    def encode_few_shot(self, prompts: Sequence[Prompted]) -> list[list[int]]:
        if not self.chat_template:
            return super().encode_few_shot(prompts)
        conversations = []
        for inputs, shots in prompts:
            said = [text for shot in shots for text in shot]
            turns = zip(itertools.cycle(("user", "assistant")), [*said, inputs], strict=False)
            conversations.append([{"role": role, "content": text} for role, text in turns])
        return self._encode(list(map(self.chat_template.render_messages, conversations)))

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.files.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def encode_turns(self, turns: Sequence[str]) -> list[int]:
        """Returns the ids of a conversation's prompt; without a chat template, of its last turn."""
        if self.chat_template is None:
            return super().encode_turns(turns)
        roles = itertools.cycle(("user", "assistant"))
        messages = [
            {"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)
        ]
        text = self.chat_template.render_messages(messages)
        return self.files.tokenizer.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int]) -> str:
        if ids and ids[-1] == self.eos_id:
            ids = ids[:-1]
        return self.files.tokenizer.decode(ids, skip_special_tokens=False)


class _Continuing(Vocabulary):
    """Encodes texts with a space before them, and takes it away again where it decodes."""

    def __init__(self, inner: Vocabulary):
        self.inner, self.files = inner, inner.files
        self.eos_id, self.bos_id, self.unk_id = inner.eos_id, inner.bos_id, inner.unk_id
        self.start_id = inner.start_id

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return self.inner.encode_all([text and f" {text}" for text in texts])

    def _decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids).removeprefix(" ")
