"""Comparison of the tokenizers of two directories, whatever their files are."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import tokenizers
from sentencepiece import SentencePieceProcessor

from m2l.data.tokenizer_files import read, read_settings, without_defaults
from m2l.errors import DataError
from m2l.files import BYTES_TOKENIZER, TOKENIZER_FILES, TOKENIZER_JSON, TOKENIZER_SETTINGS
from m2l.typing import Json

_SHOWN = 3
# A token and its ids in two tokenizers.
_IdPair = tuple[str, int | None, int | None]

# Of the parts of a tokenizer.json, what changes no id.
_NO_IDS = ("trim_offsets", "dropout", "special", "normalized")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """What decides the ids that a text becomes.

    Attributes:
        file: Where it was read from.
        ids: The id of each token, added ones included.
        added: The tokens that are found in a text before it is cut up, with the options that say
            how; None where the files do not say which there are.
        merges: Pairs of tokens in the order in which they are joined; None for other models.
        scores: The score of each piece of a unigram model; None for other models.
        rules: How a text is normalised and cut up; None where the files do not say.
    """

    file: Path
    ids: Mapping[str, int]
    added: Mapping[str, Json] | None = None
    merges: tuple[tuple[str, ...], ...] | None = None
    scores: Mapping[str, float] | None = None
    rules: Mapping[str, Json] | None = None


def difference(one: Path, other: Path) -> str | None:
    """Returns in words what differs between the tokenizers of two directories; None if nothing.

    Kinds of files that both have are compared with each other; where there are none, a tokenizer
    of one kind is compared with one of the other kind by its tokens' ids, and by the merges where
    both have them.

    Raises:
        DataError: A file is damaged.
    """
    first, second = _files(one), _files(other)
    shared = [kind for kind in first if kind in second]
    if not first or not second:
        return "there are no files of one that could be compared" if first or second else None
    if not shared:
        return _differing(*(_read(next(iter(files.values()))) for files in (first, second)))
    for kind in shared:
        left, right = first[kind].read_bytes(), second[kind].read_bytes()
        if left == right and _merges_file(first[kind]) == _merges_file(second[kind]):
            _check_object(first[kind])
        elif (result := _differing(_read(first[kind]), _read(second[kind]))) is not None:
            return result
    return None


def _files(directory: Path) -> dict[str, Path]:
    """Returns kind -> file of a directory's tokenizers: names, but "*.model" for one alone."""
    names = dict.fromkeys(f for pattern in TOKENIZER_FILES for f in sorted(directory.glob(pattern)))
    pieces = [file for file in names if file.suffix in (".model", ".spm")]
    settings = directory / TOKENIZER_SETTINGS[0]
    if not names and read_settings(settings).get("tokenizer_class") == BYTES_TOKENIZER:
        return {settings.name: settings}
    return {"*.model" if pieces == [file] else file.name: file for file in names}


def _merges_file(vocabulary: Path) -> bytes:
    file = vocabulary.with_name("merges.txt")
    return file.read_bytes() if vocabulary.name == "vocab.json" and file.is_file() else b""


def _check_object(file: Path) -> None:
    if file.suffix != ".json":
        return
    content = read_settings(file)
    if file.name == TOKENIZER_JSON and not isinstance(content.get("model"), dict):
        raise DataError(f"{file}: damaged: it describes no model of a tokenizer")


def _read(file: Path) -> Tokenizer:
    if file.name == TOKENIZER_JSON:
        status = file.stat()
        return _read_tokenizer_json(file, status.st_mtime_ns, status.st_size)
    if file.suffix in (".model", ".spm"):
        return _read_pieces(file)
    if file.name == TOKENIZER_SETTINGS[0]:
        bytes_ = read(str(file.parent))
        return Tokenizer(file, {f"<{index}>": index for index in range(bytes_.size)})
    if file.name == "vocab.txt":
        tokens = file.read_text(encoding="utf-8", errors="replace").split("\n")
        ids = {token.rstrip("\r"): index for index, token in enumerate(tokens) if token}
        return _with_added(file, ids)
    if file.name == "vocab.json":
        lines = _merges_file(file).decode(errors="replace").splitlines()
        merges = tuple(
            tuple(line.split()) for line in lines if line and not line.startswith("#version")
        )
        return _with_added(file, _integers(file, read_settings(file)), merges=merges or None)
    return Tokenizer(file, {})


def _integers(file: Path, ids: Mapping[str, Json]) -> dict[str, int]:
    if any(type(value) is not int for value in ids.values()):
        raise DataError(f"{file}: damaged: it does not give each token a number")
    return dict(ids)


def _with_added(file: Path, ids: Mapping[str, int], **parts: Json) -> Tokenizer:
    """Returns a tokenizer of the slow kind, whose added tokens are listed in files of their own."""
    own = file.with_name("added_tokens.json")
    added = _integers(own, read_settings(own))
    listed = read_settings(file.with_name("tokenizer_config.json")).get("added_tokens_decoder")
    for number, token in listed.items() if isinstance(listed, Mapping) else ():
        if isinstance(token, Mapping) and number.isdecimal():
            added[str(token.get("content"))] = int(number)
    return Tokenizer(file, {**ids, **added}, **parts)


def _read_pieces(file: Path) -> Tokenizer:
    pieces = SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(file.read_bytes())
    except RuntimeError as error:
        raise DataError(f"{file}: it is not a SentencePiece model") from error
    size = pieces.GetPieceSize()
    return _with_added(
        file,
        {pieces.IdToPiece(index): index for index in range(size)},
        scores={pieces.IdToPiece(index): pieces.GetScore(index) for index in range(size)},
    )


@functools.lru_cache(maxsize=2)
def _read_tokenizer_json(file: Path, changed: int, length: int) -> Tokenizer:
    """Reads a file, which many are compared with, once for as long as it does not change."""
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # it raises nothing more special
        raise DataError(
            f"{file}: not one that tokenizers {tokenizers.__version__} reads "
            f"({str(error).splitlines()[0]:.200})"
        ) from error
    # As this version writes it, whichever wrote the file.
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    vocabulary, merges = model.pop("vocab", {}), model.pop("merges", None)
    unigram = isinstance(vocabulary, list)
    return Tokenizer(
        file,
        tokenizer.get_vocab(with_added_tokens=True),
        added={
            token["content"]: _deciding({**token, "content": None})
            for token in content["added_tokens"] or ()
        },
        merges=None
        if merges is None
        else tuple(tuple(m.split(" ") if isinstance(m, str) else m) for m in merges),
        scores=dict(vocabulary) if unigram else None,
        rules=_deciding(
            {"model": model} | {part: content[part] for part in ("normalizer", "pre_tokenizer")}
        ),
    )


def _deciding(value: Json) -> Json:
    """Returns a part of a tokenizer.json without defaults and without what changes no id."""
    if isinstance(value, list):
        return [_deciding(item) for item in value]
    if not isinstance(value, dict):
        return value
    parts = {key: _deciding(item) for key, item in value.items() if key not in _NO_IDS}
    return without_defaults(parts)


def _differing(one: Tokenizer, other: Tokenizer) -> str | None:
    pair = f"{one.file.name} and {other.file.name}"
    if not one.ids or not other.ids:
        return f"{pair} differ, and what is in them cannot be compared"
    if named := _named(_differing_ids(one, other)):
        return f"by {pair}, {named}"
    if one.merges is not None and other.merges is not None and one.merges != other.merges:
        pairs = zip(one.merges, other.merges, strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if place is None:
            return f"{pair} have {len(one.merges)} and {len(other.merges)} merges"
        first, second = (" ".join(each.merges[place]) for each in (one, other))
        return f"by {pair}, merge {place} is {first!r} and {second!r}"
    if one.added is not None and other.added is not None and one.added != other.added:
        tokens = [t for t in {**one.added, **other.added} if one.added.get(t) != other.added.get(t)]
        return f"{pair} treat the added token {tokens[0]!r} differently"
    if one.rules is not None and other.rules is not None and one.rules != other.rules:
        parts = [p for p in {**one.rules, **other.rules} if one.rules.get(p) != other.rules.get(p)]
        return f"{pair} differ in their {' and '.join(parts)}"
    if one.scores is not None and other.scores is not None:
        for piece in one.scores.keys() & other.scores.keys():
            if not math.isclose(one.scores[piece], other.scores[piece], rel_tol=1e-5, abs_tol=1e-6):
                return f"{pair} give {piece!r} different scores"
    return None


def _differing_ids(one: Tokenizer, other: Tokenizer) -> Iterator[_IdPair]:
    """Tokens whose ids differ, with the two ids; None where a tokenizer has no such token."""
    mixed, offset = one.file.suffix != other.file.suffix, 0
    added = {**(one.added or {}), **(other.added or {})} if mixed else {}
    if mixed:
        # Some families number the pieces of a file behind tokens of their own, and a file of
        # pieces says nothing of the tokens that are added.
        shared = [t for t in one.ids if t in other.ids and t not in added and _is_piece(t)]
        offset = other.ids[shared[-1]] - one.ids[shared[-1]] if shared else 0
    for token in sorted(
        one.ids.keys() | other.ids.keys(), key=lambda t: (one.ids.get(t, -1), other.ids.get(t, -1))
    ):
        first, second = one.ids.get(token), other.ids.get(token)
        if mixed and (token in added or not _is_piece(token)):
            continue
        if first is None or second is None or first + offset != second:
            yield token, first, second


def _is_piece(token: str) -> bool:
    """Returns whether a token is cut from a text, and not one that families number as they like."""
    return not (token.startswith(("<", "[")) and token.endswith((">", "]")))


def _named(tokens: Iterator[_IdPair]) -> str:
    def spell(number: int | None) -> str:
        return "missing" if number is None else str(number)

    rows = list(tokens)
    named = [f"{token!r} is {spell(a)} and {spell(b)}" for token, a, b in rows[:_SHOWN]]
    return ", ".join(named) + (f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")
