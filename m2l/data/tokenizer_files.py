"""The files of a vocabulary, read without seqio and TensorFlow, which take seconds to load."""

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path

import tokenizers
from sentencepiece import SentencePieceProcessor

from m2l import files, storage
from m2l.errors import DataError
from m2l.files import (
    BYTES,
    BYTES_TOKENIZER,
    EXTRA_IDS,
    MICROWORLD,
    SPIECE,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    TOKENIZER_SETTINGS,
    microworld_pieces,
    split_name,
)
from m2l.typing import Json, JsonObject

# Sentinels for span corruption at the end of the vocabulary: of T5's own models, and of ours.
T5_EXTRA_IDS = 100
MICROWORLD_EXTRA_IDS = EXTRA_IDS[MICROWORLD]

PAD, EOS, UNKNOWN = 0, 1, 2


# Of each kind, `size` is how many ids there are, sentinels included, and `fingerprint` the SHA-256,
# in hex, of what decides the ids.


@dataclasses.dataclass(frozen=True)
class Bytes:
    """ByT5's ids: three special ones, 256 bytes, sentinels."""

    extra_ids: int

    @property
    def size(self) -> int:
        return 3 + 256 + self.extra_ids

    @property
    def fingerprint(self) -> str:
        return _sha256(f"ByteVocabulary extra_ids={self.extra_ids}\n")


@dataclasses.dataclass(frozen=True)
class T5SentencePiece:
    """A SentencePiece model with T5's numbering, pad 0, eos 1, unk 2, and sentinels behind it."""

    file: Path
    extra_ids: int

    @functools.cached_property
    def size(self) -> int:
        return _pieces(self.file).GetPieceSize() + self.extra_ids

    def processor(self) -> SentencePieceProcessor:
        """Returns the model with its sentinels as pieces, numbered from the end, as seqio's."""
        names = [f"▁<extra_id_{number}>" for number in reversed(range(self.extra_ids))]
        return _pieces(self.file, b"".join(map(_user_defined, names)))

    @property
    def fingerprint(self) -> str:
        head = f"SentencePieceVocabulary extra_ids={self.extra_ids}\n"
        return _sha256(head, self.file.read_bytes())


@dataclasses.dataclass(frozen=True)
class SentencePiece:
    """A decoder's SentencePiece model, such as Llama 2's: unk 0, bos 1, eos 2, no padding.

    Attributes:
        file: The model.
        start_id: What a text begins with, if with anything.
    """

    file: Path
    start_id: int | None

    @functools.cached_property
    def size(self) -> int:
        return _pieces(self.file).GetPieceSize()

    def processor(self) -> SentencePieceProcessor:
        """Returns the model as it is."""
        return _pieces(self.file)

    @property
    def fingerprint(self) -> str:
        return _sha256(f"SentencePiece start_id={self.start_id}\n", self.file.read_bytes())


@dataclasses.dataclass(frozen=True)
class TokenizerJson:
    """A tokenizer of Hugging Face's `tokenizers`.

    Attributes:
        tokenizer: The tokenizer, neither truncating nor padding.
        eos_id: What a text ends with.
        start_id: What a text begins with, if with anything.
        special_tokens: The texts of its special tokens by role, as "bos_token".
        size: The highest id, plus one.
        ids_digest: SHA-256, in hex, of the parts that turn texts into ids.
    """

    tokenizer: tokenizers.Tokenizer
    eos_id: int
    start_id: int | None
    special_tokens: dict[str, str]
    size: int
    ids_digest: str

    @property
    def fingerprint(self) -> str:
        ends = f"eos_id={self.eos_id} start_id={self.start_id}"
        return _sha256(f"tokenizer.json {ends} {self.ids_digest}\n")


Files = Bytes | T5SentencePiece | SentencePiece | TokenizerJson


def _sha256(head: str, content: bytes = b"") -> str:
    return hashlib.sha256(head.encode() + content).hexdigest()


def read(name: str) -> Files:
    """Reads what a vocabulary's name stands for; see `vocabularies.load` for the names.

    Raises:
        DataError: there is no such file or directory, it holds no tokenizer, or one that cannot be
            used.
    """
    plain = split_name(name)[1]
    if plain == BYTES:
        return Bytes(EXTRA_IDS[BYTES])
    if plain == MICROWORLD:
        return T5SentencePiece(microworld_pieces(), MICROWORLD_EXTRA_IDS)
    file = main_file(name)
    if file.name == TOKENIZER_SETTINGS[0]:
        return Bytes(_extra_ids(file, EXTRA_IDS[BYTES]))
    if file.suffix == ".json":
        return _tokenizer_json(name, file)
    pieces = _checked_pieces(name, file)
    if file.name == TOKENIZER_MODEL:
        return SentencePiece(file, _start_of_pieces(name, file, pieces))
    ids = (pieces.pad_id(), pieces.eos_id(), pieces.unk_id())
    if ids != (PAD, EOS, UNKNOWN):
        raise DataError(
            f"vocabulary {name!r}: it numbers padding, end of sequence and unknown {ids}, not "
            f"{(PAD, EOS, UNKNOWN)}; train it with pad_id=0, eos_id=1, unk_id=2"
        )
    # mT5's model has its sentinels as pieces: a hundred more would not fit its embeddings.
    own = any(
        pieces.PieceToId(piece) != pieces.unk_id() for piece in ("<extra_id_0>", "▁<extra_id_0>")
    )
    settings = file.with_name(TOKENIZER_SETTINGS[0])
    return T5SentencePiece(file, 0 if own else _extra_ids(settings, T5_EXTRA_IDS))


def _extra_ids(settings: Path, default: int) -> int:
    """Returns how many sentinels a tokenizer_config.json says there are."""
    extra_ids = read_settings(settings).get("extra_ids", default)
    if type(extra_ids) is not int or extra_ids < 0:
        raise DataError(f"{settings}: extra_ids = {extra_ids!r}: a number from 0 was expected")
    return extra_ids


def absolute(name: str) -> str:
    """Returns a vocabulary's name with its path, if it has one, made absolute."""
    prefixes, plain = split_name(name)
    if plain in (BYTES, MICROWORLD):
        return name
    path = storage.path(plain).expanduser()
    return f"{prefixes}{os.path.abspath(path) if isinstance(path, Path) else path}"


def describe(name: str, files: Files | None = None) -> JsonObject:
    """Describes a vocabulary for a checkpoint's manifest; loads neither seqio nor TensorFlow.

    Args:
        name: What `vocabularies.load` takes.
        files: What `read` makes of the name, if that is known.

    Returns:
        {"name": with an absolute path, "size": number of ids, sentinels included, "fingerprint"};
        a copy of a vocabulary that comes with m2l goes by its name.

    Raises:
        DataError: as `read`.
    """
    files = read(name) if files is None else files
    shipped = {read(each).fingerprint: each for each in (BYTES, MICROWORLD)}
    known = shipped.get(files.fingerprint)
    full = split_name(name)[0] + known if known else absolute(name)
    return {"name": full, "size": files.size, "fingerprint": files.fingerprint}


def main_file(name: str) -> Path:
    """Returns the file that decides the ids of the vocabulary at a path.

    Raises:
        DataError: there is no such file or directory, or the directory holds no tokenizer.
    """
    # Links are not followed: Hugging Face's cache gives files their names by them.
    path = storage.download(storage.path(split_name(absolute(name))[1]))
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(
            f"vocabulary {name!r}: there is no such file or directory, and it is not "
            f"{MICROWORLD!r} or {BYTES!r}"
        )
    for file in (SPIECE, TOKENIZER_JSON, TOKENIZER_MODEL):
        if (path / file).is_file():
            return path / file
    settings = path / TOKENIZER_SETTINGS[0]
    if read_settings(settings).get("tokenizer_class") == BYTES_TOKENIZER:
        return settings
    raise DataError(
        f"vocabulary {name!r}: the directory holds none of {SPIECE}, {TOKENIZER_JSON} and "
        f"{TOKENIZER_MODEL}; transformers writes a {TOKENIZER_JSON} from other files: "
        "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    )


def read_settings(file: Path) -> JsonObject:
    """Reads the JSON object in a file next to a tokenizer; an empty one if there is no such file.

    Raises:
        DataError: it is damaged.
    """
    if not file.is_file():
        return {}
    return files.read_json(file, kind=dict, advice="download it again")


def _pieces(file: Path, more: bytes = b"") -> SentencePieceProcessor:
    pieces = SentencePieceProcessor()
    # Protocol buffers one after the other are one, with the repeated fields of both.
    pieces.LoadFromSerializedProto(file.read_bytes() + more)
    return pieces


def _user_defined(piece: str) -> bytes:
    """Returns a ModelProto of one piece: its text, the score 0.0, the type USER_DEFINED."""
    text = piece.encode()
    fields = b"\x0a" + bytes([len(text)]) + text + b"\x15" + bytes(4) + b"\x18\x04"
    return b"\x0a" + bytes([len(fields)]) + fields


def _checked_pieces(name: str, file: Path) -> SentencePieceProcessor:
    try:
        return _pieces(file)
    except RuntimeError as error:
        file_name = "the file" if file.name in name else file.name
        raise DataError(f"vocabulary {name!r}: {file_name} is not a SentencePiece model") from error


def _start_of_pieces(name: str, file: Path, pieces: SentencePieceProcessor) -> int | None:
    if pieces.eos_id() < 0:
        raise DataError(f"vocabulary {name!r}: {file.name} has no piece for the end of a text")
    wanted = read_settings(file.with_name("tokenizer_config.json")).get("add_bos_token", True)
    return pieces.bos_id() if wanted and pieces.bos_id() >= 0 else None


def _tokenizer_json(name: str, file: Path) -> TokenizerJson:
    status = file.stat()
    try:
        tokenizer, size, ids_digest = _tokenizer(file, status.st_mtime_ns, status.st_size)
    except Exception as error:  # it raises nothing more special
        raise DataError(
            f"vocabulary {name!r}: {file.name} is not one that tokenizers {tokenizers.__version__} "
            f"reads ({str(error).splitlines()[0]:.200})"
        ) from error
    config = read_settings(file.with_name("tokenizer_config.json"))
    # The first that names a token says what it is.
    special = special_tokens(read_settings(file.with_name("special_tokens_map.json")))
    special |= special_tokens(config)
    eos_id = _special_id(name, file, tokenizer, special, "eos")
    if eos_id is None:
        raise DataError(
            f"vocabulary {name!r}: nothing says which token ends a text; put "
            f'"eos_token" into {file.with_name("tokenizer_config.json")}'
        )
    # As transformers 5: what the settings say outweighs the tokenizer's own post-processor.
    adds_bos = config.get("add_bos_token")
    if adds_bos is None:
        start_id = _put_first(name, tokenizer)
    else:
        start_id = _special_id(name, file, tokenizer, special, "bos") if adds_bos else None
    return TokenizerJson(tokenizer, eos_id, start_id, special, size, ids_digest)


@functools.lru_cache(maxsize=4)
def _tokenizer(file: Path, changed: int, length: int) -> tuple[tokenizers.Tokenizer, int, str]:
    """Reads a tokenizer, its size and its `ids_digest`, once while its file is the same."""
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # The version that wrote the file does not count, as little as the settings it did not know.
    content = json.loads(tokenizer.to_str())
    parts = ("added_tokens", "normalizer", "pre_tokenizer", "model")
    ids = without_defaults({part: content[part] for part in parts})
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return tokenizer, size, _sha256(json.dumps(ids, sort_keys=True))


def without_defaults(value: Json) -> Json:
    """Returns a part of a tokenizer.json without what is null or false in it."""
    if isinstance(value, list):
        return [without_defaults(item) for item in value]
    if not isinstance(value, dict):
        return value
    # The vocabulary and the merges are large, and hold neither.
    return {
        key: item if key in ("vocab", "merges") else without_defaults(item)
        for key, item in value.items()
        if item is not None and item is not False
    }


def special_tokens(settings: JsonObject) -> dict[str, str]:
    """Returns the special tokens of a tokenizer's settings: their texts by role."""
    roles = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    entries = {f"{role}_token": settings.get(f"{role}_token") for role in roles}
    texts = {role: t.get("content") if isinstance(t, dict) else t for role, t in entries.items()}
    return {role: text for role, text in texts.items() if isinstance(text, str) and text}


def _special_id(
    name: str, file: Path, tokenizer: tokenizers.Tokenizer, special: dict[str, str], role: str
) -> int | None:
    if token := special.get(f"{role}_token"):
        if (token_id := tokenizer.token_to_id(token)) is None:
            raise DataError(
                f"vocabulary {name!r}: its {role}_token {token!r} is not in {file.name}; load and "
                "save it with transformers once, which adds it"
            )
        return token_id
    # GPT-2's tokenizer leaves it to the model's settings.
    for other in ("generation_config.json", "config.json"):
        token_id = read_settings(file.with_name(other)).get(f"{role}_token_id")
        token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
        if isinstance(token_id, int):
            return token_id
    return None


def _put_first(name: str, tokenizer: tokenizers.Tokenizer) -> int | None:
    """Returns the id that the tokenizer's post-processor puts in front of a text."""
    bare, whole = (tokenizer.encode("a", add_special_tokens=add).ids for add in (False, True))
    for place in range(len(whole) - len(bare) + 1):
        if whole[place : place + len(bare)] == bare:
            if place > 1:
                raise DataError(
                    f"vocabulary {name!r}: it puts {place} ids in front of every text, and a row "
                    "starts with one at most"
                )
            return whole[0] if place else None
    return None
