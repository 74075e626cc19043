"""How a checkpoint lies on disk, and writing one: whole, or piece by piece.

The directory is an Orbax checkpoint. The arrays themselves go through TensorStore, uncompressed
and in chunks of consecutive elements, so that a merge streams models larger than memory.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from m2l.checkpoints import tokenizer
from m2l.checkpoints.manifest import Manifest
from m2l.checkpoints.publishing import publishing
from m2l.checkpoints.trees import flatten, flatten_state, unflatten

PARAMS, OPT_STATE, DATA_STATE = "params", "opt_state", "data_state"
_CHUNK_BYTES = 16 << 20
_BYTES_IN_FLIGHT = 64 << 20

ArraySpec = tuple[tuple[int, ...], Any]  # shape, dtype


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple, int, int]]:
    """Cuts the row-major range [start, stop) into boxes: (index, flat start, flat stop) each."""
    if start == stop:
        return
    if not shape:
        yield (), start, stop
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner
    partial = [(last, start, stop)] if first > last else []
    if first <= last:
        partial = [(first - 1, start, first * inner)] if start < first * inner else []
        if first < last:
            yield (slice(first, last),), first * inner, last * inner
        if last * inner < stop:
            partial.append((last, last * inner, stop))
    for row, begin, end in partial:
        for box, a, b in boxes(shape[1:], begin - row * inner, end - row * inner):
            yield (row, *box), a + row * inner, b + row * inner


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The largest box of consecutive elements that _CHUNK_BYTES hold."""
    elements, chunk = _CHUNK_BYTES // itemsize, []
    for axis, length in enumerate(shape):
        inner = max(1, math.prod(shape[axis + 1 :]))
        chunk.append(max(1, min(length, elements // inner)))
    return tuple(chunk)


def array_spec(item: Path, name: str) -> dict[str, Any]:
    """The TensorStore spec of the array `name` of an Orbax item."""
    base, path = {"driver": "file", "path": f"{item}/"}, name.replace("/", ".") + "/"
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": base, "path": path},
        "recheck_cached_data": "open",
    }


@dataclasses.dataclass
class _Growing:
    """An array on disk that is written from its first element to its last, chunk by chunk."""

    store: ts.TensorStore
    digest: Any = dataclasses.field(default_factory=hashlib.sha256)
    position: int = 0
    pending: list[np.ndarray] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        shape = self.store.shape
        chunk = chunk_shape(shape, self.store.dtype.numpy_dtype.itemsize)
        axis = next((i for i, length in enumerate(chunk) if length > 1), len(shape))
        self._run, self._chunk = math.prod(shape[axis:]), math.prod(chunk)

    def room(self) -> int:
        """How many elements the chunk that is being filled still takes."""
        offset = (self.position + sum(block.size for block in self.pending)) % self._run
        return min((offset // self._chunk + 1) * self._chunk, self._run) - offset


def _settle(futures: Iterable[Any]) -> None:
    """Waits until each has succeeded or failed."""
    for future in futures:
        future.exception()


class Writer:
    """Fills a checkpoint's arrays in pieces; `finish` then describes it. See `writing`."""

    def __init__(self, directory: Path, items: Mapping[str, Mapping[str, ArraySpec]], final: Path):
        """Creates the arrays of `items` (item -> name -> shape, dtype) in `directory`.

        `final` is what the directory will be called.
        """
        self._directory, self._items, self._final = directory, items, final
        self.in_flight: list[Any] = []
        self._bytes = 0
        self.finished = False
        # Orbax writes its own metadata for a tree of scalars of these names, which then make way.
        names = {item: dict.fromkeys(a, np.zeros((), np.int8)) for item, a in items.items() if a}
        ocp.save_checkpointables(directory, {item: unflatten(a) for item, a in names.items()})
        context = ts.Context()
        opening = {
            (item, name): self._create(item, name, described, context)
            for item, arrays in items.items()
            for name, described in arrays.items()
        }
        _settle(opening.values())
        self._arrays = {key: _Growing(store.result()) for key, store in opening.items()}

    def _create(self, item: str, name: str, described: ArraySpec, context: ts.Context) -> Any:
        shape, dtype = tuple(described[0]), np.dtype(described[1])
        grid = {"chunk_shape": chunk_shape(shape, dtype.itemsize)}
        metadata = {
            "shape": shape,
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": grid},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        }
        spec = array_spec(self._directory / item, name)
        spec |= {"metadata": metadata, "store_data_equal_to_fill_value": True}
        return ts.open(spec, create=True, delete_existing=True, context=context)

    def append(self, name: str, block: np.ndarray, item: str = PARAMS) -> None:
        """Adds the next elements, in row-major order, of the array called `name`.

        Args:
            name: The parameter, as "a/b/c".
            block: 1-D, of the array's dtype; it is not copied and must not be changed afterwards.
            item: The Orbax item that the array belongs to.
        """
        array = self._arrays[item, name]
        if block.dtype != array.store.dtype.numpy_dtype:
            raise TypeError(f"{name}: {block.dtype} given, {array.store.dtype.name} declared")
        array.digest.update(np.ascontiguousarray(block).view(np.uint8))
        while block.size:
            room = array.room()
            taken, block = block[:room], block[room:]
            array.pending.append(taken)
            if taken.size == room:
                self._flush(array)

    def _flush(self, array: _Growing) -> None:
        whole = array.pending[0] if len(array.pending) == 1 else np.concatenate(array.pending)
        start, stop = array.position, array.position + whole.size
        for box, a, b in boxes(array.store.shape, start, stop):
            target = array.store[box]
            piece = whole[a - start : b - start].reshape(target.shape)
            self.in_flight.append(target.write(piece, can_reference_source_data_indefinitely=True))
        array.position, array.pending = stop, []
        self._bytes += whole.nbytes
        if self._bytes >= _BYTES_IN_FLIGHT:
            self._wait()

    def _wait(self) -> None:
        for future in self.in_flight:
            future.result()
        self.in_flight, self._bytes = [], 0

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
        """Waits for the arrays to be on disk, then writes the manifest and returns it.

        The files of a vocabulary that is named by its path are copied into the checkpoint.

        Raises:
            CheckpointError: They are not there any more, or the disk is full.
        """
        self._wait()
        records: dict[str, dict] = {item: {} for item in self._items}
        for (item, name), array in self._arrays.items():
            if array.position != array.store.size:
                raise ValueError(f"{name}: {array.position} of {array.store.size} were written")
            shape, dtype = list(array.store.shape), array.store.dtype.name
            digest = array.digest.hexdigest()
            records[item][name] = {"shape": shape, "dtype": dtype, "digest": digest}
        if data_state is not None:
            (self._directory / DATA_STATE).write_bytes(data_state)
        vocabulary, carried = dict(vocabulary), None
        if tokenizer.is_path(vocabulary.get("name")):
            carried = tokenizer.carry(vocabulary["name"], self._directory)
            vocabulary["name"] = tokenizer.name_in(vocabulary["name"], self._final)
        dtypes = {record["dtype"] for record in records[PARAMS].values()}
        manifest = Manifest(
            model=dict(model),
            vocabulary=vocabulary,
            dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
            step=step,
            made_by=dict(made_by),
            parents=tuple(dict(parent) for parent in parents),
            parameters=records[PARAMS],
            opt_state=records.get(OPT_STATE),
            data_state=None if data_state is None else hashlib.sha256(data_state).hexdigest(),
            tokenizer=carried,
        )
        manifest.write(self._directory)
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
    otherwise. Memory held: the chunks being filled and 64 MiB under way.

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
    with publishing(directory, size + (1 << 20)) as temporary:
        writer = Writer(temporary, items, Path(directory).absolute())
        try:
            yield writer
        finally:
            # What is still being written must not appear while a failed checkpoint is removed.
            _settle(writer.in_flight)
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
        for item, arrays in items.items():
            for name, leaf in arrays.items():
                dtype = described[item][name][1]
                writer.append(name, np.asarray(leaf, dtype).reshape(-1), item)
        return writer.finish(
            model=model,
            vocabulary=vocabulary,
            made_by=made_by,
            parents=parents,
            step=step,
            data_state=data_state,
        )
