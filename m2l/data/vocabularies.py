"""Vocabularies: the one shipped for the microworld, bytes, or a SentencePiece model's file."""

import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

import seqio
from sentencepiece import SentencePieceProcessor

from m2l.errors import DataError

# Sentinels for span corruption, at the end of the vocabulary. T5's own models have 100; the other
# two bring the size to a multiple of 128, which devices like.
T5_EXTRA_IDS = 100
MICROWORLD_EXTRA_IDS = 32
BYTES_EXTRA_IDS = 125

PAD, EOS, UNKNOWN = 0, 1, 2


def load(name: str) -> seqio.Vocabulary:
    """A vocabulary by name.

    Args:
        name: "microworld" (1,024 ids; any text round trips, by bytes where it must), "bytes"
            (ByT5's, 384 ids), or the path of a SentencePiece model such as T5's spiece.model.

    Raises:
        DataError: the file is missing, is no SentencePiece model, or does not number padding, end
            of sequence and unknown 0, 1, 2.
    """
    if name == "bytes":
        return seqio.ByteVocabulary(extra_ids=BYTES_EXTRA_IDS)
    if name == "microworld":
        shipped = resources.files("m2l.tasks") / "microworld" / "vocabulary.model"
        return seqio.SentencePieceVocabulary(str(shipped), extra_ids=MICROWORLD_EXTRA_IDS)
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(
            f"vocabulary {name!r}: there is no such file, and it is not 'microworld' or 'bytes'"
        )
    pieces = SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:
        raise DataError(f"vocabulary {name!r}: the file is not a SentencePiece model") from error
    ids = (pieces.pad_id(), pieces.eos_id(), pieces.unk_id())
    if ids != (PAD, EOS, UNKNOWN):
        raise DataError(
            f"vocabulary {name!r}: it numbers padding, end of sequence and unknown {ids}, not "
            f"{(PAD, EOS, UNKNOWN)}; train it with pad_id=0, eos_id=1, unk_id=2"
        )
    return seqio.SentencePieceVocabulary(str(path.resolve()), extra_ids=T5_EXTRA_IDS)


def describe(vocabulary: seqio.Vocabulary, name: str) -> dict[str, Any]:
    """What a checkpoint's manifest says of the vocabulary it was trained with.

    Args:
        vocabulary: From `load`.
        name: The name it was loaded by.

    Returns:
        {"name": a file's path made absolute, "size": number of ids, sentinels included,
        "fingerprint": sha256 in hexadecimal of what decides the ids}: equal for equal
        vocabularies, wherever their files lie.
    """
    digest = hashlib.sha256()
    digest.update(f"{type(vocabulary).__name__} extra_ids={vocabulary.extra_ids}\n".encode())
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        digest.update(Path(vocabulary.sentencepiece_model_file).read_bytes())
    shipped = name in ("bytes", "microworld")
    return {
        "name": name if shipped else str(Path(name).expanduser().resolve()),
        "size": vocabulary.vocab_size,
        "fingerprint": digest.hexdigest(),
    }
