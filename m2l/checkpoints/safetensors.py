"""The safetensors format: reading and writing files, alone or in shards with an index.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape,
first and last byte), and the tensors' bytes without gap (github.com/huggingface/safetensors).
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import ml_dtypes
import numpy as np

from m2l import files, storage
from m2l.checkpoints.spans import (
    ArraySpec,
    Extents,
    Piece,
    Span,
    is_array_shape,
    opening,
    remote_bytes,
    reserve,
)
from m2l.errors import CheckpointError
from m2l.storage import AnyPath, PathLike
from m2l.typing import Json, JsonObject

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

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


def is_dtype(name: object) -> bool:
    """Returns whether a value is the name of a dtype whose arrays m2l stores."""
    return isinstance(name, str) and any(dtype.name == name for dtype in _CODES)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; nothing of it is read yet.

    `offset` is the place of its first byte in the file, `digest` the SHA-256, in hex, of its bytes;
    None where none is recorded.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    digest: str | None = None

    chunk = None
    """No boxes: any run of elements is read without reading others."""

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return self.size * self.dtype.itemsize

    @property
    def extents(self) -> Extents:
        """Where its elements are stored."""
        pieces = (Piece(0, self.file, self.offset),) if self.size else ()
        return Extents(self.name, self.dtype, self.size, pieces)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads elements [start, stop) of the row-major tensor; 1-D, of its dtype, writable.

        Raises:
            CheckpointError: The file is gone, or was cut since its header was read.
        """
        # Into memory of our own: pages of a mapped file would count as this process's.
        block = np.empty((self.size if stop is None else stop) - start, self.dtype)
        self.extents.read_into(block, start)
        return block

    def read_span(self, span: Span, out: np.ndarray) -> None:
        """Reads a span into `out`, 1-D, contiguous, of the dtype; errors as `read`'s."""
        self.extents.read_span(span, out)

    def read_checked(self) -> np.ndarray:
        """Reads it whole, in its shape.

        Raises:
            CheckpointError: The file is gone or was cut, or the bytes do not have the digest.
        """
        array = self.read()
        if self.digest is not None:
            self.check(hashlib.sha256(array.view(np.uint8)).hexdigest())
        return array.reshape(self.shape)

    def check(self, digest: str) -> None:
        """Raises CheckpointError unless `digest`, of its bytes, is the one that is recorded."""
        if self.digest is not None and digest != self.digest:
            raise CheckpointError(
                f"{self.file}: {self.name} does not have the digest that m2l_manifest.json "
                "records: damaged, or changed since; if it was changed on purpose (trained "
                "further), delete m2l_manifest.json; else copy or make the directory again"
            )


def _refuse(file: Path, problem: str) -> NoReturn:
    raise CheckpointError(f"{file}: {problem}; download or copy it again")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one file, in the order of their bytes.

    Raises:
        CheckpointError: It cannot be read, is truncated, or its header does not describe it.
    """
    with _reading(file) as (size, read):
        length = int.from_bytes(read(min(8, size), 0), "little")
        if size < 8 or (8 + length > size and length <= _LONGEST_HEADER):
            _refuse(file, f"truncated: it ends after {size:,} bytes, within its header")
        if length > _LONGEST_HEADER:
            _refuse(file, f"no safetensors file: its header would be {length:,} bytes long")
        text = read(length, 8)
    header = files.parse_json(
        text,
        f"{file}: its header",
        kind=dict,
        pairs=_without_repetition,
        error=CheckpointError,
        advice="download or copy it again",
    )
    header.pop("__metadata__", None)
    return _lay_out(file, header, 8 + length, size)


@contextlib.contextmanager
def _reading(file: AnyPath) -> Iterator[tuple[int, Callable[[int, int], bytes]]]:
    """Yields the size of a file or object, and what reads so many bytes of it from a place on."""
    if isinstance(file, Path):
        with opening(file, os.O_RDONLY, "read") as descriptor:
            yield os.fstat(descriptor).st_size, functools.partial(os.pread, descriptor)
    else:
        yield storage.size(file), lambda length, offset: remote_bytes(file, offset, length)


def _without_repetition(pairs: list[tuple[str, Json]]) -> JsonObject:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is in it twice")
    return fields


def _lay_out(file: Path, header: JsonObject, first: int, size: int) -> dict[str, StoredTensor]:
    """Checks that the described tensors tile the file's bytes from `first` to its end."""
    placed = []
    for name, entry in header.items():
        if not name.isprintable():
            _refuse(file, f"damaged: {name!r} in its header is not a tensor's name")
        shape, ends = _numbers(entry, "shape"), _numbers(entry, "data_offsets")
        if shape is None or ends is None or len(ends) != 2 or not is_array_shape(shape):
            _refuse(file, f"damaged: its header does not describe {name}")
        dtype = entry.get("dtype")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise CheckpointError(
                f"{file}: {name} has the unknown dtype {dtype!r:.80}; known are "
                f"{', '.join(_DTYPES)}"
            )
        tensor = StoredTensor(file, name, shape, _DTYPES[dtype], first + ends[0])
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
            error = "overlaps the one before it" if tensor.offset < end else "comes after a gap"
            _refuse(file, f"damaged: {tensor.name} {error}")
        end += tensor.nbytes
        if end > size:
            _refuse(file, f"truncated: it has {size:,} bytes, and {tensor.name} ends at {end:,}")
    if end < size:
        _refuse(file, f"damaged: {size - end:,} bytes after its last tensor belong to none")
    return {tensor.name: tensor for tensor in placed}


def _numbers(entry: Json, field: str) -> tuple[int, ...] | None:
    """Returns a field that is a list of integers from 0; None if it is anything else."""
    value = entry.get(field) if isinstance(entry, dict) else None
    if not isinstance(value, list) or any(type(n) is not int or n < 0 for n in value):
        return None
    return tuple(value)


def open_tensors(path: PathLike) -> dict[str, StoredTensor]:
    """Returns the tensors of a .safetensors file, or of a directory with one or several.

    Raises:
        CheckpointError: There are none, only pickles, or a file or the index is damaged.
    """
    path = storage.path(path)
    if path.is_file():
        return read_header(path)
    if (path / SINGLE).is_file():
        return read_header(path / SINGLE)
    if (path / INDEX).is_file():
        return _open_shards(path)
    if (path / ADAPTER_WEIGHTS).is_file():
        return read_header(path / ADAPTER_WEIGHTS)
    if pickles := sorted(path.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{pickles[0]}: not read, for unpickling executes code that the file brings; load it "
            "where you trust it and save it again with save_pretrained(..., "
            "safe_serialization=True)"
        )
    raise CheckpointError(f"{path}: neither {SINGLE} nor {INDEX} is there")


def _open_shards(directory: Path) -> dict[str, StoredTensor]:
    index = directory / INDEX
    again = "download it again"
    content = files.read_json(index, kind=dict, error=CheckpointError, advice=again)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or any(type(v) is not str for v in weight_map.values()):
        raise CheckpointError(
            f"{index}: damaged: weight_map does not give a file's name for each tensor; {again}"
        )
    items = list(weight_map.items())
    tensors: dict[str, StoredTensor] = {}
    for name in sorted({shard for _, shard in items}):
        # No name may lead out of the directory.
        if Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is no name of a file next to it")
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
    """Returns the names of each shard's tensors, in the order in which `create` stores them.

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


@dataclasses.dataclass(frozen=True)
class ShardLayout:
    """A file to write: its name, first bytes, size, and the offset of each tensor in it."""

    file: str
    header: bytes
    size: int
    offsets: Mapping[str, int]


def lay_out(
    described: Mapping[str, ArraySpec], shards: Sequence[Sequence[str]]
) -> tuple[list[ShardLayout], bytes | None]:
    """Returns the files of tensors, and the content of their index, if there are several.

    Args:
        described: name -> (shape, dtype) of all tensors.
        shards: The names in each file, as `plan_shards` gives them.
    """
    count, layouts = len(shards), []
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{count:05}.safetensors" if count > 1 else SINGLE
        header = _header({name: described[name] for name in names})
        ends = [*itertools.accumulate((_nbytes(described[n]) for n in names), initial=len(header))]
        offsets = dict(zip(names, ends, strict=False))
        layouts.append(ShardLayout(file, header, ends[-1], offsets))
    if count == 1:
        return layouts, None
    total = sum(map(_nbytes, described.values()))
    weight_map = {name: layout.file for layout in layouts for name in layout.offsets}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return layouts, (json.dumps(index, indent=2) + "\n").encode()


def create(
    directory: Path, described: Mapping[str, ArraySpec], shards: Sequence[Sequence[str]]
) -> dict[str, Extents]:
    """Makes model.safetensors, or numbered shards and their index, in full size.

    Args:
        directory: Where; it exists.
        described: name -> (shape, dtype) of all tensors.
        shards: The names in each file, as `plan_shards` gives them.

    Returns:
        name -> where its elements are to be written, in any order; all of them 0.

    Raises:
        CheckpointError: A file cannot be made, or the disk is full.
    """
    layouts, index = lay_out(described, shards)
    for layout in layouts:
        reserve(directory / layout.file, layout.size, layout.header)
    if index is not None:
        reserve(directory / INDEX, len(index), index)
    return {
        name: StoredTensor(directory / layout.file, name, shape, np.dtype(dtype), offset).extents
        for layout in layouts
        for name, offset in layout.offsets.items()
        for shape, dtype in [described[name]]
    }


def _header(described: Mapping[str, ArraySpec]) -> bytes:
    sizes = [_nbytes(spec) for spec in described.values()]
    ends = [0, *itertools.accumulate(sizes)]
    header: JsonObject = {"__metadata__": {"format": "pt"}}
    for (name, (shape, dtype)), begin, end in zip(
        described.items(), ends[:-1], ends[1:], strict=True
    ):
        code = _CODES[np.dtype(dtype)]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
