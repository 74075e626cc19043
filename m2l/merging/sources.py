"""What is merged: checkpoints of m2l, of T5X and of Hugging Face, opened under one set of names.

Where all are Hugging Face's and the result is to be, their own names and layouts are kept, and
models are merged that m2l has no network for. Otherwise all are seen as m2l names and lays out
parameters.
"""

import dataclasses
import functools
import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2l import checkpoints
from m2l.checkpoints import (
    Manifest,
    huggingface_directory,
    model_fields,
    safetensors,
    tensor_kinds,
)
from m2l.checkpoints.safetensors import StoredTensor
from m2l.checkpoints.tokenizer import DIRECTORY as TOKENIZER
from m2l.errors import CheckpointError, MergeError, UnsupportedModelError
from m2l.files import check_local
from m2l.merging.passes import Span, Stored

_READ = 1 << 20

ORBAX, HUGGINGFACE, T5X = "orbax", "huggingface", "t5x"
FORMATS = (ORBAX, HUGGINGFACE)
"""What a merge can write."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to be merged.

    Attributes:
        path: Where it is.
        format: "orbax", "huggingface" or "t5x".
        digest: What it is: of an m2l checkpoint its digest; else of the names, sizes and times of
            its files, and their headers.
        parameters: Its tensors by the names of the merge.
        ours: m2l's name of each, where it has another, and whether it is stored transposed.
        model: Its configuration: m2l's, or config.json.
        vocabulary: m2l's description of its vocabulary, or None.
        tokenizer: The directory with the tokenizer's files, or None.
        manifest: An m2l checkpoint's manifest.
        native: Whether names and layouts are Hugging Face's.
    """

    path: Path
    format: str
    digest: str
    parameters: Mapping[str, Stored]
    ours: Mapping[str, tuple[str, bool]]
    model: Mapping[str, Any]
    vocabulary: Mapping[str, Any] | None
    tokenizer: Path | None = None
    manifest: Manifest | None = None
    native: bool = False

    @property
    def has_digests(self) -> bool:
        """Whether parameters can be checked by `check_digest`."""
        return self.manifest is not None or any(map(_has_digest, self.parameters.values()))

    def name_of(self, name: str) -> tuple[str, bool]:
        """m2l's name of a parameter, and whether it is stored transposed."""
        return self.ours.get(name, (name, False))

    @functools.cached_property
    def description(self) -> Mapping[str, Any]:
        """The fields of its configuration that decide what it computes."""
        return model_fields.normalized(self.model)

    @functools.cached_property
    def copies(self) -> Mapping[str, str]:
        """Tensors that repeat others bit for bit, copy -> original; see `tensor_kinds.copies`."""
        return tensor_kinds.copies(self.parameters) if self.native else {}


def kind(path: Path) -> str:
    """What is stored at `path`, by its files.

    Raises:
        CheckpointError: Nothing that can be merged.
    """
    check_local(path)
    if (path / "manifest.json").is_file() or (path / "checkpoints").is_dir():
        return ORBAX
    if path.exists():
        tensor_kinds.check_no_adapter(path)
    if path.suffix == ".safetensors" or any(
        (path / name).is_file() for name in ("config.json", safetensors.SINGLE, safetensors.INDEX)
    ):
        return HUGGINGFACE
    if (path / "checkpoint").exists() or any(path.glob("checkpoint_*")):
        return T5X
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such checkpoint or training run")
    if path.is_dir() and not any(path.iterdir()):
        raise CheckpointError(f"{path}: the directory is empty; a checkpoint was expected")
    raise CheckpointError(
        f"{path}: no finished checkpoint: neither m2l's (manifest.json, checkpoints/step_*), nor a "
        "Hugging Face directory (config.json, safetensors), nor one of T5X's (checkpoint_N)"
    )


def open_all(
    paths: Sequence[Path], to: str | None, *, named: bool = True, allowed: Sequence[str] = ()
) -> tuple[list[Source], str]:
    """Opens models; nothing but headers is read yet.

    Args:
        paths: Where they are.
        to: The format to write; None: that of the inputs.
        named: Whether m2l's names of parameters are asked for: of Hugging Face's they cost the
            import of the models.
        allowed: Fields of config.json that are not to be refused for what they say.

    Returns:
        The models, and the format that the merge is to write.

    Raises:
        CheckpointError: One is missing, unfinished or damaged, or is no model to be merged.
        MergeError: There is no such format.
    """
    kinds = [kind(path) for path in paths]
    to = to or (HUGGINGFACE if set(kinds) == {HUGGINGFACE} else ORBAX)
    if to not in FORMATS:
        raise MergeError(f"--to {to}: a merge writes {' or '.join(FORMATS)}")
    native = to == HUGGINGFACE and set(kinds) == {HUGGINGFACE}
    opening: dict[str, Callable[[Path], Source]] = {
        ORBAX: _open_orbax,
        HUGGINGFACE: functools.partial(_open_native, named, allowed) if native else _open_turned,
        T5X: _open_t5x,
    }
    return [opening[found](path) for found, path in zip(kinds, paths, strict=True)], to


def _open_orbax(path: Path) -> Source:
    path = checkpoints.resolve(path)
    manifest = checkpoints.read_manifest(path)
    return Source(
        path,
        ORBAX,
        manifest.digest,
        checkpoints.open_parameters(path),
        {},
        manifest.model,
        manifest.vocabulary,
        tokenizer=path / TOKENIZER if manifest.tokenizer else None,
        manifest=manifest,
    )


def _open_native(named: bool, allowed: Sequence[str], path: Path) -> Source:
    tensors, config = huggingface_directory.open_directory(path, allowed=allowed)
    return Source(
        path,
        HUGGINGFACE,
        _identity(tensors),
        tensors,
        _m2l_names(path, tensors) if named and config else {},
        config,
        None,
        tokenizer=_tokenizer(path),
        native=True,
    )


def _m2l_names(path: Path, tensors: Mapping[str, Any]) -> dict[str, tuple[str, bool]]:
    """m2l's names of tensors; none for a model that m2l has no network for."""
    from m2l.checkpoints import huggingface

    try:
        layout = huggingface.read_layout(path if path.is_dir() else path.parent, tensors)
    except UnsupportedModelError:
        return {}
    return {origin.tensor: (name, origin.transposed) for name, origin in layout.origins.items()}


def _tokenizer(path: Path) -> Path | None:
    directory = path if path.is_dir() else path.parent
    return directory if huggingface_directory.has_tokenizer(directory) else None


def _open_turned(path: Path) -> Source:
    from m2l import models
    from m2l.checkpoints import huggingface

    layout, tensors = huggingface.open_model(path)
    shelf = Shelf()

    def parameter(name: str, origin: Any) -> Stored:
        tensor = tensors[origin.tensor]
        if not origin.transposed:
            return tensor
        return Whole(
            name,
            tensor.shape[::-1],
            tensor.dtype,
            lambda: np.ascontiguousarray(tensor.read_checked().T),
            shelf,
        )

    return Source(
        path,
        HUGGINGFACE,
        _identity(tensors),
        {name: parameter(name, origin) for name, origin in layout.origins.items()},
        {},
        json.loads(json.dumps(models.to_dict(layout.config))),
        None,
        tokenizer=_tokenizer(path),
    )


def _open_t5x(path: Path) -> Source:
    from m2l import models
    from m2l.checkpoints import t5x, t5x_files
    from m2l.checkpoints.importing import check_origins, parameter_shapes

    directory = t5x_files.resolve(path)
    tensors = t5x.read(directory)
    config = t5x.infer_config(tensors)
    origins, shapes = t5x.origins(config, tensors), parameter_shapes(config)
    check_origins(shapes, tensors, origins, source=directory)
    shelf = Shelf()

    def parameter(name: str, shape: tuple[int, ...]) -> Whole:
        tensor, origin = tensors[origins[name].tensor], origins[name]

        def read() -> np.ndarray:
            return np.ascontiguousarray(origin.take(tensor.read()))

        return Whole(name, shape, tensor.dtype, read, shelf)

    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return Source(
        directory,
        T5X,
        _identity_of_files(files),
        {name: parameter(name, shape) for name, shape in shapes.items()},
        {},
        json.loads(json.dumps(models.to_dict(config))),
        None,
    )


class Shelf:
    """Holds the two arrays that were used last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, np.ndarray] = {}

    def take(self, name: str, read: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of that name, read if it is not at hand."""
        with self._lock:
            array = self._held.pop(name, None)
            array = read() if array is None else array
            self._held = dict([*self._held.items(), (name, array)][-2:])
            return array


@dataclasses.dataclass(frozen=True)
class Whole:
    """A parameter that is not stored as m2l lays it out, and is read in one piece.

    Attributes:
        name: Its name.
        shape: Its shape.
        dtype: Its dtype.
        read_all: Reads it, in that shape.
        shelf: Where it is held while parts of it are asked for.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read_all: Callable[[], np.ndarray]
    shelf: Shelf

    @property
    def size(self) -> int:
        """How many elements it has."""
        return int(np.prod(self.shape, dtype=np.int64))

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """Reads elements [start, stop) into `out`."""
        out[:] = self.shelf.take(self.name, self.read_all).reshape(-1)[start:stop]


def held(source: Source) -> int:
    """The bytes that a source itself may hold while its parameters are read."""
    sizes = [
        parameter.size * parameter.dtype.itemsize
        for parameter in source.parameters.values()
        if isinstance(parameter, Whole)
    ]
    return 3 * max(sizes, default=0)


def refuse_nonfinite(sources: Sequence[Source], span: Span) -> None:
    """Raises MergeError naming the first entry of a span that is NaN or infinity, if any is."""
    for source in sources:
        stored = source.parameters[span.name]
        array = np.empty(span.size, stored.dtype)
        stored.read_into(span.start, span.stop, array)
        for index in np.flatnonzero(~np.isfinite(array.astype(np.float32)))[:1]:
            raise MergeError(
                f"{source.path}: {span.name}[{span.start + index}] (row-major) is {array[index]}: "
                "only finite numbers can be merged; use a checkpoint from before the training run "
                "diverged, or it is damaged: m2l inspect --verify"
            )


def _has_digest(stored: Any) -> bool:
    return getattr(stored, "digest", None) is not None


def check_digest(stored: Any) -> None:
    """Raises CheckpointError where a parameter is not what its checkpoint's manifest says.

    One that is read in one piece, or has no digest recorded, is not read here.
    """
    if isinstance(stored, Whole) or (isinstance(stored, StoredTensor) and stored.digest is None):
        return
    digest = hashlib.sha256()
    buffer = np.empty(min(_READ, max(1, stored.size)), stored.dtype)
    for start in range(0, stored.size, _READ):
        part = buffer[: min(_READ, stored.size - start)]
        stored.read_into(start, start + part.size, part)
        digest.update(part.view(np.uint8))
    stored.check(digest.hexdigest())


def _identity(tensors: Mapping[str, Any]) -> str:
    return _identity_of_files(sorted({tensor.file for tensor in tensors.values()}))


def _identity_of_files(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}\n".encode())
        if file.suffix == ".safetensors":
            with open(file, "rb") as opened:
                digest.update(opened.read(1 << 16))
    return digest.hexdigest()
