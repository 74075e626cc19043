"""Writing checkpoints that Orbax reads, other than a training run's: whole or piece by piece.

Arrays are zarr 3 without compression, each chunk an object of its own. What makes a checkpoint of
them, Orbax's metadata with m2l's manifest, is written last. The training loop's checkpoints are
written by Orbax itself: see `run_checkpoints`.
"""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict, TypeVar, Unpack

import jax
import numpy as np
from jax.typing import ArrayLike

from m2l import distributed, storage
from m2l.checkpoints import digest, pytrees, tokenizer
from m2l.checkpoints.digest import NOTHING
from m2l.checkpoints.manifest import ORBAX_METADATA, Manifest, custom_metadata
from m2l.checkpoints.publishing import publishing
from m2l.checkpoints.pytrees import Tree, flatten, flatten_state
from m2l.checkpoints.reading import DATA_STATE, OPT_STATE, PARAMS, data_state_digest
from m2l.checkpoints.spans import ArraySpec, boxes, in_parallel
from m2l.checkpoints.tokenizer import DIRECTORY as TOKENIZER
from m2l.checkpoints.zarr import Box, TensorWriter, chunk_shape
from m2l.errors import CheckpointError
from m2l.storage import AnyPath, PathLike
from m2l.typing import Json, Params, PyTree

K = TypeVar("K")

_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"


def array_directory(item: AnyPath, name: str, tree: Tree | None = None) -> AnyPath:
    """Returns where Orbax stores an array of an item with that tree; None: nested dicts."""
    node = (tree or {}).get(name)
    return item / (name.replace("/", ".") if node is None else pytrees.stored_name(node))


class ManifestFields(TypedDict):
    """What is recorded of a checkpoint, as keyword arguments.

    Attributes:
        model: The model's configuration, as `models.to_dict` returns it.
        vocabulary: {"name", "size", "fingerprint"} of the one it was trained with; if the name is
            an absolute path, the files of the tokenizer there become part of the checkpoint.
        made_by: What made it, as JSON values.
        parents: {"role", "path", "digest"} of each checkpoint it was made from.
        data_state: The positions in the data, one of each share.
    """

    model: Mapping[str, Json]
    vocabulary: Mapping[str, Json]
    made_by: Mapping[str, Json]
    parents: NotRequired[tuple[Mapping[str, str], ...]]
    data_state: NotRequired[list[bytes] | None]


def describe(
    directory: AnyPath,
    parameters: Mapping[str, ArraySpec],
    digests: Mapping[str, str],
    *,
    step: int = 0,
    opt_state: Mapping[str, ArraySpec] | None = None,
    opt_state_digests: Mapping[str, str] | None = None,
    opt_state_tree: Tree | None = None,
    tree: Tree | None = None,
    strings: Mapping[str, str] | None = None,
    **fields: Unpack[ManifestFields],
) -> Manifest:
    """Makes a checkpoint of a directory whose arrays are all written.

    Args:
        directory: Where the arrays are, in the items "params" and "opt_state".
        parameters: name -> (shape, dtype), in the order of the model.
        digests: name -> digest, as `digest.to_hex` returns it.
        step: The training step.
        opt_state: The optimizer's state: key path -> (shape, dtype); None without one.
        opt_state_digests: As `digests`, of the optimizer's state.
        opt_state_tree: Orbax's description of the optimizer's state.
        tree: Orbax's description of the parameters' tree; None: nested dicts.
        strings: The leaves of that tree that are texts, by name.
        **fields: What is recorded, see `ManifestFields`.

    Raises:
        CheckpointError: The vocabulary's files are not there any more, or the disk is full.
    """
    manifest, files = new_manifest(
        parameters, digests, step, opt_state, opt_state_digests, **fields
    )
    items = {PARAMS: tree or pytrees.tree_of(list(parameters))}
    if opt_state:
        items[OPT_STATE] = opt_state_tree or pytrees.tree_of(list(opt_state))
    positions = numbered(fields.get("data_state"))
    for item, content in ((DATA_STATE, positions), (TOKENIZER, files)):
        if content:
            _write_bytes(directory / item, content)
            items[item] = pytrees.tree_of(list(content), separator=None)
    finish(directory, items, custom_metadata(manifest), {PARAMS: strings or {}})
    # The vocabulary is then named by its local copy, and not by files that may be removed.
    return Manifest.read(directory) if files else manifest


def new_manifest(
    parameters: Mapping[str, ArraySpec],
    digests: Mapping[str, str],
    step: int,
    opt_state: Mapping[str, ArraySpec] | None,
    opt_state_digests: Mapping[str, str] | None,
    *,
    model: Mapping[str, Json],
    vocabulary: Mapping[str, Json],
    made_by: Mapping[str, Json],
    parents: tuple[Mapping[str, str], ...] = (),
    data_state: list[bytes] | None = None,
) -> tuple[Manifest, dict[str, bytes]]:
    """Returns the manifest of a checkpoint, and the files of the tokenizer that it carries."""
    vocabulary, files = dict(vocabulary), {}
    if tokenizer.is_path(vocabulary.get("name")):
        files = tokenizer.read_files(vocabulary["name"])
    dtypes = {np.dtype(dtype).name for _, dtype in parameters.values()}
    manifest = Manifest(
        model=dict(model),
        vocabulary=vocabulary,
        dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
        step=step,
        made_by=dict(made_by),
        parents=tuple(dict(parent) for parent in parents),
        parameters=array_records(parameters, digests),
        opt_state=None if opt_state is None else array_records(opt_state, opt_state_digests or {}),
        data_state=None if data_state is None else data_state_digest(data_state),
        tokenizer=tokenizer.digests(files) if files else None,
    )
    return manifest, files


def finish(
    directory: AnyPath,
    items: Mapping[str, Tree],
    custom: Mapping[str, Json] | None,
    strings: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Writes Orbax's metadata of items whose arrays are written: then it is a checkpoint.

    Args:
        directory: The checkpoint's directory.
        items: Name of an item -> Orbax's description of its tree.
        custom: The custom metadata of the checkpoint.
        strings: Name of an item -> its leaves that are texts, by name.

    Raises:
        CheckpointError: A file cannot be written.
    """
    content = {
        # Orbax has no item without an array.
        "item_handlers": {item: _HANDLER for item, tree in items.items() if tree},
        "metrics": {},
        "performance_metrics": {},
        # Orbax's may be absent, and equal checkpoints are to be equal files.
        "init_timestamp_nsecs": None,
        "commit_timestamp_nsecs": None,
        "custom_metadata": dict(custom or {}),
    }
    try:
        for item, tree in items.items():
            if tree:
                (directory / item).mkdir(parents=True, exist_ok=True)
                pytrees.write_metadata(directory / item, tree, (strings or {}).get(item))
                (directory / item / pytrees.COMMITTED).write_text(f"committed {item}\n")
        (directory / "orbax.checkpoint").write_bytes(b"\n")
        storage.write_atomic(directory / ORBAX_METADATA, json.dumps(content))
        (directory / pytrees.COMMITTED).write_text("committed\n")
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or directory}: cannot be written ({error.strerror})"
        ) from error


def numbered(shares: list[bytes] | None) -> dict[str, bytes]:
    """Returns the positions in the data as files by the number of the share."""
    return {f"{number:05}": share for number, share in enumerate(shares or [])}


def _write_bytes(item: AnyPath, content: Mapping[str, bytes]) -> None:
    """Writes files as an item of arrays of bytes, which every version of Orbax restores."""
    for name, data in content.items():
        array = np.frombuffer(data, np.uint8)
        shape = array.shape
        writer = TensorWriter(item / name, name, shape, array.dtype, (max(1, array.size),))
        writer.create()
        if array.size:
            writer.write((slice(0, array.size),), array)


def array_records(arrays: Mapping[str, ArraySpec], digests: Mapping[str, str]) -> dict[str, dict]:
    """Returns what a manifest says of arrays."""
    return {
        name: {"shape": list(shape), "dtype": np.dtype(dtype).name, "digest": digests[name]}
        for name, (shape, dtype) in arrays.items()
    }


@dataclasses.dataclass
class _Growing:
    """An array in storage that is written from its first element to its last."""

    writer: TensorWriter
    boxes: Iterator[Box]
    chunk: np.ndarray | None = None
    filled: int = 0
    position: int = 0
    digest: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(4, np.uint32))

    def append(self, block: np.ndarray) -> None:
        """Adds elements; writes each chunk that they fill."""
        self.position += block.size
        while block.size:
            if self.chunk is None:
                box = next(self.boxes)
                sides = [axis.stop - axis.start for axis in box]
                self.box, self.filled = box, 0
                self.chunk = np.empty(math.prod(sides), self.writer.dtype)
                self.sides = sides
            count = min(block.size, self.chunk.size - self.filled)
            self.chunk[self.filled : self.filled + count] = block[:count]
            self.filled, block = self.filled + count, block[count:]
            if self.filled == self.chunk.size:
                self.writer.write(self.box, self.chunk.reshape(self.sides))
                self.chunk = None


class Writer:
    """Fills a checkpoint's arrays in pieces; `finish` then describes it. See `writing`."""

    def __init__(self, directory: AnyPath, parameters: Mapping[str, ArraySpec]):
        """Creates arrays, name -> (shape, dtype), in a directory."""
        self._directory, self._parameters = directory, parameters
        self._arrays: dict[str, _Growing] = {}
        for name, (shape, dtype) in parameters.items():
            writer = _create(directory / PARAMS, name, tuple(shape), np.dtype(dtype))
            self._arrays[name] = _Growing(writer, boxes(writer.shape, writer.chunk))
        self.finished = False

    def append(self, name: str, block: np.ndarray) -> None:
        """Adds the next elements, in row-major order, of the array called `name`.

        Several threads may fill as many arrays at once.

        Args:
            name: The parameter, as "a/b/c".
            block: 1-D, contiguous, of the array's dtype.

        Raises:
            CheckpointError: It cannot be written, or the disk is full.
        """
        array = self._arrays[name]
        if block.dtype != array.writer.dtype:
            raise TypeError(f"{name}: {block.dtype} given, {array.writer.dtype} declared")
        array.digest = digest.add(array.digest, digest.of_numpy(block, array.position))
        array.append(block)

    def finish(
        self,
        *,
        step: int = 0,
        tree: Tree | None = None,
        strings: Mapping[str, str] | None = None,
        **fields: Unpack[ManifestFields],
    ) -> Manifest:
        """Writes the manifest and returns it; see `describe`.

        Raises:
            CheckpointError: The vocabulary's files are not there any more, or the disk is full.
        """
        for name, array in self._arrays.items():
            size = math.prod(array.writer.shape)
            if array.position != size:
                raise ValueError(f"{name}: {array.position} of {size} elements were written")
        digests = {name: digest.to_hex(array.digest) for name, array in self._arrays.items()}
        options = {"step": step, "tree": tree, "strings": strings}
        manifest = describe(self._directory, self._parameters, digests, **options, **fields)
        self.finished = True
        return manifest


def _create(
    item: AnyPath,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    shard: tuple[int, ...] | None = None,
) -> TensorWriter:
    chunk = chunk_shape(shape, dtype.itemsize)
    if shard not in (None, shape):
        chunk = _shard_chunk(shard, dtype.itemsize)
    writer = TensorWriter(array_directory(item, name), name, shape, dtype, chunk)
    writer.create()
    return writer


def _shard_chunk(shard: tuple[int, ...], itemsize: int, limit: int = 8 << 20) -> tuple[int, ...]:
    """Returns a chunk that divides a shard evenly, so that no two processes write one chunk."""
    chunk = list(shard)
    for axis, length in enumerate(shard):
        inner = itemsize * math.prod(chunk) // length
        most = max(1, limit // inner)
        if most >= length:
            break
        divisor = next(d for d in range(most, 0, -1) if length % d == 0)
        if 4 * divisor >= most:
            chunk[axis] = divisor
    return tuple(chunk)


@contextlib.contextmanager
def writing(directory: PathLike, parameters: Mapping[str, ArraySpec]) -> Iterator[Writer]:
    """Writes a checkpoint piece by piece: `append` every array to its end, then `finish`.

    The checkpoint appears under its name when the block ends without an exception, and never
    otherwise. No more than a chunk of each array is held once it is appended.

    Args:
        directory: The checkpoint to make; must not exist.
        parameters: name -> (shape, dtype) of everything that will be appended.

    Raises:
        CheckpointError: `directory` exists or cannot be created, or the disk is full.
    """
    directory = storage.path(directory).absolute()
    with publishing(directory, _size(parameters)) as staging:
        writer = Writer(staging, parameters)
        yield writer
        if not writer.finished:
            raise RuntimeError(f"{directory}: the block ended before Writer.finish was called")


def check_space(directory: Path, items: Sequence[Mapping[str, ArraySpec]]) -> None:
    """Raises CheckpointError if the file system of a local directory has no space for arrays."""
    size, parent = sum(map(_size, items)), directory.parent
    if parent.is_dir() and (free := shutil.disk_usage(parent).free) < size:
        raise CheckpointError(
            f"{directory}: no space left: {size:,} bytes are needed, {free:,} are free in {parent}"
        )


def _size(arrays: Mapping[str, ArraySpec]) -> int:
    """Returns the bytes that arrays take at least, with three blocks of the disk for each."""
    elements = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays.values())
    return elements + 12288 * len(arrays) + (1 << 20)


def save(
    directory: PathLike,
    params: Params,
    *,
    step: int = 0,
    opt_state: PyTree = None,
    **fields: Unpack[ManifestFields],
) -> Manifest:
    """Writes a checkpoint, whole or not at all.

    Where arrays are sharded over several processes, all of them call it, and each writes its own
    shards to storage that all see.

    Args:
        directory: The checkpoint to make; must not exist.
        params: Nested dict of numpy or jax arrays.
        step: The training step.
        opt_state: A pytree of arrays; None: no item of it.
        **fields: What is recorded, see `ManifestFields`.

    Raises:
        CheckpointError: `directory` exists or cannot be created, the disk is full, or a parameter
            has a name that cannot be stored; or the vocabulary's files are gone.
    """
    directory = storage.path(directory).absolute()
    items = {PARAMS: flatten(params)}
    if opt_state is not None:
        items[OPT_STATE] = flatten_state(opt_state)
    specs = {item: specs_of(arrays) for item, arrays in items.items()}
    leaves = [leaf for arrays in items.values() for leaf in arrays.values()]
    together = any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in leaves)
    size = sum(map(_size, specs.values()))
    with publishing(directory, size, together=together) as staging:
        parts = [
            (item, name, part)
            for item, arrays in items.items()
            for name, leaf in arrays.items()
            for part in _parts(staging / item, name, leaf, specs[item][name], together)
        ]
        words = {(item, name): NOTHING for item, arrays in items.items() for name in arrays}

        def add_words(result: tuple[str, str, np.ndarray]) -> None:
            item, name, part = result
            words[item, name] = digest.add(words[item, name], part)

        in_parallel(lambda part: (*part[:2], _write(part[2])), parts, add_words)
        if together:
            words = summed(directory, words)
        digests: dict[str, dict[str, str]] = {item: {} for item in items}
        for (item, name), each in words.items():
            digests[item][name] = digest.to_hex(each)
        if not together or jax.process_index() == 0:
            return describe(
                staging,
                specs[PARAMS],
                digests[PARAMS],
                step=step,
                opt_state=specs.get(OPT_STATE),
                opt_state_digests=digests.get(OPT_STATE),
                opt_state_tree=None if opt_state is None else pytrees.tree_from(opt_state),
                **fields,
            )
    return Manifest.read(directory)  # which the first process wrote


def summed(directory: AnyPath, words: Mapping[K, np.ndarray]) -> dict[K, np.ndarray]:
    """Adds up digests, of which each process has a part, in process 0, when all have theirs."""
    parts = np.stack([NOTHING, *words.values()])
    total = distributed.sum_at_first(f"{directory} digests", parts)
    return dict(zip(words, total[1:], strict=True))


def specs_of(arrays: Mapping[str, ArrayLike]) -> dict[str, ArraySpec]:
    """Returns the shape and dtype of arrays by name."""
    return {
        name: (np.shape(leaf), np.dtype(jax.dtypes.result_type(leaf)))
        for name, leaf in arrays.items()
    }


@dataclasses.dataclass(frozen=True)
class _Part:
    """Some of an array, which one process writes: `elements` begin at `origin`."""

    writer: TensorWriter
    elements: jax.Array | np.ndarray
    origin: tuple[int, ...]


def _parts(
    item: AnyPath, name: str, leaf: ArrayLike, spec: ArraySpec, together: bool
) -> Iterator[_Part]:
    """Creates an array in storage and yields the parts of it that are this process's to write."""
    shape, dtype = spec
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        writer = _create(item, name, shape, dtype)
        if not together or jax.process_index() == 0:
            elements = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf, dtype)
            yield _Part(writer, elements, (0,) * len(shape))
        return
    writer = _create(item, name, shape, dtype, tuple(leaf.sharding.shard_shape(shape)))
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            yield _Part(writer, shard.data, tuple(axis.start or 0 for axis in shard.index))


def _write(part: _Part) -> np.ndarray:
    """Writes a part and returns what it adds to the array's digest, uint32 [4]."""
    elements, writer = np.asarray(part.elements), part.writer
    words = NOTHING
    for box in boxes(elements.shape, writer.chunk):
        axes = zip(box, part.origin, strict=True)
        index = tuple(slice(axis.start + o, axis.stop + o) for axis, o in axes)
        writer.write(index, elements[box])
        words = digest.add(words, digest.of_box(elements[box], index, writer.shape))
    return words
