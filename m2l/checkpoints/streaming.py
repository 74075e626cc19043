"""Arrays on their way from one format to another: in blocks, one step ahead of their use."""

import functools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from m2l.checkpoints.orbax import chunk_shape
from m2l.errors import CheckpointError

T = TypeVar("T")

FLOATS = ("float32", "bfloat16", "float16", "float64")
"""The dtypes that parameters may have on disk, by name."""

_END = object()


def ahead(items: Iterable[T]) -> Iterator[T]:
    """Yields the items; while one is used, a thread is making the next, and only that one."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, iterator, _END)
        while (item := future.result()) is not _END:
            future = pool.submit(next, iterator, _END)
            yield item
            # Or it would be kept until the next has come.
            del item


def blocks(array: np.ndarray, dtype: np.dtype, name: str) -> Iterator[np.ndarray]:
    """Cuts an array into 1-D contiguous blocks of at most 16 MiB, in row-major order.

    Args:
        array: Of any strides: a transposed view is laid out block by block.
        dtype: What the blocks are to be cast to, rounding to the nearest.
        name: Whose values they are, for the message.

    Raises:
        CheckpointError: A finite value is too large for `dtype`.
    """
    if not array.ndim:
        array = array.reshape(1)
    rows = chunk_shape(array.shape, dtype.itemsize)[0]
    for start in range(0, len(array), rows):
        yield _cast(_contiguous(array[start : start + rows]), dtype, name).reshape(-1)


@functools.cache
def _cpu() -> jax.Device | None:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None  # JAX_PLATFORMS leaves it out.


def _contiguous(array: np.ndarray) -> np.ndarray:
    if array.flags.c_contiguous:
        return array
    # JAX moves a transposed view to its CPU in cache-sized tiles, five to ten times as fast as
    # NumPy copies it; it would round float64.
    if array.ndim == 2 and array.itemsize in (2, 4) and (cpu := _cpu()):
        return np.asarray(jax.device_put(array, cpu))
    return np.ascontiguousarray(array)


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
