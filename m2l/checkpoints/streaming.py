"""Arrays on their way from one format to another: in blocks, and several arrays at a time."""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import jax.numpy as jnp
import numpy as np

from m2l.errors import CheckpointError

T, R = TypeVar("T"), TypeVar("R")

FLOATS = ("float32", "bfloat16", "float16", "float64")
"""The dtypes that parameters may have on disk, by name."""

WORKERS = 3
"""How many arrays are worked on at a time, and so held in memory, at the most."""

_BLOCK_BYTES = 8 << 20
_TILE_BYTES = 1024  # of a side


def in_parallel(
    work: Callable[[T], R],
    items: Iterable[T],
    done: Callable[[R], None] | None = None,
    workers: int = WORKERS,
) -> None:
    """Calls work(item) of every item in `workers` threads, and done(result) of each here.

    Raises:
        Exception: The first that one of them raises; then no further item is begun, and none is
            still worked on.
    """
    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in as_completed([pool.submit(work, item) for item in items]):
                result = future.result()
                if done is not None:
                    done(result)
        finally:
            pool.shutdown(cancel_futures=True)


def blocks(array: np.ndarray, dtype: np.dtype, name: str) -> Iterator[np.ndarray]:
    """Cuts an array into 1-D contiguous blocks of whole rows, about 8 MiB, in row-major order.

    Args:
        array: Of any strides: a transposed view is laid out block by block.
        dtype: What the blocks are to be cast to, rounding to the nearest.
        name: Whose values they are, for the message.

    Raises:
        CheckpointError: A finite value is too large for `dtype`.
    """
    if not array.ndim:
        array = array.reshape(1)
    rows = max(1, _BLOCK_BYTES // max(1, math.prod(array.shape[1:]) * dtype.itemsize))
    for start in range(0, len(array), rows):
        yield _cast(_contiguous(array[start : start + rows]), dtype, name).reshape(-1)


def _contiguous(array: np.ndarray) -> np.ndarray:
    if array.flags.c_contiguous or array.ndim != 2 or array.strides[0] >= array.strides[1]:
        return np.ascontiguousarray(array)
    out = np.empty(array.shape, array.dtype)
    # In tiles that the cache holds: several times as fast as NumPy copies a transposed view. Each
    # by way of rows that no power of two is apart, for such rows push each other out of it.
    side = max(1, _TILE_BYTES // array.itemsize)
    room = np.empty((side, side + 64), array.dtype)
    for row in range(0, array.shape[0], side):
        for column in range(0, array.shape[1], side):
            place = slice(row, row + side), slice(column, column + side)
            source = array[place].T
            tile = room[: source.shape[0], : source.shape[1]]
            tile[...] = source
            out[place] = tile.T
    return out


def _cast(block: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    if block.dtype == dtype:
        return block
    with np.errstate(over="ignore", invalid="ignore"):
        cast = block.astype(dtype)
    largest = float(jnp.finfo(dtype).max)
    if largest < float(jnp.finfo(block.dtype).max):
        lost = np.isinf(cast)
        if lost.any() and not np.isinf(block[lost]).all():
            value = float(np.abs(block[np.isfinite(block)]).max())
            raise CheckpointError(
                f"{name}: {value:.6g} is too large for {dtype.name}, which ends at {largest:.6g}; "
                "choose bfloat16 or float32"
            )
    return cast
