"""The safetensors format: reading and writing files, alone or in shards with an index.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape,
first and last byte), and the tensors' bytes without gap (github.com/huggingface/safetensors).
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from m2l.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# What the format's own library accepts.
_LONGEST_HEADER = 100_000_000
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

ArraySpec = tuple[tuple[int, ...], np.dtype]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; nothing of it is read yet.

    Attributes:
        file: The file.
        name: The tensor's name.
        shape: Its shape.
        dtype: Its dtype.
        offset: The place of its first byte in the file.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return self.size * self.dtype.itemsize

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads elements [start, stop) of the row-major tensor; 1-D, of its dtype, writable.

        Raises:
            CheckpointError: The file is gone, or was cut since its header was read.
        """
        stop = self.size if stop is None else stop
        block = np.empty(stop - start, self.dtype)
        # Into memory of our own: pages of a mapped file would count as this process's.
        room = memoryview(block.view(np.uint8))
        place, end = self.offset + start * self.dtype.itemsize, len(room)
        with _opening(self.file) as file:
            done = 0
            while done < end:
                count = os.preadv(file, [room[done:]], place + done)
                if not count:
                    _refuse(self.file, f"truncated: {self.name} ends after its end of file")
                done += count
        return block


def _refuse(file: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{file}: {what}; download or copy it again")


@contextlib.contextmanager
def _opening(file: Path) -> Iterator[int]:
    """A descriptor for reading; OSErrors become one line that names the file."""
    descriptor = None
    try:
        descriptor = os.open(file, os.O_RDONLY)
        yield descriptor
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    finally:
        if descriptor is not None:
            os.close(descriptor)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, in the order of their bytes.

    Raises:
        CheckpointError: It cannot be read, is truncated, or its header does not describe it.
    """
    with _opening(file) as descriptor:
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if size < 8 or (8 + length > size and length <= _LONGEST_HEADER):
            _refuse(file, f"truncated: it ends after {size:,} bytes, within its header")
        if length > _LONGEST_HEADER:
            _refuse(file, f"no safetensors file: its header would be {length:,} bytes long")
        text = os.pread(descriptor, length, 8)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_repetition)
    except ValueError as error:
        _refuse(file, f"damaged: its header cannot be read ({error})")
    if not isinstance(header, dict):
        _refuse(file, "damaged: its header is no JSON object")
    header.pop("__metadata__", None)
    return _lay_out(file, header, 8 + length, size)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands in it twice")
    return found


def _lay_out(file: Path, header: dict[str, Any], first: int, size: int) -> dict[str, StoredTensor]:
    """Checks that the described tensors tile the file's bytes from `first` to its end."""
    placed = []
    for name, entry in header.items():
        shape, ends = _numbers(entry, "shape"), _numbers(entry, "data_offsets")
        if shape is None or ends is None or len(ends) != 2:
            _refuse(file, f"damaged: its header does not describe {name}")
        if entry.get("dtype") not in _DTYPES:
            raise CheckpointError(
                f"{file}: {name} has the unknown dtype {entry.get('dtype')!r}; known are "
                f"{', '.join(_DTYPES)}"
            )
        tensor = StoredTensor(file, name, shape, _DTYPES[entry["dtype"]], first + ends[0])
        if ends[1] - ends[0] != tensor.nbytes:
            _refuse(
                file,
                f"damaged: {name} is {tensor.dtype}{list(shape)}, {tensor.nbytes:,} bytes, but its "
                f"offsets are {ends[0]} and {ends[1]}",
            )
        placed.append(tensor)
    # Of two at one place, the empty one comes first.
    placed.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = first
    for tensor in placed:
        if tensor.offset != end:
            what = "overlaps the one before it" if tensor.offset < end else "comes after a gap"
            _refuse(file, f"damaged: {tensor.name} {what}")
        end += tensor.nbytes
        if end > size:
            _refuse(file, f"truncated: it has {size:,} bytes, and {tensor.name} ends at {end:,}")
    if end < size:
        _refuse(file, f"damaged: {size - end:,} bytes after its last tensor belong to none")
    return {tensor.name: tensor for tensor in placed}


def _numbers(entry: Any, field: str) -> tuple[int, ...] | None:
    """A field that is a list of integers from 0, as a tuple; None if it is anything else."""
    value = entry.get(field) if isinstance(entry, dict) else None
    if not isinstance(value, list) or any(type(n) is not int or n < 0 for n in value):
        return None
    return tuple(value)


def open_tensors(path: str | os.PathLike) -> dict[str, StoredTensor]:
    """The tensors of a .safetensors file, or of a directory that holds one or an index of several.

    Raises:
        CheckpointError: There are none, only pickles, or a file or the index is damaged.
    """
    path = Path(path)
    if path.is_file():
        return read_header(path)
    if (path / SINGLE).is_file():
        return read_header(path / SINGLE)
    if (path / INDEX).is_file():
        return _open_shards(path)
    if pickles := sorted(path.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{pickles[0]}: not read, for unpickling executes code that the file brings; load it "
            "where you trust it and save it again with save_pretrained(..., "
            "safe_serialization=True)"
        )
    raise CheckpointError(f"{path}: neither {SINGLE} nor {INDEX} is there")


def _open_shards(directory: Path) -> dict[str, StoredTensor]:
    index = directory / INDEX
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        items = list(weight_map.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: damaged: no JSON object with a weight_map; download it again"
        ) from error
    tensors: dict[str, StoredTensor] = {}
    for name in sorted({str(shard) for _, shard in items}):
        # No name may lead out of the directory.
        if Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is no name of a file beside it")
        if not (directory / name).is_file():
            raise CheckpointError(
                f"{index}: the file {name} that it names is missing; download it again"
            )
        for tensor in read_header(directory / name).values():
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{directory}: {tensor.name} is in two files, {tensors[tensor.name].file.name} "
                    f"and {name}: remove what belongs to another model"
                )
            if weight_map.get(tensor.name) != name:
                raise CheckpointError(
                    f"{index}: it does not name {tensor.name}, which is in {name}; the files are "
                    "not of one model: download them again"
                )
            tensors[tensor.name] = tensor
    for name, shard in items:
        if name not in tensors:
            raise CheckpointError(
                f"{index}: the tensor {name} that it names is not in {shard}; download it again"
            )
    return tensors


def plan_shards(described: Mapping[str, ArraySpec], shard_size: int) -> list[list[str]]:
    """The names of each shard's tensors, in the order in which `write` lays them down.

    Args:
        described: name -> (shape, dtype) of all tensors.
        shard_size: The bytes that a shard holds at most; a larger tensor gets one of its own.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in described.items():
        if shards[-1] and filled + _nbytes(spec) > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _nbytes(spec)
    # The widest dtype first, so that every tensor is aligned to its own width.
    widths = {name: np.dtype(dtype).itemsize for name, (_, dtype) in described.items()}
    return [sorted(names, key=lambda name: -widths[name]) for names in shards]


def _nbytes(spec: ArraySpec) -> int:
    return math.prod(spec[0]) * np.dtype(spec[1]).itemsize


def write(
    directory: Path,
    described: Mapping[str, ArraySpec],
    shards: Sequence[Sequence[str]],
    blocks: Iterable[np.ndarray],
) -> None:
    """Writes model.safetensors, or numbered shards and their index, into a directory.

    Args:
        directory: Where; it exists and holds no such files.
        described: name -> (shape, dtype) of all tensors.
        shards: The names in each file, as `plan_shards` gives them.
        blocks: The elements of all tensors, one after another in the order of `shards`, as 1-D
            contiguous arrays; one block belongs to one tensor. Taken one by one, kept none.
    """
    blocks, names = iter(blocks), [SINGLE]
    if len(shards) > 1:
        total = len(shards)
        names = [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    for name, tensors in zip(names, shards, strict=True):
        with open(directory / name, "xb", buffering=0) as file:
            _write_all(file, _header({tensor: described[tensor] for tensor in tensors}))
            for tensor in tensors:
                _write_tensor(file, tensor, described[tensor], blocks)
    if len(shards) > 1:
        weight_map = {
            tensor: name for name, group in zip(names, shards, strict=True) for tensor in group
        }
        total = sum(map(_nbytes, described.values()))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _header(described: Mapping[str, ArraySpec]) -> bytes:
    sizes = [_nbytes(spec) for spec in described.values()]
    ends = [0, *itertools.accumulate(sizes)]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for (name, (shape, dtype)), begin, end in zip(
        described.items(), ends[:-1], ends[1:], strict=True
    ):
        code = _CODES[np.dtype(dtype)]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: Any, name: str, spec: ArraySpec, blocks: Iterator[np.ndarray]) -> None:
    left = _nbytes(spec)
    while left:
        block = next(blocks)
        if block.dtype != spec[1] or block.nbytes > left:
            raise ValueError(f"{name}: {block.dtype}[{block.size}] given, {left} bytes are left")
        _write_all(file, block.view(np.uint8))
        left -= block.nbytes
        del block


def _write_all(file: Any, data: Any) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
