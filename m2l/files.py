"""JSON files that appear whole or not at all, digests of files, and folders of one run or study."""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from m2l import storage
from m2l.errors import ConfigError, DataError, M2LError
from m2l.storage import AnyPath
from m2l.typing import Json, JsonObject

# A tokenizer's directory: what decides the ids, by precedence, and what is read with it. Data
# reads these and checkpoints carry them, and neither may import the other.
GENERATION = "generation_config.json"
SPIECE, TOKENIZER_JSON, TOKENIZER_MODEL = "spiece.model", "tokenizer.json", "tokenizer.model"
# Patterns of all that decides the ids by any of transformers' tokenizers; ByT5's has no such file.
TOKENIZER_FILES = (
    TOKENIZER_JSON,
    "vocab.json",
    "vocab.txt",
    "*.model",
    "*.model.v*",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "vocab.bpe",
    "vocab-*.json",
    "bpe.codes",
    "entity_vocab.json",
    "dict.txt",
    "prophetnet.tokenizer",
)
TOKENIZER_SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    GENERATION,
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
# Before a tokenizer's path: its prompts are rendered by its chat template.
CHAT = "chat:"
_PREFIXES = re.compile(r"(?:(?:chat(?:@[^:/]*)?|space|nospace):)*")


def split_name(vocabulary: str) -> tuple[str, str]:
    """Splits a vocabulary's name into what says how texts are put to it, and the path.

    "chat@2025-01-31:nospace:/a/b" is "chat@2025-01-31:nospace:" and "/a/b".
    """
    prefixes = _PREFIXES.match(vocabulary)[0]
    return prefixes, vocabulary[len(prefixes) :]


# The vocabularies that come with m2l, and their sentinels for span corruption, which bring the
# sizes to a multiple of 128.
BYTES, MICROWORLD = "bytes", "microworld"
EXTRA_IDS = {BYTES: 125, MICROWORLD: 32}
SHIPPED_SIZES = {BYTES: 384, MICROWORLD: 1024}
# How Hugging Face calls the tokenizer that has ByT5's ids.
BYTES_TOKENIZER = "ByT5Tokenizer"


def microworld_pieces() -> Path:
    """Returns the SentencePiece model of the microworld's vocabulary."""
    # Finding m2l.tasks does not load it.
    (folder,) = importlib.util.find_spec("m2l.tasks").submodule_search_locations
    return Path(folder) / "microworld" / "vocabulary.model"


def cache_directory() -> Path:
    """Returns the local directory of what can be computed or copied again: M2L_CACHE, or m2l's."""
    if named := os.environ.get("M2L_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m2l"


_REDO = "delete it and start again"
# As long as the header of a safetensors file may be; tokenizers are the longest JSON files.
_MOST_BYTES = 100_000_000
_MOST_DEPTH = 100
_HALF_OF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
# In a record, of its other fields.
CHECKSUM = "checksum"
_HEAD = 1 << 16
_BLOB = re.compile("[0-9a-f]{64}")
_ARRAY_METADATA = (
    "_METADATA", "_CHECKPOINT_METADATA", "zarr.json", ".zarray", "manifest.ocdbt",
)  # fmt: skip

Pairs = list[tuple[str, Json]]


def parse_json(
    content: str | bytes,
    source: object,
    *,
    kind: type | None = None,
    finite: bool = False,
    pairs: Callable[[Pairs], Json] | None = None,
    error: type[M2LError] = DataError,
    advice: str = _REDO,
) -> Json:
    """Returns the value of a JSON text: the one way in which m2l reads JSON.

    Args:
        content: The text; bytes are UTF-8.
        source: Its file, and line where it has several, for the message.
        kind: What it has to be: `dict` or `list`; None: any value.
        finite: Whether NaN, infinity and numbers beyond float64 are refused.
        pairs: Makes an object's value of its fields, and raises ValueError; None: a dict.
        error: The class of the error.
        advice: What to do about a damaged file.

    Raises:
        M2LError: Of class `error`: it is not JSON, not Unicode, nested more than 100 deep, or not
            of the kind.
    """
    try:
        raw = content.encode() if isinstance(content, str) else content
        numbers = {"parse_constant": _refuse_number, "parse_float": _finite} if finite else {}
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=pairs, **numbers)
        if _HALF_OF_A_PAIR.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
        _check_depth(value)
    except RecursionError as cause:
        raise error(f"{source}: damaged, its JSON is nested too deeply; {advice}") from cause
    except UnicodeEncodeError as cause:
        raise error(
            f"{source}: damaged, it has half of a surrogate pair in it; {advice}"
        ) from cause
    except UnicodeDecodeError as cause:
        raise error(f"{source}: damaged, it is not UTF-8 ({cause.reason}); {advice}") from cause
    except json.JSONDecodeError as cause:
        place = f"line {cause.lineno}, column {cause.colno}"
        message = f"it is not JSON: {cause.msg} at {place}"
        raise error(f"{source}: damaged, {message}; {advice}") from cause
    except ValueError as cause:
        reason = str(cause)
        if reason.startswith("Exceeds the limit"):
            reason = "it has a number of too many digits"
        raise error(f"{source}: damaged, {reason}; {advice}") from cause
    if kind is not None and type(value) is not kind:
        expected = {dict: "an object", list: "a list"}[kind]
        raise error(f"{source}: damaged, it is not JSON of the expected kind, {expected}; {advice}")
    return value


def _refuse_number(text: str) -> float:
    raise ValueError(f"{text} is not a finite number")


def _finite(text: str) -> float:
    return value if abs(value := float(text)) < float("inf") else _refuse_number(text)


def _check_depth(value: Json) -> None:
    """Raises RecursionError where functions that walk through a value would."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MOST_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise RecursionError


def read_json(
    path: AnyPath,
    *,
    kind: type | None = None,
    finite: bool = False,
    error: type[M2LError] = DataError,
    advice: str = _REDO,
) -> Json:
    """Returns the value in a JSON file; the arguments are those of `parse_json`.

    Raises:
        M2LError: Of class `error`: the file cannot be read, is no regular file or longer than
            100 MB, or `parse_json` refuses it.
    """
    try:
        path = storage.path(path)
        if isinstance(path, Path):
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise error(f"{path}: cannot be read (not a regular file)")
            if status.st_size > _MOST_BYTES:
                raise error(
                    f"{path}: {status.st_size:,} bytes; at most {_MOST_BYTES:,} bytes of JSON are "
                    "read"
                )
        content = path.read_bytes()
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror})") from cause
    return parse_json(content, path, kind=kind, finite=finite, error=error, advice=advice)


def checksum(content: Json) -> str:
    """Returns the SHA-256, in hex, of JSON values, whatever the order of objects' fields."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_record(path: AnyPath, content: Mapping[str, Json]) -> None:
    """Writes a JSON object and its checksum; `read_record` reads it."""
    content = json.loads(json.dumps(content))
    text = json.dumps({**content, CHECKSUM: checksum(content)}, indent=1)
    storage.write_atomic(path, f"{text}\n")


def read_record(
    path: AnyPath,
    *,
    required: bool = True,
    finite: bool = False,
    error: type[M2LError] = DataError,
    advice: str = _REDO,
) -> JsonObject:
    """Returns the JSON object that `write_record` wrote, without its checksum.

    Args:
        path: The file.
        required: Whether a record without a checksum, as older versions wrote, is refused.
        finite: Whether NaN, infinity and numbers beyond float64 are refused.
        error: The class of the error.
        advice: What to do about a damaged file.

    Raises:
        M2LError: Of class `error`: the file cannot be read, or is not what was written.
    """
    content = read_json(path, kind=dict, finite=finite, error=error, advice=advice)
    recorded = content.pop(CHECKSUM, None)
    if recorded != checksum(content) and (required or recorded is not None):
        raise error(f"{path}: damaged or edited, it does not match its checksum; {advice}")
    return content


def check_claim(
    out: AnyPath,
    record: str,
    content: Mapping[str, Json],
    *,
    kind: str,
    update: bool = False,
    advice: str = "delete it",
) -> None:
    """Refuses a folder that holds something else; writes nothing.

    Args:
        out: The folder.
        record: The file in it that says what it holds: "run.json".
        content: What it is to hold, as JSON values by name.
        kind: What it is to be, as a noun: "run".
        update: Whether a folder of the same kind with other values will do.
        advice: What to do about other values, besides choosing another folder.

    Raises:
        ConfigError: the folder holds other content, or files but no record.
        M2LError: `out` is an address of unknown storage.
    """
    out = storage.path(out)
    if not out.exists():
        return
    if not (out / record).exists():
        # A claim that was killed halfway leaves its temporary file.
        if not all(path.name.startswith(f".{record}.") for path in out.iterdir()):
            raise ConfigError(f"{out} is not empty and holds no {kind}; choose another --out")
        return
    recorded = read_record(out / record, required=False)
    for name, value in json.loads(json.dumps(content)).items():
        if recorded.get(name) != value and not update:
            raise ConfigError(
                f"{out} holds another {kind}: its {name} is {recorded.get(name)!r}, this one's is "
                f"{value!r}; choose another --out, or {advice}"
            )


def claim(out: AnyPath, record: str, content: Mapping[str, Json]) -> None:
    """Writes into a folder what it is of; `check_claim` comes first."""
    out.mkdir(parents=True, exist_ok=True)
    write_record(out / record, content)


def sha256(file: AnyPath) -> str:
    """Returns the SHA-256, in hex, of a file's content."""
    with open(file, "rb") if isinstance(file, Path) else io.BytesIO(file.read_bytes()) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def directory_digest(directory: AnyPath) -> str:
    """Returns the SHA-256, in hex, of the names, sizes, times and first 64 KiB of all files in it.

    Of objects in a bucket, of their names, and of the content of Orbax's and zarr's metadata.
    """
    digest = hashlib.sha256()
    for file in storage.list_files(directory):
        digest.update(f"{file.relative_to(directory)}\0".encode())
        if isinstance(file, Path):
            status = file.stat()
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
            with open(file, "rb") as stream:
                digest.update(stream.read(_HEAD))
        elif file.name in _ARRAY_METADATA:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def content_digest(paths: Sequence[AnyPath]) -> str:
    """Returns the SHA-256, in hex, of the names and the content of files.

    That of each local file is stored in m2l's cache, by its path, size, time and inode.
    """
    with ThreadPoolExecutor() as pool:
        parts = zip(paths, pool.map(_cached_sha256, paths), strict=True)
    return checksum([[path.name, part] for path, part in parts])


def _cached_sha256(file: AnyPath) -> str:
    if not isinstance(file, Path):
        return sha256(file)
    file = file.resolve()
    if _BLOB.fullmatch(file.name):
        return file.name  # As the Hugging Face Hub's cache names a file by its content.
    status = file.stat()
    version = [str(file), status.st_size, status.st_mtime_ns, status.st_ino]
    entry = cache_directory() / "files" / f"{checksum(version)}.json"
    if entry.is_file():
        try:
            known = read_record(entry)
        except DataError:
            known = {}  # It is computed again.
        if known.get("file") == version:
            return str(known["sha256"])
    digest = sha256(file)
    with contextlib.suppress(OSError):  # What cannot be stored is computed again.
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_record(entry, {"file": version, "sha256": digest})
    return digest
