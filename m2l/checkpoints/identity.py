"""Whether a result that is already there is what the same command would make."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from m2l.checkpoints import recorded
from m2l.checkpoints.manifest import FILE_NAME, Manifest
from m2l.checkpoints.publishing import check_absent
from m2l.checkpoints.reading import verify
from m2l.errors import CheckpointError

KEY = "key"
"""In a manifest's made_by: the digest of inputs and options that `key_of` returns."""

EXPORTED = "exported"
"""In the manifest of an exported checkpoint, in made_by: the options of the export."""

_HEAD = 1 << 16


def key_of(content: Mapping[str, Any]) -> str:
    """Returns the SHA-256, in hex, of JSON values: of all that decides the bytes of a result."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def files_digest(path: str | os.PathLike) -> str:
    """Returns the SHA-256, in hex, of names, sizes, times and first 64 KiB of a folder's files."""
    path, digest = Path(path), hashlib.sha256()
    for file in sorted(entry for entry in path.rglob("*") if entry.is_file()):
        stat = file.stat()
        name = file.relative_to(path)
        digest.update(f"{name}\0{stat.st_size} {stat.st_mtime_ns}\n".encode())
        with open(file, "rb") as opened:
            digest.update(opened.read(_HEAD))
    return digest.hexdigest()


def finished(
    directory: str | os.PathLike, is_same: Callable[[Manifest], bool], file: str = FILE_NAME
) -> Manifest | None:
    """Returns the manifest of a result that need not be made again, and says so on stderr.

    Its digests are checked first.

    Args:
        directory: What is to be made.
        is_same: Whether a manifest is of the same inputs and options.
        file: The manifest's name: FILE_NAME or `recorded.MANIFEST`, which tells the formats apart.

    Returns:
        None: there is nothing.

    Raises:
        CheckpointError: Something else is there, or the result is damaged.
    """
    directory = Path(directory)
    manifest = _read(directory, file)
    if manifest is None or not is_same(manifest):
        check_absent(directory)
        return None
    if file == FILE_NAME:
        verify(directory)
    else:
        recorded.verify(directory)
    print(
        f"m2l: {directory}: already there, made from the same inputs with the same options",
        file=sys.stderr,
    )
    return manifest


def _read(directory: Path, file: str) -> Manifest | None:
    if not (directory / file).is_file():
        return None
    try:
        return Manifest.read(directory, file)
    except CheckpointError:
        return None  # What it belongs to is then not known, and refused.
