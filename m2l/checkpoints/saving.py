"""Writing checkpoints: whole, or piece by piece; and the manifest that makes them one."""

import contextlib
import dataclasses
import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from m2l.checkpoints import tokenizer
from m2l.checkpoints.extents import Extents
from m2l.checkpoints.manifest import Manifest
from m2l.checkpoints.orbax import DATA_STATE, OPT_STATE, PARAMS, ArraySpec, create_items
from m2l.checkpoints.publishing import Flusher, publishing
from m2l.checkpoints.streaming import blocks, in_parallel
from m2l.checkpoints.trees import flatten, flatten_state


def describe(
    directory: str | os.PathLike,
    final: str | os.PathLike,
    parameters: Mapping[str, ArraySpec],
    digests: Mapping[str, str],
    *,
    model: Mapping[str, Any],
    vocabulary: Mapping[str, Any],
    made_by: Mapping[str, Any],
    parents: tuple[Mapping[str, str], ...] = (),
    step: int = 0,
    opt_state: Mapping[str, ArraySpec] | None = None,
    opt_state_digests: Mapping[str, str] | None = None,
    data_state: bytes | None = None,
) -> Manifest:
    """Writes the manifest of a checkpoint whose elements are all written.

    The files of a vocabulary that is named by its path are copied into the checkpoint.

    Args:
        directory: Where `create` made the files.
        final: What the directory will be called.
        parameters: name -> (shape, dtype), in the order of the model.
        digests: name -> SHA-256, in hex, of its row-major little-endian bytes.
        model: The model's configuration, as `models.to_dict` gives it.
        vocabulary: {"name", "size", "fingerprint"} of the one it was trained with.
        made_by: What made it, as JSON-like data.
        parents: {"role", "path", "digest"} of each checkpoint it was made from.
        step: The training step.
        opt_state: The optimizer's state: key path -> (shape, dtype); None without one.
        opt_state_digests: As `digests`, of the optimizer's state.
        data_state: The data pipeline's position.

    Raises:
        CheckpointError: The vocabulary's files are not there any more, or the disk is full.
    """
    directory = Path(directory)
    if data_state is not None:
        (directory / DATA_STATE).write_bytes(data_state)
    vocabulary, carried = dict(vocabulary), None
    if tokenizer.is_path(vocabulary.get("name")):
        carried = tokenizer.carry(vocabulary["name"], directory)
        vocabulary["name"] = tokenizer.name_in(vocabulary["name"], Path(final).absolute())
    dtypes = {np.dtype(dtype).name for _, dtype in parameters.values()}
    manifest = Manifest(
        model=dict(model),
        vocabulary=vocabulary,
        dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
        step=step,
        made_by=dict(made_by),
        parents=tuple(dict(parent) for parent in parents),
        parameters=_records(parameters, digests),
        opt_state=None if opt_state is None else _records(opt_state, opt_state_digests or {}),
        data_state=None if data_state is None else hashlib.sha256(data_state).hexdigest(),
        tokenizer=carried,
    )
    manifest.write(directory)
    return manifest


def _records(arrays: Mapping[str, ArraySpec], digests: Mapping[str, str]) -> dict[str, dict]:
    return {
        name: {"shape": list(shape), "dtype": np.dtype(dtype).name, "digest": digests[name]}
        for name, (shape, dtype) in arrays.items()
    }


@dataclasses.dataclass
class _Growing:
    """An array on disk that is written from its first element to its last."""

    extents: Extents
    digest: Any = dataclasses.field(default_factory=hashlib.sha256)
    position: int = 0


class Writer:
    """Fills a checkpoint's arrays in pieces; `finish` then describes it. See `writing`."""

    def __init__(
        self,
        directory: Path,
        final: Path,
        items: Mapping[str, Mapping[str, ArraySpec]],
        hashing: ThreadPoolExecutor,
        flusher: Flusher,
    ):
        """Creates the arrays of `items` (item -> name -> shape, dtype) in `directory`.

        `final` is what the directory will be called.
        """
        self._directory, self._final, self._items = directory, final, items
        self._hashing, self._flusher = hashing, flusher
        self._arrays = {
            (item, name): _Growing(extents)
            for item, arrays in create_items(directory, items).items()
            for name, extents in arrays.items()
        }
        self.finished = False

    def append(self, name: str, block: np.ndarray, item: str = PARAMS) -> None:
        """Adds the next elements, in row-major order, of the array called `name`.

        Several threads may fill as many arrays at once.

        Args:
            name: The parameter, as "a/b/c".
            block: 1-D, contiguous, of the array's dtype.
            item: The Orbax item that the array belongs to.

        Raises:
            CheckpointError: It cannot be written, or the disk is full.
        """
        array = self._arrays[item, name]
        if block.dtype != array.extents.dtype:
            raise TypeError(f"{name}: {block.dtype} given, {array.extents.dtype} declared")
        hashing = self._hashing.submit(array.digest.update, block.view(np.uint8))
        try:
            array.extents.write_from(block, array.position)
        finally:
            hashing.result()
        array.position += block.size
        self._flusher.wrote(array.extents.files(), block.nbytes)

    def finish(
        self,
        *,
        model: Mapping[str, Any],
        vocabulary: Mapping[str, Any],
        made_by: Mapping[str, Any],
        parents: tuple[Mapping[str, str], ...] = (),
        step: int = 0,
        data_state: bytes | None = None,
    ) -> Manifest:
        """Writes the manifest and returns it; see `describe`.

        Raises:
            CheckpointError: The vocabulary's files are not there any more, or the disk is full.
        """
        digests: dict[str, dict[str, str]] = {item: {} for item in self._items}
        for (item, name), array in self._arrays.items():
            if array.position != array.extents.size:
                raise ValueError(
                    f"{name}: {array.position} of {array.extents.size} elements were written"
                )
            digests[item][name] = array.digest.hexdigest()
        manifest = describe(
            self._directory,
            self._final,
            self._items[PARAMS],
            digests[PARAMS],
            model=model,
            vocabulary=vocabulary,
            made_by=made_by,
            parents=parents,
            step=step,
            opt_state=self._items.get(OPT_STATE),
            opt_state_digests=digests.get(OPT_STATE),
            data_state=data_state,
        )
        self.finished = True
        return manifest


@contextlib.contextmanager
def writing(
    directory: str | os.PathLike,
    parameters: Mapping[str, ArraySpec],
    opt_state: Mapping[str, ArraySpec] | None = None,
) -> Iterator[Writer]:
    """Writes a checkpoint piece by piece: `append` every array to its end, then `finish`.

    The directory appears under its name when the block ends without an exception, and never
    otherwise. No block is held once it is appended.

    Args:
        directory: The checkpoint to make; must not exist.
        parameters: name -> (shape, dtype) of everything that will be appended.
        opt_state: The same for the optimizer's state, by key path.

    Raises:
        CheckpointError: `directory` exists or cannot be created, or the disk is full.
    """
    items = {PARAMS: parameters} | ({} if opt_state is None else {OPT_STATE: opt_state})
    shapes = [spec for arrays in items.values() for spec in arrays.values()]
    size = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes)
    with (
        # Three blocks of the file system for each array beside its elements, at the least.
        publishing(directory, size + 12288 * len(shapes) + (1 << 20)) as temporary,
        Flusher() as flusher,
        ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as hashing,
    ):
        writer = Writer(temporary, Path(directory).absolute(), items, hashing, flusher)
        yield writer
        if not writer.finished:
            raise RuntimeError(f"{directory}: the block ended before Writer.finish was called")


def save(
    directory: str | os.PathLike,
    params: Mapping[str, Any],
    *,
    model: Mapping[str, Any],
    vocabulary: Mapping[str, Any],
    made_by: Mapping[str, Any],
    parents: tuple[Mapping[str, str], ...] = (),
    step: int = 0,
    opt_state: Any = None,
    data_state: bytes | None = None,
) -> Manifest:
    """Writes a checkpoint, whole or not at all.

    Args:
        directory: The checkpoint to make; must not exist.
        params: Nested dict of numpy or jax arrays; sharded ones must be addressable from here.
        model: The model's configuration, as `models.to_dict` gives it.
        vocabulary: {"name", "size", "fingerprint"}; if the name is an absolute path, the files of
            the tokenizer there become part of the checkpoint.
        made_by: What made it, as JSON-like data.
        parents: {"role", "path", "digest"} of each checkpoint it was made from.
        step: The training step.
        opt_state: Any pytree of arrays.
        data_state: The data pipeline's position.

    Raises:
        CheckpointError: `directory` exists or cannot be created, the disk is full, or a parameter
            has a name that cannot be stored; or the vocabulary's files are gone.
    """
    items = {PARAMS: flatten(params)}
    if opt_state is not None:
        items[OPT_STATE] = flatten_state(opt_state)
    described = {
        item: {
            name: (np.shape(leaf), np.dtype(jax.dtypes.result_type(leaf)))
            for name, leaf in arrays.items()
        }
        for item, arrays in items.items()
    }
    with writing(directory, described[PARAMS], described.get(OPT_STATE)) as writer:

        def write(place: tuple[str, str]) -> None:
            item, name = place
            dtype = described[item][name][1]
            for block in blocks(np.asarray(items[item][name], dtype), dtype, name):
                writer.append(name, block, item)

        in_parallel(write, [(item, name) for item, arrays in items.items() for name in arrays])
        return writer.finish(
            model=model,
            vocabulary=vocabulary,
            made_by=made_by,
            parents=parents,
            step=step,
            data_state=data_state,
        )
