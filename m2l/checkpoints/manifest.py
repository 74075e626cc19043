"""What a checkpoint says about itself: what it is, what made it, and digests of its arrays.

Of an Orbax checkpoint the manifest is the entry "m2l" of its custom metadata, so that it is there
once Orbax has finished the checkpoint, and Orbax's own functions show it. Of a Hugging Face
directory it is a file, and so it was of m2l's checkpoints of before.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from m2l import files, storage
from m2l.checkpoints import digest, tokenizer
from m2l.checkpoints.pytrees import ADVICE, is_committed
from m2l.checkpoints.safetensors import is_dtype
from m2l.checkpoints.spans import is_array_shape
from m2l.errors import CheckpointError
from m2l.storage import AnyPath, PathLike
from m2l.typing import Json, JsonObject
from m2l.version import __version__

FORMAT_VERSION = 3
"""2 and before: with a manifest in a file, and SHA-256 as the digests of arrays."""

FILE_NAME = "manifest.json"
ORBAX_METADATA = "_CHECKPOINT_METADATA"
ENTRY = "m2l"


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of m2l and of what it computes and writes with."""
    packages = ("jax", "flax", "numpy", "orbax-checkpoint")
    packaged = {name: importlib.metadata.version(name) for name in packages}
    return {"m2l": __version__, "python": platform.python_version()} | packaged


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
        parameters: name -> {"shape", "dtype", "digest"}: a digest of `checkpoints.digest`; of a
            Hugging Face directory, and of a checkpoint in format 2, SHA-256.
        opt_state: The same for the optimizer state's leaves, by key path; None without one.
        data_state: SHA-256 of the data pipeline's position; None without one.
        tokenizer: SHA-256 of each of the vocabulary's files that the checkpoint carries, by name;
            None where it carries none. The vocabulary's name is then the path of a local copy of
            them, and "tokenizer" in storage.
        directory: Of a Hugging Face directory, as `huggingface_directory.write` returns it.
        versions: The versions it was written with.
        format_version: The layout of the directory and of this file.
    """

    model: Mapping[str, Json]
    vocabulary: Mapping[str, Json]
    dtype: str
    step: int
    made_by: Mapping[str, Json]
    parents: tuple[Mapping[str, str], ...]
    parameters: Mapping[str, Mapping[str, Json]]
    opt_state: Mapping[str, Mapping[str, Json]] | None = None
    data_state: str | None = None
    tokenizer: Mapping[str, str] | None = None
    directory: Mapping[str, Mapping[str, Json]] | None = None
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

    def check_whole(self, path: PathLike) -> None:
        """Refuses a checkpoint of a run that trained an adapter: factors without their base.

        Raises:
            CheckpointError: It is one; the message says what to name instead.
        """
        settings = self.made_by.get("settings")
        if isinstance(settings, dict) and settings.get("lora") and not self.model:
            run = storage.path(path).parent.parent
            base = next((parent["path"] for parent in self.parents), "BASE")
            raise CheckpointError(
                f"{path}: it holds the factors of an adapter, without the base: name "
                f"{base}+{run / 'adapter'}, where the run left it when it was finished"
            )

    def origin(self) -> str:
        """Returns what made the checkpoint, in a few words."""
        match self.made_by:
            case {"kind": "train", "settings": {"mixture": mixture}}:
                return f"{self.step} steps on {mixture}"
            case {"kind": "merge", "recipe": {"method": method}}:
                return f"merged by {method}"
            case {"kind": "convert", "from": source}:
                return f"converted from {source}"
            case {"kind": "statistics", "statistic": statistic, "examples": examples}:
                return f"{statistic} of {examples} examples"
        return f"made by {self.made_by.get('kind', 'hand')}"

    def to_json(self) -> JsonObject:
        """Returns the manifest as JSON values, with its digest and a checksum."""
        content = json.loads(json.dumps({"digest": self.digest} | dataclasses.asdict(self)))
        if self.tokenizer is not None:
            content["vocabulary"]["name"] = tokenizer.name_in(self.vocabulary["name"])
        if self.directory is None:
            del content["directory"]
        return {"checksum": _checksum(content)} | content

    def write(self, directory: Path, name: str) -> None:
        """Writes the manifest of a Hugging Face directory, as a file of that name."""
        (directory / name).write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def read(cls, directory: AnyPath, name: str | None = None) -> "Manifest":
        """Reads the manifest of an Orbax checkpoint, or, with a name, of another directory.

        Raises:
            CheckpointError: It is missing, damaged, edited, or was written by a newer m2l.
        """
        if name is not None or not (directory / ORBAX_METADATA).is_file():
            file = directory / (name or FILE_NAME)
            return cls._parse(files.read_json(file, error=CheckpointError, advice=ADVICE), file)
        file = directory / ORBAX_METADATA
        entry = _entry(directory)
        if entry is None and (directory / FILE_NAME).is_file():
            return cls.read(directory, FILE_NAME)
        if entry is None:
            raise CheckpointError(f"{file}: m2l did not write it; it has no manifest of m2l's")
        return cls._parse(entry, file)

    @classmethod
    def _parse(cls, content: Json, file: AnyPath) -> "Manifest":
        version = content.get("format_version") if isinstance(content, dict) else None
        if type(version) is not int:
            raise CheckpointError(f"{file}: damaged, it has no format_version")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{file}: written in format {version} by a newer m2l; this one reads up to "
                f"{FORMAT_VERSION}: upgrade m2l"
            )
        if content.pop("checksum", None) != _checksum(content):
            raise CheckpointError(f"{file}: damaged or edited, it does not match its own checksum")
        check_manifest(file, {n: v for n, v in content.items() if n != "format_version"})
        del content["digest"]
        manifest = cls(**content | {"parents": tuple(content["parents"])})
        if manifest.tokenizer is None:
            return manifest
        in_checkpoint = file.name in (FILE_NAME, ORBAX_METADATA)
        copy = tokenizer.local_copy(file.parent, manifest.tokenizer, in_checkpoint)
        name = tokenizer.name_in(manifest.vocabulary["name"], copy)
        return dataclasses.replace(manifest, vocabulary={**manifest.vocabulary, "name": name})


def is_checkpoint(directory: AnyPath) -> bool:
    """Returns whether a directory is a finished checkpoint that m2l wrote; damaged ones are."""
    if (directory / FILE_NAME).is_file():
        return True
    try:
        return _entry(directory) is not None and is_committed(directory)
    except CheckpointError:
        return True  # Whoever reads it is told what is damaged.


def _entry(directory: AnyPath) -> Json:
    file = directory / ORBAX_METADATA
    if not file.is_file():
        return None
    content = files.read_json(file, kind=dict, error=CheckpointError, advice=ADVICE)
    custom = content.get("custom_metadata")
    return custom.get(ENTRY) if isinstance(custom, dict) else None


def custom_metadata(manifest: Manifest) -> JsonObject:
    """Returns what Orbax keeps as the custom metadata of a checkpoint with this manifest."""
    return {ENTRY: manifest.to_json()}


def check_vocabulary(
    vocabulary: Mapping[str, Json], vocab_size: int, model: PathLike | None = None
) -> None:
    """Refuses a tokenizer with ids that a model has no embedding for, as after adding tokens.

    Args:
        vocabulary: {"name", "size", "fingerprint"} of the one that the model is to read.
        vocab_size: How many rows the model's embedding has.
        model: The model's path, for the message; None: one that is only configured.

    Raises:
        CheckpointError: there are more ids than rows.
    """
    if vocabulary["size"] > vocab_size:
        resize = "resize its embedding" if model else f"set vocab_size to {vocabulary['size']}"
        raise CheckpointError(
            f"{model or 'the model'}: the tokenizer {vocabulary['name']!r} has "
            f"{vocabulary['size']} ids, the model room for {vocab_size} (vocab_size): they do not "
            f"belong together; name another with --vocabulary, or {resize}"
        )


def _checksum(content: Mapping[str, Json]) -> str:
    # In the file's order: sorted, keys that JSON turns into strings could change places.
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


_SHA256 = re.compile("[0-9a-f]{64}")


def check_manifest(file: Path, content: Mapping[str, Json]) -> None:
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
            value = repr(content.get(name, "nothing"))
            shown = value if len(value) <= 80 else f"{value[:77]}..."
            raise CheckpointError(f"{file}: damaged: {name} is {shown}, expected {expected}")
    for name in content:
        if name not in _FIELDS:
            raise CheckpointError(f"{file}: damaged: unknown field {name!r:.80}")
    for field in ("parameters", "opt_state"):
        check_arrays(f"{file}: {field}", content.get(field) or {})
    if content.get("tokenizer") is not None and not isinstance(content["vocabulary"]["name"], str):
        raise CheckpointError(f"{file}: damaged: a tokenizer is recorded, but no vocabulary's name")


def check_arrays(place: str, records: Mapping[str, Json]) -> None:
    """Checks name -> {"shape", "dtype", "digest"} of arrays.

    Raises:
        CheckpointError: Naming the first array whose record is not that, or whose name cannot be
            a folder's.
    """
    for name, record in records.items():
        if not name.isprintable() or not name.strip("./"):
            raise CheckpointError(f"{place}: damaged: {name!r:.80} is not the name of an array")
        if not (
            isinstance(record, dict)
            and set(record) == {"shape", "dtype", "digest"}
            and is_array_shape(record["shape"])
            and is_dtype(record["dtype"])
            and (_is_digest(record["digest"]) or digest.is_digest(record["digest"]))
        ):
            raise CheckpointError(
                f"{place}: damaged: {name} is {record!r:.80}, expected its shape, dtype and digest"
            )


def is_file_digests(value: Json) -> bool:
    """Returns whether a value is a dict of SHA-256 by the plain name of a file."""
    return isinstance(value, dict) and all(
        name.isprintable()
        and name not in ("", ".", "..")
        and Path(name).name == name
        and _is_digest(sha256)
        for name, sha256 in value.items()
    )


def _is_digest(value: Json) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_dict(value: Json) -> bool:
    return isinstance(value, dict)


def _is_vocabulary(value: Json) -> bool:
    return (
        isinstance(value, dict)
        and {"name", "size", "fingerprint"} <= set(value)
        and all(isinstance(value[name], str | None) for name in ("name", "fingerprint"))
        and (value["size"] is None or (type(value["size"]) is int and value["size"] >= 0))
    )


def _are_parents(value: Json) -> bool:
    return isinstance(value, list) and all(
        isinstance(parent, dict)
        and {"role", "path", "digest"} <= set(parent)
        and all(isinstance(text, str) for text in parent.values())
        for parent in value
    )


def _are_texts(value: Json) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _or_none(is_right: Callable[[Json], bool]) -> Callable[[Json], bool]:
    return lambda value: value is None or is_right(value)


_FIELDS: Mapping[str, tuple[str, Callable[[Json], bool]]] = {
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
