"""Whether a result that is already there is what the same command would make."""

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from m2l import storage
from m2l.checkpoints import recorded
from m2l.checkpoints.manifest import Manifest, is_checkpoint
from m2l.checkpoints.publishing import check_absent
from m2l.checkpoints.reading import verify
from m2l.errors import CheckpointError, DataError
from m2l.files import cache_directory, read_record, write_record

KEY = "key"
"""In a manifest's made_by: the digest of inputs and options that `key_of` returns."""

EXPORTED = "exported"
"""In the manifest of an exported checkpoint, in made_by: the options of the export."""

_HEAD = 1 << 16
_BLOB = re.compile("[0-9a-f]{64}")
_METADATA = ("_METADATA", "_CHECKPOINT_METADATA", "zarr.json", ".zarray", "manifest.ocdbt")


def key_of(content: Any) -> str:
    """Returns the SHA-256, in hex, of JSON values: of all that decides the bytes of a result."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def files_digest(path: Any) -> str:
    """Returns the SHA-256, in hex, of the names, sizes, times and first 64 KiB of files.

    Of objects in a bucket, of their names, and of the content of Orbax's and zarr's metadata.

    Args:
        path: The directory whose files they are, with all below it.
    """
    digest = hashlib.sha256()
    for file in storage.list_files(path):
        digest.update(f"{file.relative_to(path)}\0".encode())
        if isinstance(file, Path):
            stat = file.stat()
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}\n".encode())
            with open(file, "rb") as opened:
                digest.update(opened.read(_HEAD))
        elif file.name in _METADATA:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def content_digest(files: Sequence[Any]) -> str:
    """Returns the SHA-256, in hex, of the names and the content of files.

    That of each local file is kept in m2l's cache, by its path, size, time and inode.
    """
    with ThreadPoolExecutor() as pool:
        parts = zip(files, pool.map(_file_digest, files), strict=True)
    return key_of([[file.name, part] for file, part in parts])


def _file_digest(file: Any) -> str:
    if not isinstance(file, Path):
        return hashlib.sha256(file.read_bytes()).hexdigest()
    file = file.resolve()
    if _BLOB.fullmatch(file.name):
        return file.name  # As the Hugging Face Hub's cache names a file by its content.
    stat = file.stat()
    what = [str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    entry = cache_directory() / "files" / f"{key_of(what)}.json"
    if entry.is_file():
        try:
            known = read_record(entry)
        except DataError:
            known = {}  # It is computed again.
        if known.get("file") == what:
            return str(known["sha256"])
    with open(file, "rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # What cannot be kept is computed again.
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_record(entry, {"file": what, "sha256": sha256})
    return sha256


def finished(
    directory: str | os.PathLike, is_same: Callable[[Manifest], bool], file: str | None = None
) -> Manifest | None:
    """Returns the manifest of a result that need not be made again, and says so on stderr.

    Its digests are checked first.

    Args:
        directory: What is to be made.
        is_same: Whether a manifest is of the same inputs and options.
        file: The manifest's name in a Hugging Face directory; None: it is a checkpoint of m2l's.

    Returns:
        None: there is nothing.

    Raises:
        CheckpointError: Something else is there, or the result is damaged.
    """
    directory = storage.path(directory)
    manifest = _read(directory, file)
    if manifest is None or not is_same(manifest):
        check_absent(directory)
        return None
    if file is None:
        verify(directory)
    else:
        recorded.verify(directory)
    print(
        f"m2l: {directory}: already there, made from the same inputs with the same options",
        file=sys.stderr,
    )
    return manifest


def _read(directory: Any, file: str | None) -> Manifest | None:
    try:
        if not (is_checkpoint(directory) if file is None else (directory / file).is_file()):
            return None
        return Manifest.read(directory, file)
    except CheckpointError:
        return None  # What it belongs to is then not known, and refused.
