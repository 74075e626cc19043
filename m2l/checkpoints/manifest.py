"""What a checkpoint says about itself: manifest.json, and the digests that make damage visible."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m2l import __version__, files
from m2l.checkpoints import tokenizer
from m2l.checkpoints.schema import check_manifest
from m2l.errors import CheckpointError

OCDBT, FORMAT_VERSION = 1, 2
"""The layout of checkpoints whose arrays are in OCDBT, and of those that are written."""

FILE_NAME = "manifest.json"


@functools.cache
def versions() -> dict[str, str]:
    """The versions of m2l and of what computes and writes for it, as recorded in every manifest."""
    packages = ("jax", "flax", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"m2l": __version__, "python": platform.python_version()} | found


def sha256(array: np.ndarray) -> str:
    """The SHA-256, in hex, of an array's row-major little-endian bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is in a checkpoint, what made it, and from what.

    Attributes:
        model: The model's configuration, as `models.to_dict` gives it.
        vocabulary: {"name", "size", "fingerprint"} of the vocabulary the model was trained with.
        dtype: The parameters' dtype, or "mixed".
        step: The training step it was taken at; 0 for what no trainer made.
        made_by: What made it: the resolved configuration of the run, or the merge's recipe.
        parents: {"role", "path", "digest"} of each checkpoint it was made from.
        parameters: name -> {"shape", "dtype", "digest"}, digests as `sha256` gives them.
        opt_state: The same for the optimizer state's leaves, by key path; None without one.
        data_state: SHA-256 of the data pipeline's position; None without one.
        tokenizer: SHA-256 of each of the vocabulary's files that the checkpoint carries, by name;
            None where it carries none. The vocabulary's name is then where they lie: an absolute
            path here, relative on disk, so that a checkpoint can be moved.
        directory: Of a Hugging Face directory, as `recorded.write` gives it; else None.
        versions: The versions it was written with.
        format_version: The layout of the directory and of this file.
    """

    model: Mapping[str, Any]
    vocabulary: Mapping[str, Any]
    dtype: str
    step: int
    made_by: Mapping[str, Any]
    parents: tuple[Mapping[str, str], ...]
    parameters: Mapping[str, Mapping[str, Any]]
    opt_state: Mapping[str, Mapping[str, Any]] | None = None
    data_state: str | None = None
    tokenizer: Mapping[str, str] | None = None
    directory: Mapping[str, Mapping[str, Any]] | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=versions)
    format_version: int = FORMAT_VERSION

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of what the model is: configuration, vocabulary and parameters."""
        identity = {
            "model": self.model,
            "vocabulary": self.vocabulary["fingerprint"],
            "parameters": self.parameters,
        }
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def write(self, directory: Path, name: str = FILE_NAME) -> None:
        """Writes manifest.json into `directory`, or a file of another name."""
        content = {"digest": self.digest} | dataclasses.asdict(self)
        if self.tokenizer is not None:
            content["vocabulary"]["name"] = tokenizer.name_in(self.vocabulary["name"])
        if self.directory is None:
            del content["directory"]
        content = {"checksum": _checksum(content)} | content
        (directory / name).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path, name: str = FILE_NAME) -> "Manifest":
        """Reads manifest.json of `directory`, or a file of another name.

        Raises:
            CheckpointError: It is missing, damaged, edited, or was written by a newer m2l.
        """
        file = directory / name
        advice = "copy the checkpoint again or make it anew"
        content = files.read_json(file, error=CheckpointError, advice=advice)
        found = content.get("format_version") if isinstance(content, dict) else None
        if type(found) is not int:
            raise CheckpointError(f"{file}: damaged, it has no format_version")
        if found > FORMAT_VERSION:
            raise CheckpointError(
                f"{file}: written in format {found} by a newer m2l; this one reads up to "
                f"{FORMAT_VERSION}: upgrade m2l"
            )
        if content.pop("checksum", None) != _checksum(content):
            raise CheckpointError(f"{file}: damaged or edited, it does not match its own checksum")
        check_manifest(file, {n: v for n, v in content.items() if n != "format_version"})
        del content["digest"]
        if content.get("tokenizer") is not None:
            name = tokenizer.name_in(content["vocabulary"]["name"], directory.absolute())
            content["vocabulary"]["name"] = name
        return cls(**content | {"parents": tuple(content["parents"])})


def check_vocabulary(
    vocabulary: Mapping[str, Any], vocab_size: int, where: str | Path | None = None
) -> None:
    """Refuses a tokenizer with ids that a model has no embedding for, as after adding tokens.

    Args:
        vocabulary: {"name", "size", "fingerprint"} of the one that the model is to read.
        vocab_size: How many rows the model's embedding has.
        where: The model, for the message; None: one that is only configured.

    Raises:
        CheckpointError: there are more ids than rows.
    """
    if vocabulary["size"] > vocab_size:
        resize = "resize its embedding" if where else f"set vocab_size to {vocabulary['size']}"
        raise CheckpointError(
            f"{where or 'the model'}: the tokenizer {vocabulary['name']!r} has "
            f"{vocabulary['size']} ids, the model room for {vocab_size} (vocab_size): they do not "
            f"belong together; name another with --vocabulary, or {resize}"
        )


def _checksum(content: Mapping[str, Any]) -> str:
    # In the file's order: sorted, keys that JSON turns into strings could change places.
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
