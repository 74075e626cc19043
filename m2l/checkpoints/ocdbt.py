"""Arrays of checkpoints from before m2l stored plain files: in OCDBT, read through TensorStore."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from m2l.errors import CheckpointError

# Holds the chunk that consecutive slices of an array share, so that it is read once.
_CACHE_BYTES = 32 << 20


def context() -> ts.Context:
    """What the arrays of one item are opened in."""
    return ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})


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


class StoredArray:
    """An array of an Orbax item; read as `Extents` are."""

    def __init__(
        self, item: Path, name: str, shape: tuple[int, ...], dtype: Any, context: ts.Context
    ):
        """Opens it.

        Raises:
            CheckpointError: It is missing or damaged, or its shape or dtype is not the one given.
        """
        self._item, self._name, self._shape = item, name, tuple(shape)
        path = name.replace("/", ".") + "/"
        base = {"driver": "file", "path": f"{item}/"}
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "ocdbt", "base": base, "path": path},
            "recheck_cached_data": "open",
            "fill_missing_data_reads": False,
        }
        self._store = self._result(ts.open(spec, open=True, read=True, context=context))
        found = self._store.shape, self._store.dtype.numpy_dtype
        if found != (self._shape, np.dtype(dtype)):
            raise CheckpointError(
                f"{item}: {name} is {found[1]}{list(found[0])}, its manifest says "
                f"{np.dtype(dtype)}{list(shape)}: the two are not from one checkpoint"
            )

    def read_into(self, out: np.ndarray, start: int = 0) -> None:
        """Fills `out`, 1-D and of the dtype, with the elements from `start` on.

        Raises:
            CheckpointError: A file is missing, truncated or damaged.
        """
        parts = [
            (out[a - start : b - start], self._store[box].read())
            for box, a, b in boxes(self._shape, start, start + out.size)
        ]
        for part, future in parts:
            part[:] = self._result(future).reshape(-1)

    def _result(self, future: Any) -> Any:
        try:
            return future.result()
        except ValueError as error:
            what = str(error).split(":")[0].lower().replace("_", " ")
            raise CheckpointError(
                f"{self._item}: {self._name} cannot be read ({what}): a file is missing, truncated "
                "or damaged; copy the checkpoint again or make it anew"
            ) from error
