"""The tokens of tokenizers with their ids, and a tokenizer that is extended by others' tokens."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers

from m2l.data import tokenizer_files
from m2l.data.tokenizer_files import read_settings
from m2l.errors import DataError
from m2l.files import SPIECE, TOKENIZER_JSON, TOKENIZER_MODEL, TOKENIZER_SETTINGS, sha256
from m2l.typing import Json, JsonObject

if TYPE_CHECKING:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

BYTES_KIND = "ByT5"


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """The tokens of a tokenizer.

    Attributes:
        file: What decides the ids.
        kind: What tokenizers have in common whose tokens mean the same: "BPE of bytes".
        ids: Token -> id, in the order of ids, added ones included.
        special: Special token -> its role, as "eos_token", or "special token".
        content: A tokenizer.json as its library writes it; None for other files.
    """

    file: Path
    kind: str
    ids: Mapping[str, int]
    special: Mapping[str, str]
    content: JsonObject | None = None

    def below(self, rows: int) -> "TokenTable":
        """Returns the tokens that an embedding of so many rows has."""
        if max(self.ids.values(), default=-1) < rows:
            return self
        ids = {token: index for token, index in self.ids.items() if index < rows}
        return dataclasses.replace(self, ids=ids)


def read(directories: Sequence[Path]) -> list[TokenTable]:
    """Reads tokenizers from a kind of files that all directories have.

    Raises:
        DataError: There is no such kind, a file is damaged, or tokenizers are of unlike kinds.
    """
    if all((directory / TOKENIZER_JSON).is_file() for directory in directories):
        tables = _read_json([directory / TOKENIZER_JSON for directory in directories])
    else:
        files = [_pieces_file(directory) for directory in directories]
        tables = [_read_pieces(file) for file in files if file is not None]
        if not any(files):
            tables = [_read_bytes(directory) for directory in directories]
        elif None in files:
            one = directories[files.index(None)]
            other = next(file for file in files if file is not None)
            raise DataError(
                f"{one} and {other}: tokenizers of unlike files; save both with transformers "
                f"(AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)), which writes a "
                f"{TOKENIZER_JSON}"
            )
    for table in tables[1:]:
        if table.kind != tables[0].kind:
            raise DataError(
                f"{table.file}: a tokenizer of another kind, {table.kind}, than {tables[0].file}, "
                f"{tables[0].kind}: their tokens do not mean the same"
            )
    return tables


def _pieces_file(directory: Path) -> Path | None:
    files = (directory / name for name in (SPIECE, TOKENIZER_MODEL))
    return next((file for file in files if file.is_file()), None)


def _read_json(files: Sequence[Path]) -> list[TokenTable]:
    """Reads files, of which many may be the same."""
    parsed: dict[str, TokenTable] = {}
    tables = []
    for file in files:
        digest = sha256(file)
        if digest not in parsed:
            parsed[digest] = _parse(file)
        special = parsed[digest].special | _roles(file)
        tables.append(dataclasses.replace(parsed[digest], file=file, special=special))
    return tables


def _parse(file: Path) -> TokenTable:
    content = read_settings(file)
    ids = _listed_ids(content)
    if ids is None:
        # Written by an older version or by hand: as the library has it.
        tokenizer = _loaded(file)
        content = json.loads(tokenizer.to_str())
        ids = tokenizer.get_vocab(with_added_tokens=True)
    model = content["model"]
    kind = model["type"]
    if kind == "BPE":
        parts = json.dumps([content["pre_tokenizer"], content["normalizer"]])
        kind = "BPE of bytes" if '"ByteLevel"' in parts else "BPE of characters"
    marks = [model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix")]
    kind += "".join(f" with {mark!r}" for mark in marks if mark)
    special = {t["content"]: "special token" for t in content["added_tokens"] if t.get("special")}
    return TokenTable(file, kind, _ordered(ids), special, content)


def _loaded(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # it raises nothing more special
        raise DataError(
            f"{file}: not one that tokenizers {tokenizers.__version__} reads "
            f"({str(error).splitlines()[0]:.200})"
        ) from error


def _listed_ids(content: Mapping[str, Json]) -> dict[str, int] | None:
    """Returns the ids that a tokenizer.json lists; None if the library may read others in it."""
    match content:
        case {
            "model": {"type": str(), "vocab": dict() | list() as vocabulary},
            "added_tokens": list(added),
            "normalizer": _,
            "pre_tokenizer": _,
        }:
            if isinstance(vocabulary, list):
                ids = {str(piece[0]): index for index, piece in enumerate(vocabulary)}
            else:
                ids = dict(vocabulary)
        case _:
            return None
    size = following = len(ids)
    for token in added:
        text, index = token["content"], token["id"]
        # What is no piece of the model is numbered as it comes, whatever is written.
        if index != ids.get(text, following):
            return None
        ids[text] = index
        following = max(following, index + 1, size)
    return ids


def _roles(file: Path) -> dict[str, str]:
    roles = {}
    for name in ("special_tokens_map.json", TOKENIZER_SETTINGS[0]):
        settings = tokenizer_files.special_tokens(read_settings(file.with_name(name)))
        roles |= {text: role for role, text in settings.items()}
    return roles


def _ordered(ids: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(ids.items(), key=lambda item: item[1]))


def _read_bytes(directory: Path) -> TokenTable:
    size = tokenizer_files.read(str(directory)).size
    ids = {f"<{index}>": index for index in range(size)}
    return TokenTable(directory / TOKENIZER_SETTINGS[0], BYTES_KIND, ids, {})


def _proto(file: Path) -> "ModelProto":
    # Generated code, which declares its names in protobuf's own registry.
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf's own class, which is not imported here
        raise DataError(f"{file}: it is not a SentencePiece model") from error
    return proto


def _read_pieces(file: Path) -> TokenTable:
    proto = _proto(file)
    kind = {1: "unigram", 2: "BPE"}.get(proto.trainer_spec.model_type, "other")
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    special = {p.piece: "special token" for p in proto.pieces if p.type in (2, 3)}
    for token, index in _behind(file, len(proto.pieces)).items():
        ids.setdefault(token, index)
    return TokenTable(file, f"SentencePiece {kind}", _ordered(ids), special | _roles(file))


def _behind(file: Path, size: int) -> dict[str, int]:
    """Returns the ids of tokens that come behind a model's pieces: sentinels, added tokens."""
    ids: dict[str, int] = {}
    if file.name == SPIECE:
        described = tokenizer_files.read(str(file))
        extra_ids = getattr(described, "extra_ids", 0)
        ids |= {f"<extra_id_{n}>": size + extra_ids - 1 - n for n in reversed(range(extra_ids))}
    for token, index in read_settings(file.with_name("added_tokens.json")).items():
        ids[token] = index
    listed = read_settings(file.with_name(TOKENIZER_SETTINGS[0])).get("added_tokens_decoder")
    for number, token in listed.items() if isinstance(listed, Mapping) else ():
        if isinstance(token, Mapping) and number.isdecimal() and int(number) >= size:
            ids[str(token.get("content"))] = int(number)
    return ids


def extended(
    table: TokenTable, additional: Sequence[TokenTable], more: Sequence[str] = ()
) -> tuple[dict[str, bytes | None], dict[str, int]]:
    """Adds to a tokenizer the tokens of others that it lacks; its own ids stay, but for sentinels.

    New pieces come first, then added tokens, each in the order of these and of their ids; the
    merges that a BPE lacks follow its own, so that it cuts a text as before and then joins on.
    Sentinels behind SentencePiece's pieces move up.

    Args:
        table: The tokenizer.
        additional: Those whose tokens are added.
        more: Further tokens to add, which are found in a text before it is cut up.

    Returns:
        The files to write and, as None, those to leave out, by name; and token -> id.

    Raises:
        DataError: Tokenizers of this kind cannot be extended.
    """
    lacking = any(token not in table.ids for other in additional for token in other.ids)
    own = {} if table.content is None else _added(table)
    marked = table.content is not None and any(
        token not in own for other in additional for token in _added(other)
    )
    if not lacking and not marked and all(token in table.ids for token in more):
        return {}, dict(table.ids)
    if table.content is not None:
        return _extended_json(table, additional, more)
    if table.kind == BYTES_KIND:
        raise DataError(f"{table.file}: ByT5's tokenizer cannot be extended by further tokens")
    return _extended_pieces(table, additional, more)


def _added(table: TokenTable) -> dict[str, JsonObject]:
    entries = table.content["added_tokens"]
    return {entry["content"]: entry for entry in entries if entry["content"] in table.ids}


def _extended_json(
    table: TokenTable, additional: Sequence[TokenTable], more: Sequence[str]
) -> tuple[dict[str, bytes | None], dict[str, int]]:
    model = dict(table.content["model"])
    content, ids = table.content | {"model": model}, dict(table.ids)
    pieces: dict[str, float | None] = {}
    for other in additional:
        scores = dict(other.content["model"]["vocab"])
        added = _added(other)
        for token in other.ids:
            if token not in ids and token not in added:
                pieces.setdefault(token, scores.get(token))
    entries = {entry["content"]: entry for entry in content["added_tokens"]}
    new = {token: entry for other in reversed(additional) for token, entry in _added(other).items()}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    order = [token for other in additional for token in _added(other)]
    for token in (*order, *(token for token in more if token not in ids)):
        # The first who has it says how it is found.
        entries.setdefault(token, new.get(token, plain | {"normalized": False, "content": token}))
    free = iter(range(max(ids.values(), default=-1) + 1, 1 << 32))
    for token in (*pieces, *entries):
        if token not in ids:
            ids[token] = next(free)
    if isinstance(model["vocab"], list):
        # A list of pieces, which has a place for each id.
        by_id = {index: token for token, index in ids.items()}
        last = max((ids[token] for token in pieces), default=-1)
        scores = pieces | dict.fromkeys(entries, 0.0)
        places = range(len(model["vocab"]), last + 1)
        model["vocab"] = model["vocab"] + [[by_id[index], scores[by_id[index]]] for index in places]
    else:
        model["vocab"] = model["vocab"] | {token: ids[token] for token in (*pieces, *entries)}
    if "merges" in model:
        model["merges"] = list(_joined_merges(table, additional, ids))
    content["added_tokens"] = sorted(
        ({**entry, "id": ids[token]} for token, entry in entries.items()), key=lambda e: e["id"]
    )
    text = json.dumps(content, ensure_ascii=False)
    # The library numbers some tokens itself.
    if tokenizers.Tokenizer.from_str(text).get_vocab(with_added_tokens=True) != ids:
        raise DataError(
            f"{table.file}: cannot be extended: its ids have gaps; load and save it with "
            "transformers"
        )
    settings = read_settings(table.file.with_name(TOKENIZER_SETTINGS[0]))
    changed: dict[str, bytes | None] = dict.fromkeys(
        (SPIECE, TOKENIZER_MODEL, "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
    )
    changed[TOKENIZER_JSON] = text.encode()
    if isinstance(listed := settings.get("added_tokens_decoder"), dict):
        listed |= {
            str(ids[token]): {name: value for name, value in entry.items() if name != "id"}
            for token, entry in entries.items()
            if str(ids[token]) not in listed
        }
        changed[TOKENIZER_SETTINGS[0]] = (json.dumps(settings, indent=2) + "\n").encode()
    return changed, ids


def _joined_merges(
    table: TokenTable, additional: Sequence[TokenTable], ids: Mapping[str, int]
) -> Iterator[list[str]]:
    """Yields the pairs that a BPE joins: its own first, then what others join besides."""
    seen: set[tuple[str, ...]] = set()
    for each in (table, *additional):
        prefix = each.content["model"].get("continuing_subword_prefix") or ""
        for merge in each.content["model"]["merges"]:
            pair = tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
            whole = pair[0] + pair[1].removeprefix(prefix)
            if pair not in seen and all(token in ids for token in (*pair, whole)):
                seen.add(pair)
                yield list(pair)


def _extended_pieces(
    table: TokenTable, additional: Sequence[TokenTable], more: Sequence[str]
) -> tuple[dict[str, bytes | None], dict[str, int]]:
    proto = _proto(table.file)
    size, bpe = len(proto.pieces), table.kind.endswith("BPE")
    lowest = min((piece.score for piece in proto.pieces), default=0.0)
    seen = set(table.ids)
    for other in additional:
        for token, piece in zip(other.ids, _proto(other.file).pieces, strict=False):
            if token not in seen:
                seen.add(token)
                proto.pieces.add().CopyFrom(piece)
                if bpe:
                    # The scores are the order in which pieces are joined: behind one's own.
                    lowest -= 1.0
                    proto.pieces[-1].score = lowest
    for token in (*(token for other in additional for token in other.ids), *more):
        if token not in seen:
            seen.add(token)
            proto.pieces.add(piece=token, score=0.0, type=4)
    grown = len(proto.pieces) - size
    proto.trainer_spec.vocab_size = len(proto.pieces)
    ids = {t: index + grown * (index >= size) for t, index in table.ids.items()}
    ids |= {piece.piece: index for index, piece in enumerate(proto.pieces) if index >= size}
    # A tokenizer.json next to it would have other ids.
    changed: dict[str, bytes | None] = {TOKENIZER_JSON: None}
    changed[table.file.name] = proto.SerializeToString()
    added = read_settings(table.file.with_name("added_tokens.json"))
    settings = read_settings(table.file.with_name(TOKENIZER_SETTINGS[0]))
    if added:
        moved = {token: ids.get(token, index) for token, index in added.items()}
        changed["added_tokens.json"] = json.dumps(moved).encode()
    if isinstance(listed := settings.get("added_tokens_decoder"), dict):
        settings["added_tokens_decoder"] = {
            str(ids.get(str(entry.get("content")), number)): entry
            for number, entry in listed.items()
        }
        changed[TOKENIZER_SETTINGS[0]] = (json.dumps(settings, indent=2) + "\n").encode()
    return changed, _ordered(ids)
