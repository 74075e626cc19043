"""Small files that appear whole or not at all, and folders that belong to one run or study."""

import importlib.util
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2l.errors import ConfigError, DataError, M2LError

# A tokenizer's directory: what decides the ids, by precedence, and what is read beside it. Data
# reads these and checkpoints carry them, and neither may ask the other.
GENERATION = "generation_config.json"
SPIECE, TOKENIZER_JSON, TOKENIZER_MODEL = "spiece.model", "tokenizer.json", "tokenizer.model"
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
# How Hugging Face calls the tokenizer that has ByT5's ids.
BYTES_TOKENIZER = "ByT5Tokenizer"


def microworld_pieces() -> Path:
    """The SentencePiece model of the microworld's vocabulary."""
    # Finding m2l.tasks does not load it.
    (folder,) = importlib.util.find_spec("m2l.tasks").submodule_search_locations
    return Path(folder) / "microworld" / "vocabulary.model"


# Also as pathlib writes it, with one slash, and behind the working directory.
_SCHEME = re.compile(r"(?:^|/)([A-Za-z][A-Za-z0-9+.-]+):/")


def check_local(path: str | os.PathLike) -> None:
    """Refuses a path that is an address of remote storage, such as gs://bucket/run.

    Raises:
        M2LError: It has a scheme.
    """
    if found := _SCHEME.search(os.fspath(path)):
        raise M2LError(
            f"{os.fspath(path)}: {found[1]}:// is not supported: expected a path of a local or "
            "mounted file system; copy the files to one"
        )


def write(path: Path, text: str) -> None:
    """Writes a text file under a temporary name and renames it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(text)
    unfinished.rename(path)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: damaged, no JSON ({error}); delete it and start again") from error


def check_claim(
    out: Path,
    record: str,
    content: Mapping[str, Any],
    *,
    what: str,
    update: bool = False,
    mend: str = "delete it",
) -> None:
    """Refuses a folder that holds something else; writes nothing.

    Args:
        out: The folder.
        record: The file in it that says what it holds: "run.json".
        content: What it is to hold, as JSON values by name.
        what: What it is, in words: "run".
        update: Whether a folder of the same `what` with other values will do.
        mend: What can be done about other values, but for choosing another folder.

    Raises:
        ConfigError: the folder holds other content, or files but no record.
        M2LError: `out` is not on a file system.
    """
    check_local(out)
    if not out.exists():
        return
    if not (out / record).exists():
        # A claim that was killed halfway leaves its temporary file.
        if not all(path.name.startswith(f".{record}.") for path in out.iterdir()):
            raise ConfigError(f"{out} is not empty and holds no {what}; choose another --out")
        return
    held = read_json(out / record)
    for name, value in json.loads(json.dumps(content)).items():
        if held.get(name) != value and not update:
            raise ConfigError(
                f"{out} holds another {what}: its {name} is {held.get(name)!r}, this one's is "
                f"{value!r}; choose another --out, or {mend}"
            )


def claim(out: Path, record: str, content: Mapping[str, Any]) -> None:
    """Makes `out` the folder of what `content` says; `check_claim` comes first."""
    out.mkdir(parents=True, exist_ok=True)
    write(out / record, json.dumps(content, indent=1) + "\n")
