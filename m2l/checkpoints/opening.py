"""Opens whatever checkpoint is stored at a path: the one place that finds out what it is.

m2l's own checkpoints and runs, any pytree that Orbax stored, Hugging Face directories and T5X
checkpoints, and BASE+ADAPTER and BASE+DELTA of any of these; nothing but headers and metadata is
read.
"""

import dataclasses
import functools
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from m2l import files, storage
from m2l.checkpoints import (
    adapters,
    deltas,
    digest,
    huggingface_directory,
    model_fields,
    pytrees,
    reading,
    safetensors,
    tensor_kinds,
    tokenizer,
)
from m2l.checkpoints.adapters import Adapter
from m2l.checkpoints.deltas import Delta
from m2l.checkpoints.manifest import Manifest, is_checkpoint
from m2l.checkpoints.pytrees import Tree
from m2l.checkpoints.spans import LazyTensor, TensorReader, cached_reader, read_whole
from m2l.errors import CheckpointError, UnsupportedModelError
from m2l.storage import AnyPath
from m2l.typing import Json

if TYPE_CHECKING:
    from m2l.checkpoints import huggingface

ORBAX, HUGGINGFACE, T5X = "orbax", "huggingface", "t5x"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of any kind.

    Attributes:
        path: Where it is: of a run its newest step, of what Orbax stored the item.
        format: "orbax", "huggingface" or "t5x".
        parameters: Its tensors by name.
        ours: m2l's name of each, where it has another, and whether it is stored transposed.
        model: Its configuration: m2l's, or config.json; empty where it is not known.
        vocabulary: m2l's description of its vocabulary, or None.
        tokenizer: A local directory with the tokenizer's files, or None.
        manifest: m2l's manifest, or None.
        native: Whether names and layouts are Hugging Face's.
        tree: Orbax's description of the pytree, where it is one.
        strings: Its leaves that are texts, by name.
        rows: By what its rows of tokens were re-indexed, as a digest; empty where they were not.
        adapted: The base and the adapter or delta that make it together, where it is BASE+ADAPTER
            or BASE+DELTA.
    """

    path: AnyPath
    format: str
    parameters: Mapping[str, TensorReader]
    ours: Mapping[str, tuple[str, bool]]
    model: Mapping[str, Json]
    vocabulary: Mapping[str, Json] | None
    tokenizer: Path | None = None
    manifest: Manifest | None = None
    native: bool = False
    tree: Tree | None = None
    strings: Mapping[str, str] | None = None
    rows: str = ""
    adapted: "tuple[Checkpoint, Adapter | Delta] | None" = None

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256, in hex, that identifies it: its manifest's, or that of its files' content.

        Of what other programs stored through Orbax, that of Orbax's metadata, and of the names,
        sizes and times of files, or the names of objects. A delta without loss has its expert's.
        """
        if self.delta is not None and self.delta.is_lossless:
            return self.delta.expert["digest"]
        if self.adapted is not None:
            return files.checksum([part.digest for part in self.adapted])
        if self.manifest is not None:
            return self.manifest.digest
        if self.format == HUGGINGFACE:
            weights = {
                tensor.file for tensor in self.parameters.values() if tensor.file is not None
            }
            config = self.directory / huggingface_directory.CONFIG
            return files.content_digest([*sorted(weights), *([config] * config.is_file())])
        return files.directory_digest(self.path)

    @property
    def directory(self) -> AnyPath:
        """Where the files are that belong to the model: of an adapted one its base's."""
        if self.delta is not None and self.delta.native:
            return self.delta.files
        return _directory(self.path) if self.adapted is None else self.adapted[0].directory

    @property
    def delta(self) -> Delta | None:
        """The delta that makes it of its base; None where there is none."""
        return self.adapted[1] if self.adapted and isinstance(self.adapted[1], Delta) else None

    @functools.cached_property
    def content_digest(self) -> str:
        """Its digest, or where that depends on files' times, one of its parameters' elements."""
        if self.adapted is not None or self.manifest is not None or self.format == HUGGINGFACE:
            return self.digest
        tensors = self.parameters.items()
        words = [[name, digest.to_hex(digest.of_stored(tensor))] for name, tensor in tensors]
        return files.checksum(
            [*words, [[*tensor.shape, tensor.dtype.name] for _, tensor in tensors]]
        )

    @property
    def paths(self) -> tuple[AnyPath, ...]:
        """Where all that it is made of is stored."""
        if self.adapted is None:
            return (self.path,)
        base, adapter = self.adapted
        return (*base.paths, adapter.path)

    @property
    def has_digests(self) -> bool:
        """Whether digests of its parameters are recorded."""
        return any(recorded_digest(tensor) is not None for tensor in self.parameters.values())

    def name_of(self, name: str) -> tuple[str, bool]:
        """Returns m2l's name of a parameter, and whether it is stored transposed."""
        return self.ours.get(name, (name, False))

    @functools.cached_property
    def tensor_names(self) -> tuple[dict[str, tuple[str, bool]], set[str]]:
        """Hugging Face's names of its tensors -> the parameter's and whether it is transposed.

        And the parameters that are embedding and output in one.

        Raises:
            CheckpointError: It does not say which model it is of.
        """
        if self.native:
            names = {name: (name, False) for name in self.parameters}
            tied = {name for name in names if tensor_kinds.is_input(name)}
            return names, tied if model_fields.ties_embeddings(self.model) else set()
        from m2l import models
        from m2l.checkpoints import huggingface

        if not self.model:
            raise CheckpointError(
                f"{self.path}: it does not say which model it is of, and an adapter names modules "
                "as Hugging Face does"
            )
        config = models.from_dict(self.model)
        names = {
            origin.tensor: (name, origin.transposed)
            for name, origin in huggingface.origins(config).items()
            if origin.is_stored
        }
        return names, {"token_embedder"} if config.tie_word_embeddings else set()

    @functools.cached_property
    def joined_names(self) -> set[str]:
        """Hugging Face's names of tensors that are no single parameter here; see `tensor_names`."""
        if self.native:
            return set()
        from m2l import models
        from m2l.checkpoints import huggingface

        origins = huggingface.origins(models.from_dict(self.model)).values()
        return {name for origin in origins if not origin.is_stored for name in origin.tensors}

    @functools.cached_property
    def description(self) -> Mapping[str, Json]:
        """The fields of its configuration that decide what it computes."""
        return model_fields.normalized(self.model)

    @functools.cached_property
    def copies(self) -> Mapping[str, str]:
        """Tensors that repeat others bit for bit, copy -> original; see `tensor_kinds.copies`."""
        return tensor_kinds.copies(self.parameters) if self.native else {}


def recorded_digest(tensor: TensorReader) -> str | None:
    """Returns the digest that is recorded of a tensor, of 128 bits or SHA-256; None without one."""
    return getattr(tensor, "digest", None)


def read_checked(tensor: TensorReader) -> np.ndarray:
    """Reads a tensor whole, and compares its digest where that is of 128 bits.

    Raises:
        CheckpointError: It is damaged.
    """
    array, recorded = read_whole(tensor), recorded_digest(tensor)
    if recorded is not None and digest.is_digest(recorded):
        tensor.check(digest.to_hex(digest.of_numpy(array)))
    return array


def kind(path: AnyPath) -> str:
    """Returns "orbax", "huggingface" or "t5x", by what is stored at a path.

    Raises:
        CheckpointError: Nothing that m2l can open.
    """
    path = storage.path(path)
    if (parts := adapters.split(path)) is not None:
        if not deltas.is_delta(parts[1]):
            return kind(parts[0])
        return HUGGINGFACE if deltas.read(parts[1]).native else ORBAX
    if has_manifest(path):
        return ORBAX
    if path.exists():
        tensor_kinds.check_no_adapter(path)
    if path.suffix == ".safetensors" or any(
        (path / name).is_file() for name in ("config.json", safetensors.SINGLE, safetensors.INDEX)
    ):
        return HUGGINGFACE
    if _is_t5x(path) or any(map(_is_t5x, path.glob("checkpoint_*"))):
        return T5X
    if _orbax_item(path) is not None:
        return ORBAX
    if not path.exists():
        raise reading.missing(path)
    if path.is_dir() and not any(path.iterdir()):
        raise CheckpointError(f"{path}: the directory is empty; a checkpoint was expected")
    if path.suffix == ".gguf":
        raise CheckpointError(f"{path}: m2l convert {path} DIR makes a directory that can be read")
    inside = [
        child.name
        for child in (sorted(path.iterdir()) if path.is_dir() else ())
        if child.is_dir() and (has_manifest(child) or (child / "config.json").is_file())
    ]
    if path.is_dir() and not inside:
        pytrees.find_item(path)  # Which says what is missing, or unfinished.
    raise CheckpointError(
        f"{path}: no finished checkpoint: neither one of m2l's or of Orbax, nor a Hugging Face "
        "directory (config.json, safetensors), nor one of T5X's (checkpoint_N)"
        + (f"; in it are {', '.join(inside[:5])}" if inside else "")
    )


def _is_t5x(path: AnyPath) -> bool:
    """Returns whether a directory is a checkpoint of T5X, whose names other programs use too."""
    if (path / "checkpoint").is_file():
        return True
    metadata = path / "state" / pytrees.METADATA
    if not (path / "state").is_dir():
        return False
    return not metadata.is_file() or "('target'," in metadata.read_text(errors="replace")


def has_manifest(path: AnyPath) -> bool:
    """Returns whether a path is a checkpoint, run or directory of steps that m2l wrote."""
    path = storage.path(path)
    return is_checkpoint(path) or bool(reading.steps(path / reading.STEPS) or reading.steps(path))


def _orbax_item(path: AnyPath) -> AnyPath | None:
    """Returns the directory of the pytree that Orbax stored at a path; None: there is none."""
    for place in (path, path / reading.STEPS):
        if place.is_dir():
            try:
                return pytrees.find_item(place)
            except CheckpointError:
                if place != path:
                    raise
    return None


def open(
    path: AnyPath,
    *,
    subtree: str | None = None,
    native: bool = False,
    named: bool = True,
    allowed: Collection[str] = (),
) -> Checkpoint:
    """Opens a checkpoint; its tensors are read only when they are asked for.

    Args:
        path: A local path, gs:// or s3://: a checkpoint of m2l's, a run or its directory of steps,
            of which the newest is meant; a pytree that Orbax stored, or a step, or a folder of
            steps; a Hugging Face directory or file; a T5X checkpoint; BASE+ADAPTER or BASE+DELTA,
            one of these and an adapter's or a delta's directory.
        subtree: Of a pytree, the part that is meant, as "params"; names do not have it.
        native: Whether a Hugging Face directory keeps its own names and layouts; else they are
            m2l's.
        named: Whether m2l's names are asked for as well, which cost the import of the models.
        allowed: Fields of config.json that are not to be refused for what they say.

    Raises:
        CheckpointError: It is missing, unfinished or damaged, an adapter, or quantised; there is no
            such subtree.
        UnsupportedModelError: m2l has no network for it, and needs one.
    """
    path = storage.path(path).absolute()
    if (parts := adapters.split(path)) is not None:
        options = {"subtree": subtree, "native": native, "named": named, "allowed": allowed}
        if deltas.is_delta(parts[1]):
            return _restore(path, parts[0], deltas.read(parts[1]), options)
        return _adapt(path, open(parts[0], **options), adapters.read(parts[1]))
    stored_as = kind(path)
    if subtree is not None and stored_as != ORBAX:
        raise CheckpointError(f"{path}: of a pytree that Orbax stored alone is there a subtree")
    if stored_as == HUGGINGFACE:
        return _open_native(path, named, allowed) if native else _open_converted(path)
    if stored_as == T5X:
        return _open_t5x(path)
    if subtree is None and has_manifest(path):
        return _open_own(path)
    return _open_pytree(path, subtree)


def _open_own(path: AnyPath) -> Checkpoint:
    path = reading.resolve(path)
    manifest = Manifest.read(path)
    manifest.check_whole(path)
    carried = None
    if manifest.tokenizer is not None:
        carried = tokenizer.local_copy(path, manifest.tokenizer)
    known = manifest.vocabulary["fingerprint"] is not None
    pytree = reading.open_recorded(path, reading.PARAMS, manifest.parameters)
    return Checkpoint(
        path,
        ORBAX,
        pytree.arrays,
        {},
        manifest.model,
        manifest.vocabulary if known else None,
        tokenizer=carried,
        manifest=manifest,
        tree=pytree.tree,
        strings=pytree.strings,
    )


def _open_pytree(path: AnyPath, subtree: str | None) -> Checkpoint:
    pytree = pytrees.open_pytree(_orbax_item(path), subtree)
    trees = {"tree": pytree.tree, "strings": pytree.strings}
    return Checkpoint(pytree.item, ORBAX, pytree.arrays, {}, {}, None, **trees)


def _adapt(path: AnyPath, base: Checkpoint, adapter: Adapter) -> Checkpoint:
    """Returns the model that a base and an adapter make."""
    names, tied = base.tensor_names
    adapter.warn_of_another_base(base.path, lambda: base.digest)
    return dataclasses.replace(
        base,
        path=path,
        parameters=adapter.apply(
            base.parameters, names, tied=tied, source=base.path, joined=base.joined_names
        ),
        tokenizer=adapter.tokenizer or base.tokenizer,
        manifest=None,
        adapted=(base, adapter),
    )


def _restore(
    path: AnyPath, base_path: AnyPath, delta: Delta, options: Mapping[str, Json]
) -> Checkpoint:
    """Returns the model that a base and a delta make."""
    base = open(base_path, **{**options, "native": delta.native, "named": False})
    delta.check_base(base.path, base.content_digest)
    tensors = delta.apply(base.parameters)
    common = {"tokenizer": delta.tokenizer, "manifest": None, "adapted": (base, delta)}
    if not delta.native:
        vocabulary = delta.vocabulary
        if vocabulary is not None and common["tokenizer"] is not None:
            name = tokenizer.name_in(vocabulary["name"], common["tokenizer"])
            vocabulary = {**vocabulary, "name": name}
        common |= {"format": ORBAX, "native": False, "ours": {}}
        return dataclasses.replace(
            base, path=path, parameters=tensors, model=delta.model, vocabulary=vocabulary, **common
        )
    if options["native"]:
        ours = _m2l_names(delta.files, tensors) if options["named"] and delta.model else {}
        return dataclasses.replace(
            base, path=path, parameters=tensors, model=delta.model, ours=ours, **common
        )
    from m2l.checkpoints import huggingface

    layout = huggingface.checked_layout(delta.files, tensors, path)
    return dataclasses.replace(_converted(path, layout, tensors), **common)


def _directory(path: AnyPath) -> AnyPath:
    return path if path.is_dir() else path.parent


def _open_native(path: AnyPath, named: bool, allowed: Collection[str]) -> Checkpoint:
    tensors, config = huggingface_directory.open_directory(path, allowed=allowed)
    return Checkpoint(
        path,
        HUGGINGFACE,
        tensors,
        _m2l_names(path, tensors) if named and config else {},
        config,
        None,
        tokenizer=_tokenizer(path),
        native=True,
    )


def _m2l_names(
    path: AnyPath, tensors: Mapping[str, safetensors.StoredTensor]
) -> dict[str, tuple[str, bool]]:
    """Returns m2l's names of tensors; none for a model that m2l has no network for.

    A tensor that joins several parameters, or is a part of one, has none either.
    """
    from m2l.checkpoints import huggingface

    try:
        layout = huggingface.read_layout(_directory(path), tensors)
    except UnsupportedModelError:
        return {}
    return {
        origin.tensor: (name, origin.transposed)
        for name, origin in layout.origins.items()
        if origin.is_stored
    }


def _tokenizer(path: AnyPath) -> Path | None:
    directory = _directory(path)
    if not huggingface_directory.has_tokenizer(directory):
        return None
    return huggingface_directory.local_tokenizer(directory)


def _open_converted(path: AnyPath) -> Checkpoint:
    from m2l.checkpoints import huggingface

    opened = _converted(path, *huggingface.open_model(path))
    return dataclasses.replace(opened, tokenizer=_tokenizer(path))


def _converted(
    path: AnyPath, layout: "huggingface.Layout", tensors: Mapping[str, TensorReader]
) -> Checkpoint:
    """Returns a Hugging Face model under m2l's names and layouts."""
    from m2l import models

    origins = layout.origins
    read = cached_reader(
        lambda name: np.ascontiguousarray(
            origins[name].read(lambda tensor: tensors[tensor].read_checked())
        )
    )
    parameters: dict[str, TensorReader] = {}
    for name, origin in origins.items():
        tensor = parameters[name] = tensors[origin.tensor]
        if origin.transposed or not origin.is_stored:
            shape = origin.shape(tensor.shape)
            parameters[name] = LazyTensor(name, shape, tensor.dtype, read, tensor.file)
    model = json.loads(json.dumps(models.to_dict(layout.config)))
    return Checkpoint(path, HUGGINGFACE, parameters, {}, model, None)


def _open_t5x(path: AnyPath) -> Checkpoint:
    from m2l import models
    from m2l.checkpoints import t5x
    from m2l.checkpoints.importing import check_origins, parameter_shapes

    directory = t5x.resolve(path)
    tensors = t5x.read(directory)
    config = t5x.infer_config(tensors)
    origins, shapes = t5x.origins(config, tensors), parameter_shapes(config)
    check_origins(shapes, tensors, origins, source=directory)
    sources = {name: tensors[origin.tensor] for name, origin in origins.items()}
    read = cached_reader(
        lambda name: np.ascontiguousarray(origins[name].take(sources[name].read()))
    )
    parameters = {
        name: LazyTensor(name, shape, sources[name].dtype, read) for name, shape in shapes.items()
    }
    model = json.loads(json.dumps(models.to_dict(config)))
    return Checkpoint(directory, T5X, parameters, {}, model, None)
