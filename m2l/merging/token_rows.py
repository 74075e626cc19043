"""Tensors of one row per token, read in the order of another tokenizer's ids.

A tensor that is re-indexed reads, for a part of itself, the rows of stored tensors that the part is
made of, and nothing else: a merge streams it as it does any other, by blocks. Its own rows are a
model's for the tokens that the model has; what others lack comes from whoever has it.
"""

import dataclasses
import math
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from m2l.checkpoints.opening import recorded_digest
from m2l.checkpoints.spans import (
    Extents,
    LazyTensor,
    Piece,
    Span,
    TensorReader,
    cut,
    read_rows,
    reserve,
)
from m2l.files import cache_directory

ZERO, AVERAGE, MEAN = -1, -2, -3
"""Instead of a model's place in a list: rows of zeros, the average of several models' rows of a
token, and the mean of the model's own rows of all tokens."""

_READ = 1 << 18
"""Elements that are read at once where columns are gathered, and of which means are summed."""


@dataclasses.dataclass(frozen=True, eq=False)
class RowMap:
    """What each row of a re-indexed tensor is, for one model.

    Attributes:
        models: Whose row it is, by place, or ZERO, AVERAGE or MEAN; int16 [rows].
        places: Which row of that model's; of AVERAGE which row of `averages`; int32 [rows].
        averages: The rows of which each average is: of each model, -1 where it has none;
            int32 [averages, models].
        named: Which rows are tokens', of which the mean is taken; bool [rows].
    """

    models: np.ndarray
    places: np.ndarray
    averages: np.ndarray
    named: np.ndarray

    @property
    def size(self) -> int:
        """How many rows there are."""
        return len(self.models)


@dataclasses.dataclass(frozen=True, eq=False)
class RowTensor:
    """A re-indexed tensor; a `TensorReader`, which any number of threads may read.

    Attributes:
        original: The tensor as it is stored.
        donors: The same tensor of the models that the map names, by their place; None where a
            model has none.
        axis: The axis of tokens, the first or the last.
        rows: What its rows are.
        dtype: The donors', or float32 where they differ; averages and means are rounded to it.
    """

    original: TensorReader
    donors: Mapping[int, TensorReader | None]
    axis: int
    rows: RowMap
    dtype: np.dtype
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    _means: list[np.ndarray] = dataclasses.field(default_factory=list)

    chunk = None
    """Any run of elements is read without reading others."""

    @property
    def name(self) -> str:
        """Its name."""
        return self.original.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        shape = list(self.original.shape)
        shape[self.axis] = self.rows.size
        return tuple(shape)

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def file(self) -> Path | None:
        """The file that the original is in, if it is one."""
        return getattr(self.original, "file", None)

    @property
    def digest(self) -> str | None:
        """The digest that is recorded of the original."""
        return recorded_digest(self.original)

    def read_span(self, span: Span, out: np.ndarray) -> None:
        """Reads a span into `out`, 1-D, contiguous, of the dtype and the span's size."""
        read_rows(self.read_into, span, out)

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """Reads the row-major elements [start, stop) into `out`."""
        if self.axis == 0:
            width = self.size // max(1, self.rows.size)
            first, last = start // width, -(-stop // width)
            whole = first * width == start and last * width == stop
            block = out if whole else np.empty((last - first) * width, self.dtype)
            self._fill(first, last, slice(0, width), block.reshape(-1, width))
            if not whole:
                out[:] = block[start - first * width : stop - first * width]
            return
        count = self.rows.size
        while start < stop:
            row, first = divmod(start, count)
            whole_rows = (stop - start) // count if first == 0 else 0
            last = count if whole_rows else min(count, first + stop - start)
            rows = max(1, whole_rows)
            part, out = out[: rows * (last - first)], out[rows * (last - first) :]
            self._fill(first, last, slice(row, row + rows), part.reshape(rows, last - first).T)
            start += part.size

    def _fill(self, first: int, last: int, across: slice, out: np.ndarray) -> None:
        """Fills `out`, [last - first, width], with tokens' rows: of each the part `across`."""
        models, places = self.rows.models[first:last], self.rows.places[first:last]
        for model in np.unique(models):
            chosen = np.flatnonzero(models == model)
            everything = len(chosen) == len(models)
            if model == ZERO:
                out[chosen] = 0
            elif model == MEAN:
                out[chosen] = self._mean()[across]
            elif model == AVERAGE:
                out[chosen] = self._average(self.rows.averages[places[chosen]], across)
            elif everything and self.axis == 0 and self.donors[model].dtype == self.dtype:
                gather_rows(self.donors[model], places, out)
            else:
                out[chosen] = self._gather(model, places[chosen], across)

    def _gather(self, model: int, places: np.ndarray, across: slice) -> np.ndarray:
        """Returns rows of a model's tensor, or the part `across` of them: [places, width]."""
        donor = self.donors[model]
        width = across.stop - across.start
        if self.axis:
            return gather_columns(donor, places, across)
        out = np.empty((len(places), width), donor.dtype)
        gather_rows(donor, places, out)
        return out

    def _average(self, places: np.ndarray, across: slice) -> np.ndarray:
        total = np.zeros((len(places), across.stop - across.start), np.float32)
        for model, column in enumerate(places.T):
            present = np.flatnonzero(column >= 0)
            if len(present):
                total[present] += self._gather(model, column[present], across).astype(np.float32)
        return total / (places >= 0).sum(1, keepdims=True).astype(np.float32)

    def _mean(self) -> np.ndarray:
        """Returns the mean of the rows that are tokens', [width], in float64; computed once."""
        with self._lock:
            if not self._means:
                tokens = np.flatnonzero(self.rows.named)
                width = self.size // max(1, self.rows.size)
                total = np.zeros(width)
                step = max(1, _READ // max(1, width))
                for first in range(0, self.rows.size, step):
                    last = min(first + step, self.rows.size)
                    inside = tokens[(tokens >= first) & (tokens < last)] - first
                    shape = (last - first, width) if self.axis == 0 else (width, last - first)
                    block = np.empty(shape, self.dtype)
                    block = block.T if self.axis else block
                    self._fill_known(first, last, slice(0, width), block)
                    total += block[inside].astype(np.float64).sum(0)
                self._means.append(total / max(1, len(tokens)))
        return self._means[0]

    def _fill_known(self, first: int, last: int, across: slice, out: np.ndarray) -> None:
        """Fills `out` as `_fill` does, with zeros for means."""
        models = self.rows.models[first:last]
        known = np.where(models == MEAN, np.int16(ZERO), models)
        rows = dataclasses.replace(self.rows, models=known, places=self.rows.places[first:last])
        dataclasses.replace(self, rows=rows)._fill(0, last - first, across, out)


def gather_rows(tensor: TensorReader, places: np.ndarray, out: np.ndarray) -> None:
    """Reads rows of a tensor, along its first axis, into `out`, [places, width]."""
    extents = getattr(tensor, "extents", None)
    if isinstance(extents, Extents):
        extents.read_rows(places, out)
        return
    # In memory while its parts are read.
    for place, row in zip(places.tolist(), out, strict=True):
        tensor.read_span(Span(tensor.name, place * row.size, row.size), row)


def gather_columns(tensor: TensorReader, places: np.ndarray, across: slice) -> np.ndarray:
    """Returns columns of a tensor of the rows `across`, transposed: [places, width]."""
    columns = tensor.shape[-1]
    first, last = int(places.min()), int(places.max()) + 1
    result = np.empty((across.stop - across.start, len(places)), tensor.dtype)
    step = max(1, _READ // (last - first))
    for row in range(across.start, across.stop, step):
        rows = min(step, across.stop - row)
        if last - first == columns:
            span = Span(tensor.name, row * columns, rows * columns)
        else:
            span = Span(tensor.name, row * columns + first, last - first, rows, columns)
        block = np.empty(span.size, tensor.dtype)
        tensor.read_span(span, block)
        place = slice(row - across.start, row - across.start + rows)
        np.take(block.reshape(rows, -1), places - first, axis=1, out=result[place])
    return result.T


class SpooledTensor:
    """A tensor whose rows cannot be read alone, copied into a temporary file when one is needed.

    Args:
        stored: In chunks that are narrower than the tensor or compressed, or in a bucket.
    """

    chunk = None

    def __init__(self, stored: TensorReader):
        self.stored = stored
        self.name, self.shape = stored.name, tuple(stored.shape)
        self.dtype, self.size = stored.dtype, math.prod(stored.shape)
        self.digest = recorded_digest(stored)
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None

    @property
    def extents(self) -> Extents:
        """Where its elements are, in the copy."""
        with self._lock:
            if self._file is None:
                self._file = self._copied()
        return self._extents(self._file)

    def _extents(self, file: IO[bytes]) -> Extents:
        pieces = (Piece(0, Path(file.name), 0),) if self.size else ()
        return Extents(self.name, self.dtype, self.size, pieces)

    def _copied(self) -> IO[bytes]:
        # Next to what m2l caches: a system's folder of temporary files may be memory.
        folder = cache_directory() / "rows"
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.NamedTemporaryFile(dir=folder)  # noqa: SIM115 (it lasts as long as this)
        reserve(Path(file.name), self.size * self.dtype.itemsize)
        extents = self._extents(file)
        for span in cut(self.name, self.shape, self.stored.chunk, _READ):
            block = np.empty(span.size, self.dtype)
            self.stored.read_span(span, block)
            for row, part in enumerate(block.reshape(span.rows, span.columns)):
                extents.write_from(part, span.start + row * span.stride)
        return file

    def read_span(self, span: Span, out: np.ndarray) -> None:
        """Reads a span into `out`, 1-D, contiguous, of the dtype and the span's size."""
        self.extents.read_span(span, out)


def rows_at_hand(tensor: TensorReader) -> TensorReader:
    """Returns a tensor of which any row can be read alone: itself, or one that is copied first."""
    extents = getattr(tensor, "extents", None)
    local = extents is not None and all(isinstance(file, Path) for file in extents.files())
    return tensor if local or isinstance(tensor, LazyTensor) else SpooledTensor(tensor)


def as_stored(tensor: TensorReader) -> TensorReader:
    """Returns the tensor that is stored: of one that is re-indexed, its original."""
    original = tensor.original if isinstance(tensor, RowTensor) else tensor
    return original.stored if isinstance(original, SpooledTensor) else original
