"""What the fields of a manifest have to be: a wrong type or size is refused before it is used."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from m2l.checkpoints import digest
from m2l.checkpoints.extents import is_array_shape
from m2l.checkpoints.safetensors import is_dtype
from m2l.errors import CheckpointError

_SHA256 = re.compile("[0-9a-f]{64}")


def check_manifest(file: Path, content: Mapping[str, Any]) -> None:
    """Checks every field of a manifest but its checksum and format_version.

    Args:
        file: The manifest's file, for the message.
        content: What it holds, without these two.

    Raises:
        CheckpointError: Naming the first field that is not what it has to be.
    """
    for name, (expected, is_right) in _FIELDS.items():
        if name not in content and name in _OPTIONAL:
            continue
        if name not in content or not is_right(content[name]):
            found = repr(content.get(name, "nothing"))
            shown = found if len(found) <= 80 else f"{found[:77]}..."
            raise CheckpointError(f"{file}: damaged: {name} is {shown}, expected {expected}")
    for name in content:
        if name not in _FIELDS:
            raise CheckpointError(f"{file}: damaged: unknown field {name!r:.80}")
    for field in ("parameters", "opt_state"):
        check_arrays(f"{file}: {field}", content.get(field) or {})
    if content.get("tokenizer") is not None and not isinstance(content["vocabulary"]["name"], str):
        raise CheckpointError(f"{file}: damaged: a tokenizer is recorded, but no vocabulary's name")


def check_arrays(where: str, records: Mapping[str, Any]) -> None:
    """Checks name -> {"shape", "dtype", "digest"} of arrays.

    Raises:
        CheckpointError: Naming the first array whose record is not that, or whose name cannot be
            a folder's.
    """
    for name, record in records.items():
        if not name.isprintable() or not name.strip("./"):
            raise CheckpointError(f"{where}: damaged: {name!r:.80} is not the name of an array")
        if not (
            isinstance(record, dict)
            and set(record) == {"shape", "dtype", "digest"}
            and is_array_shape(record["shape"])
            and is_dtype(record["dtype"])
            and (_is_digest(record["digest"]) or digest.is_digest(record["digest"]))
        ):
            raise CheckpointError(
                f"{where}: damaged: {name} is {record!r:.80}, expected its shape, dtype and digest"
            )


def is_file_digests(value: Any) -> bool:
    """Returns whether a value is a dict of SHA-256 by the plain name of a file."""
    return isinstance(value, dict) and all(
        name.isprintable()
        and name not in ("", ".", "..")
        and Path(name).name == name
        and _is_digest(sha256)
        for name, sha256 in value.items()
    )


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_vocabulary(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {"name", "size", "fingerprint"} <= set(value)
        and all(isinstance(value[name], str | None) for name in ("name", "fingerprint"))
        and (value["size"] is None or (type(value["size"]) is int and value["size"] >= 0))
    )


def _are_parents(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(parent, dict)
        and {"role", "path", "digest"} <= set(parent)
        and all(isinstance(text, str) for text in parent.values())
        for parent in value
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _or_none(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_right(value)


_FIELDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "digest": ("a SHA-256", _is_digest),
    "model": ("the model's settings by name", _is_dict),
    "vocabulary": ("its name, size and fingerprint", _is_vocabulary),
    "dtype": ("the name of a dtype", lambda value: isinstance(value, str)),
    "step": ("a number of steps", lambda value: type(value) is int and 0 <= value < 2**53),
    "made_by": ("settings by name", _is_dict),
    "parents": ("a list of roles, paths and digests", _are_parents),
    "parameters": ("arrays by name", _is_dict),
    "opt_state": ("arrays by name, or null", _or_none(_is_dict)),
    "data_state": ("a SHA-256, or null", _or_none(_is_digest)),
    "tokenizer": ("SHA-256 by the plain name of a file, or null", _or_none(is_file_digests)),
    "directory": ("tensors and files of a Hugging Face directory, or null", _or_none(_is_dict)),
    "versions": ("versions by package", _are_texts),
}
_OPTIONAL = ("opt_state", "data_state", "tokenizer", "directory", "versions")
