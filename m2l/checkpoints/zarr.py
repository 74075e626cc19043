"""Arrays in zarr 3, without compression, written chunk by chunk: each is an atomic object."""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from m2l import storage
from m2l.errors import CheckpointError
from m2l.storage import AnyPath
from m2l.typing import JsonObject

CHUNK_BYTES = 8 << 20
"""About as many bytes as a chunk has: few enough for many at once, enough for an object."""

METADATA = "zarr.json"
TEMPORARY = ".tmp"

Box = tuple[slice, ...]


def chunk_shape(
    shape: tuple[int, ...], itemsize: int, grid: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Returns the shape of chunks of about CHUNK_BYTES.

    Args:
        shape: The array's.
        itemsize: Bytes of an element.
        grid: The boxes in which another array of this shape is stored: chunks are then these boxes,
            cut evenly along an axis or joined. None: consecutive rows.
    """
    chunk = [max(1, length) for length in grid or shape]
    chunk = [min(c, max(1, n)) for c, n in zip(chunk, shape, strict=True)]
    # Cut from the first axis on: what is left are rows that follow one another.
    for axis, length in enumerate(chunk):
        inner = itemsize * math.prod(chunk[axis + 1 :])
        if length * inner <= CHUNK_BYTES:
            break
        rows = max(1, CHUNK_BYTES // inner)
        chunk[axis] = _divisor(length, rows) if grid else -(-length // -(-length // rows))
    for axis in reversed(range(len(chunk) if grid else 0)):
        inner = itemsize * math.prod(chunk) // chunk[axis]
        times = min(-(-shape[axis] // chunk[axis]), CHUNK_BYTES // (inner * chunk[axis]))
        chunk[axis] = min(chunk[axis] * max(1, times), max(1, shape[axis]))
    return tuple(chunk)


def _divisor(number: int, most: int) -> int:
    """Returns the largest divisor of a number up to `most`, if it is not far below; else `most`."""
    divisor = next(d for d in range(most, 0, -1) if number % d == 0)
    return divisor if 4 * divisor >= most else most


def metadata(shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...]) -> JsonObject:
    """Returns the content of zarr.json."""
    bytes_codec: JsonObject = {"name": "bytes"}
    if np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize > 1:
        bytes_codec["configuration"] = {"endian": "little"}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        # Chunks next to zarr.json, and not in folders of their own, which cost as much as files.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": False if dtype == "bool" else 0,
        "codecs": [bytes_codec],
    }


class TensorWriter:
    """An array that is written chunk by chunk, by any number of threads and processes."""

    def __init__(
        self,
        folder: AnyPath,
        name: str,
        shape: tuple[int, ...],
        dtype: DTypeLike,
        chunk: tuple[int, ...],
    ):
        self.folder, self.name = folder, name
        self.shape, self.dtype, self.chunk = tuple(shape), np.dtype(dtype), tuple(chunk)

    def create(self) -> None:
        """Writes zarr.json; chunks that are there stay.

        Raises:
            CheckpointError: It cannot be written.
        """
        text = json.dumps(metadata(self.shape, self.dtype.name, self.chunk))
        if isinstance(self.folder, Path):
            self.folder.mkdir(parents=True, exist_ok=True)
        put(self.folder / METADATA, text.encode())

    def write(self, box: Box, block: np.ndarray) -> None:
        """Writes a chunk: it is there whole, on the disk, or not at all.

        Args:
            box: What it is of the array.
            block: Its elements, of the dtype and the box's shape.

        Raises:
            CheckpointError: It cannot be written, or the disk is full.
        """
        if block.shape != self.chunk:
            # Zarr pads the last chunks to the size of the others.
            whole = np.zeros(self.chunk, self.dtype)
            whole[tuple(slice(0, length) for length in block.shape)] = block
            block = whole
        put(self._file(box), np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)

    def finished(self) -> set[str]:
        """Returns the keys of the chunks that are there, for `has`."""
        # The others were left by a process that was killed, or are just being written.
        return {entry.name for entry in self.folder.iterdir() if entry.suffix != TEMPORARY}

    def has(self, box: Box, finished: set[str]) -> bool:
        """Returns whether a chunk is among those that `finished` has returned."""
        return self._file(box).name in finished

    def read(self, box: Box) -> np.ndarray:
        """Reads a chunk, of the box's shape.

        Raises:
            CheckpointError: It is missing or truncated.
        """
        file = self._file(box)
        try:
            data = np.frombuffer(file.read_bytes(), np.uint8)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
        if data.size != math.prod(self.chunk) * self.dtype.itemsize:
            raise CheckpointError(f"{file}: damaged: {self.name} has a chunk of {data.size} bytes")
        inside = tuple(slice(0, axis.stop - axis.start) for axis in box)
        return data.view(self.dtype).reshape(self.chunk)[inside]

    def _file(self, box: Box) -> AnyPath:
        place = (axis.start // side for axis, side in zip(box, self.chunk, strict=True))
        return self.folder / ".".join(["c", *map(str, place)])


def put(file: AnyPath, data: bytes | memoryview) -> None:
    """Writes a file that appears under its name whole, on the disk, or not at all.

    Raises:
        CheckpointError: It cannot be written, or the disk is full.
    """
    try:
        storage.write_atomic(file, data if isinstance(file, Path) else bytes(data))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be written ({error.strerror})") from error
