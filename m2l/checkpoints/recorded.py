"""Hugging Face directories that m2l wrote: m2l_manifest.json has digests of all that is in them.

Read wherever such a directory is merged, converted, evaluated or verified. README.md is not
recorded, for people edit it; files that were added later are not looked at.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2l import storage
from m2l.checkpoints import safetensors
from m2l.checkpoints.extents import opening
from m2l.checkpoints.manifest import FILE_NAME, Manifest
from m2l.checkpoints.publishing import UNFINISHED
from m2l.checkpoints.safetensors import StoredTensor
from m2l.checkpoints.schema import check_arrays, is_file_digests
from m2l.checkpoints.streaming import in_parallel
from m2l.errors import CheckpointError

MANIFEST = f"m2l_{FILE_NAME}"
_NOT_RECORDED = ("README.md", MANIFEST, UNFINISHED)
_ADVICE = (
    f"if it was changed on purpose (trained further, edited), delete {MANIFEST}; else copy or "
    "make the directory again"
)


def write(directory: Path, manifest: Manifest, digests: Mapping[str, str]) -> Manifest:
    """Writes m2l_manifest.json, once all other files of a Hugging Face directory are written.

    Args:
        directory: The directory.
        manifest: What it is, without `directory`.
        digests: SHA-256 of each tensor's bytes as they are stored, by Hugging Face's name.

    Returns:
        The manifest with {"tensors": name -> {"shape", "dtype", "digest"}, "files": name ->
        SHA-256 of each other file} as its `directory`.
    """
    tensors = {
        name: {"shape": list(t.shape), "dtype": t.dtype.name, "digest": digests[name]}
        for name, t in safetensors.open_tensors(directory).items()
    }
    recorded = {
        file.name: _sha256(file)
        for file in sorted(directory.iterdir())
        if file.is_file() and file.suffix != ".safetensors" and file.name not in _NOT_RECORDED
    }
    manifest = dataclasses.replace(manifest, directory={"tensors": tensors, "files": recorded})
    manifest.write(directory, MANIFEST)
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Reads m2l_manifest.json of a directory.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    manifest = Manifest.read(directory, MANIFEST)
    if (recorded := manifest.directory) is not None:
        file = directory / MANIFEST
        tensors, other = recorded.get("tensors"), recorded.get("files")
        if not isinstance(tensors, dict) or not is_file_digests(other):
            raise CheckpointError(f"{file}: damaged: directory has no tensors and files")
        check_arrays(f"{file}: tensors", tensors)
    return manifest


def open_tensors(path: str | os.PathLike) -> dict[str, StoredTensor]:
    """Opens the tensors of a .safetensors file or a directory, as `safetensors.open_tensors` does.

    Where m2l wrote the directory, its files are compared with their digests, and the tensors carry
    theirs, for whoever reads them to check.

    Raises:
        CheckpointError: As there; or names, shapes, dtypes or files are not those that were
            recorded.
    """
    path = storage.path(path)
    stored = safetensors.open_tensors(path)
    directory = path if path.is_dir() else path.parent
    if not (directory / MANIFEST).is_file():
        return stored
    recorded = read_manifest(directory).directory
    if recorded is None:  # written by an older m2l
        return stored
    tensors = recorded["tensors"]
    missing = [name for name in tensors if name not in stored] if path.is_dir() else []
    for name in [*stored, *missing]:
        found = stored.get(name)
        spelled = "missing" if found is None else f"{found.dtype}{list(found.shape)}"
        record = tensors.get(name)
        expected = "none" if record is None else f"{record['dtype']}{record['shape']}"
        if spelled != expected:
            raise CheckpointError(
                f"{path}: {name} is {spelled}, {MANIFEST} records {expected}; {_ADVICE}"
            )
    for name, digest in recorded["files"].items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, {MANIFEST} records it; {_ADVICE}")
        if _sha256(file) != digest:
            raise CheckpointError(
                f"{file}: its digest is not the one that {MANIFEST} records; {_ADVICE}"
            )
    return {
        name: dataclasses.replace(tensor, digest=tensors[name]["digest"])
        for name, tensor in stored.items()
    }


def verify(directory: Path) -> Manifest:
    """Computes every digest of a Hugging Face directory that m2l wrote.

    Raises:
        CheckpointError: Naming the first tensor or file that is missing or damaged; or the
            directory was written by an m2l that did not record digests as stored.
    """
    manifest = read_manifest(directory)
    if manifest.directory is None:
        raise CheckpointError(
            f"{directory / MANIFEST}: written by an older m2l, without the digests of what is "
            "stored; make the directory again to be able to verify it"
        )
    in_parallel(StoredTensor.read_checked, open_tensors(directory).values())
    return manifest


def _sha256(file: Any) -> str:
    if not isinstance(file, Path):
        return hashlib.sha256(file.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    with opening(file, os.O_RDONLY, "read") as descriptor:
        while part := os.read(descriptor, 1 << 20):
            digest.update(part)
    return digest.hexdigest()
