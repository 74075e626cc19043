"""How a checkpoint lies on disk: an Orbax checkpoint whose arrays are plain files.

An Orbax item is a folder; each of its arrays is a folder of it in the format zarr 3: zarr.json, and
chunks without compression, a file each. Chunks hold consecutive elements, so that any range of them
is read and written in place. The few files that Orbax itself keeps are written here as Orbax writes
them, which costs it longer than the arrays.
"""

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from m2l import files
from m2l.checkpoints.extents import Extents, Piece, reserve
from m2l.errors import CheckpointError

PARAMS, OPT_STATE, DATA_STATE = "params", "opt_state", "data_state"

# A file each: large enough to be few, small enough for Orbax, which reads them whole.
_CHUNK_BYTES = 64 << 20

_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"

_AGAIN = "copy the checkpoint again or make it anew"

ArraySpec = tuple[tuple[int, ...], Any]  # shape, dtype


def create(directory: str | os.PathLike, parameters: Mapping[str, ArraySpec]) -> dict[str, Extents]:
    """Makes the files of a checkpoint, in full size, for parameters to be written in any order.

    Made again with the same parameters, they keep what was written. The directory is no checkpoint
    before `describe` has written its manifest.

    Args:
        directory: Where; made if it does not exist.
        parameters: name -> (shape, dtype).

    Returns:
        name -> where its elements lie; all of them 0.

    Raises:
        CheckpointError: A file cannot be made, or the disk is full.
    """
    return create_items(directory, {PARAMS: parameters})[PARAMS]


def create_items(
    directory: str | os.PathLike, items: Mapping[str, Mapping[str, ArraySpec]]
) -> dict[str, dict[str, Extents]]:
    """The same as `create` for several Orbax items: item -> name -> (shape, dtype)."""
    directory = Path(directory)
    found: dict[str, dict[str, Extents]] = {}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for item, arrays in items.items():
            folder = directory / item
            # Orbax has no item without an array.
            if arrays:
                folder.mkdir(exist_ok=True)
                (folder / "_METADATA").write_text(json.dumps(_item_metadata(arrays)))
            found[item] = {name: _create(folder, name, *spec) for name, spec in arrays.items()}
        metadata = json.dumps(_checkpoint_metadata(items))
        (directory / "_CHECKPOINT_METADATA").write_text(metadata)
        (directory / "orbax.checkpoint").write_bytes(b"")
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or directory}: cannot be written ({error.strerror})"
        ) from error
    return found


def open_extents(
    directory: str | os.PathLike, parameters: Mapping[str, ArraySpec]
) -> dict[str, Extents]:
    """What `create` returned for a directory, whether it has a manifest yet or not.

    Args:
        directory: Where `create` made the files.
        parameters: name -> (shape, dtype), as given to it.

    Raises:
        CheckpointError: An array is missing, damaged, or of another shape or dtype.
    """
    item = Path(directory) / PARAMS
    return {name: open_array(item, name, *spec) for name, spec in parameters.items()}


def open_array(item: Path, name: str, shape: tuple[int, ...], dtype: Any) -> Extents:
    """Where the elements of an array of an Orbax item lie.

    Raises:
        CheckpointError: It is missing or damaged, or its shape or dtype is not the one given.
    """
    shape, dtype = tuple(shape), np.dtype(dtype)
    folder = _folder(item, name)
    file = folder / "zarr.json"
    metadata = files.read_json(file, error=CheckpointError, advice=_AGAIN)
    try:
        found = tuple(metadata["shape"]), metadata["data_type"]
        chunk = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
        known = metadata == _zarr(*found, chunk) and _consecutive(found[0], chunk)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged: it does not describe {name}; {_AGAIN}") from error
    if found != (shape, dtype.name):
        raise CheckpointError(
            f"{item}: {name} is {found[1]}{list(found[0])}, its manifest says "
            f"{dtype}{list(shape)}: the two are not from one checkpoint"
        )
    if not known:
        raise CheckpointError(f"{file}: {name} is not laid out as m2l lays out arrays; {_AGAIN}")
    nbytes, pieces = math.prod(chunk) * dtype.itemsize, []
    # One after another: a chunk that is missing ends the search of a shape that no file bears out.
    for piece in _pieces(folder, shape, chunk):
        check_size(piece.file, nbytes, name)
        pieces.append(piece)
    return Extents(name, dtype, math.prod(shape), tuple(pieces))


def check_size(file: Path, nbytes: int, name: str) -> None:
    """Raises CheckpointError unless a file of the array called `name` has so many bytes."""
    try:
        found = file.stat().st_size
    except OSError as error:
        raise CheckpointError(
            f"{file}: {name} cannot be read ({error.strerror}); {_AGAIN}"
        ) from error
    if found != nbytes:
        what = "truncated" if found < nbytes else "damaged"
        raise CheckpointError(
            f"{file}: {what}: {name} has {nbytes:,} bytes there, the file has {found:,}; {_AGAIN}"
        )


def check_metadata(directory: Path, items: Mapping[str, Collection[str]]) -> None:
    """Checks the files that Orbax itself reads of a checkpoint that `create_items` made.

    Args:
        directory: The checkpoint.
        items: item -> the names of its arrays.

    Raises:
        CheckpointError: One is missing or is not what was written.
    """
    expected = {directory / "_CHECKPOINT_METADATA": _checkpoint_metadata(items)}
    for item, names in items.items():
        if names:
            expected[directory / item / "_METADATA"] = _item_metadata(names)
    for file, content in expected.items():
        if files.read_json(file, error=CheckpointError, advice=_AGAIN) != content:
            raise CheckpointError(
                f"{file}: damaged: it does not describe the arrays of the manifest; {_AGAIN}"
            )
    check_size(directory / "orbax.checkpoint", 0, "Orbax's mark of a checkpoint")


def expected_files(directory: Path, item: str, arrays: Mapping[str, Extents]) -> Iterator[Path]:
    """Yields every file of an item that `create_items` made."""
    if arrays:
        yield directory / item / "_METADATA"
    for name, extents in arrays.items():
        yield _folder(directory / item, name) / "zarr.json"
        yield from extents.files()


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Boxes of consecutive elements, of at most _CHUNK_BYTES, and as equal as they can be."""
    chunk = []
    for axis, length in enumerate(shape):
        inner = max(1, math.prod(shape[axis + 1 :]))
        rows = max(1, min(length, _CHUNK_BYTES // itemsize // inner))
        # Zarr pads the last chunk to the size of the others.
        chunk.append(max(1, -(-length // max(1, -(-length // rows)))))
    return tuple(chunk)


def _folder(item: Path, name: str) -> Path:
    return item / name.replace("/", ".")


def _create(item: Path, name: str, shape: tuple[int, ...], dtype: Any) -> Extents:
    shape, dtype = tuple(shape), np.dtype(dtype)
    chunk, folder = chunk_shape(shape, dtype.itemsize), _folder(item, name)
    folder.mkdir(exist_ok=True)
    (folder / "zarr.json").write_text(json.dumps(_zarr(shape, dtype.name, chunk)))
    pieces = tuple(_pieces(folder, shape, chunk))
    for piece in pieces:
        reserve(piece.file, math.prod(chunk) * dtype.itemsize)
    return Extents(name, dtype, math.prod(shape), pieces)


def _consecutive(shape: tuple[int, ...], chunk: tuple[int, ...]) -> bool:
    """Whether the elements of each chunk follow one another in the array."""
    inner = _axis(chunk) + 1
    if any(type(length) is not int or length < 1 for length in chunk):
        return False
    return len(chunk) == len(shape) and (chunk[inner:] == shape[inner:] or not math.prod(shape))


def _axis(chunk: tuple[int, ...]) -> int:
    """The axis along which chunks follow one another; before it a chunk has one index each."""
    return next((axis for axis, length in enumerate(chunk) if length > 1), len(chunk))


def _pieces(folder: Path, shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Piece]:
    if not math.prod(shape):
        return
    axis = _axis(chunk)
    run, step = math.prod(shape[axis:]), math.prod(chunk)
    inner = ".0" * len(shape[axis + 1 :])
    for number in range(math.prod(shape[:axis])):
        outer = np.unravel_index(number, shape[:axis])
        name = ".".join(["c", *map(str, outer)])
        for index, start in enumerate(range(0, run, step)):
            along = f".{index}" if axis < len(shape) else ""
            yield Piece(number * run + start, folder / f"{name}{along}{inner}", 0)


def _zarr(shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...]) -> dict[str, Any]:
    """The content of zarr.json."""
    bytes_codec: dict[str, Any] = {"name": "bytes"}
    if _dtype(dtype).itemsize > 1:
        bytes_codec["configuration"] = {"endian": "little"}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        # Chunks beside zarr.json, and not in folders of their own, which cost as much as files.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": False if dtype == "bool" else 0,
        "codecs": [bytes_codec],
    }


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _checkpoint_metadata(items: Mapping[str, Collection[str]]) -> dict[str, Any]:
    """The content of _CHECKPOINT_METADATA."""
    return {
        "item_handlers": {item: _HANDLER for item, names in items.items() if names},
        "metrics": {},
        "performance_metrics": {},
        # Orbax's may be absent, and equal checkpoints are to be equal files.
        "init_timestamp_nsecs": None,
        "commit_timestamp_nsecs": None,
        "custom_metadata": {},
    }


def _item_metadata(names: Collection[str]) -> dict[str, Any]:
    """The content of an item's _METADATA: a nested dict of NumPy arrays, and how they are kept."""
    tree = {}
    for name in names:
        keys = name.split("/")
        tree[str(tuple(keys))] = {
            # 2: the key of a dict.
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
