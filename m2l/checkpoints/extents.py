"""Where an array's elements lie in files, and moving them between there and memory."""

import bisect
import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from m2l import storage
from m2l.errors import CheckpointError, M2LError


def is_array_shape(shape: Any) -> bool:
    """Returns whether a value is a sequence of integers that NumPy can make an array of.

    NumPy refuses more than 64 axes and, whatever the other axes, 2**63 bytes.
    """
    return (
        isinstance(shape, list | tuple)
        and len(shape) <= 32
        and all(type(length) is int and length >= 0 for length in shape)
        and math.prod(max(1, length) for length in shape) < 2**58
    )


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive elements in one file, up to where the array's next piece starts.

    Attributes:
        start: The index of the first, in the row-major array.
        file: The file, or an object in a bucket.
        offset: The place of its first byte there.
    """

    start: int
    file: Path
    offset: int


@dataclasses.dataclass(frozen=True)
class Extents:
    """Where the elements of a row-major array lie: plain little-endian numbers in files.

    Nothing is held open, so that it can be sent to other processes; reading and writing may go on
    in any number of threads and processes at once.

    Attributes:
        name: Whose elements they are, for messages.
        dtype: Their dtype.
        size: How many there are.
        pieces: Where they lie, in order; empty if there are none.
        file_bytes: The size that each of the files has to have; None: not checked.
    """

    name: str
    dtype: np.dtype
    size: int
    pieces: tuple[Piece, ...]
    file_bytes: int | None = None

    def read_into(self, out: np.ndarray, start: int = 0) -> None:
        """Fills `out`, 1-D, contiguous and of the dtype, with the elements from `start` on.

        Raises:
            CheckpointError: A file is missing, truncated or cannot be read.
        """
        for file, offset, room in self._parts(out, start):
            if not isinstance(file, Path):
                room[:] = remote_bytes(file, offset, len(room))
                continue
            with opening(file, os.O_RDONLY, "read") as descriptor:
                self._check_size(file, descriptor)
                while room:
                    count = os.preadv(descriptor, [room], offset)
                    if not count:
                        raise CheckpointError(
                            f"{file}: truncated: {self.name} ends after its end of file; copy or "
                            "download it again"
                        )
                    room, offset = room[count:], offset + count

    def write_from(self, block: np.ndarray, start: int = 0) -> None:
        """Writes `block`, 1-D, contiguous and of the dtype, as the elements from `start` on.

        The files exist, in full size; blocks may come in any order.

        Raises:
            CheckpointError: A file is missing or cannot be written, or the disk is full.
        """
        for file, offset, data in self._parts(block, start):
            with opening(file, os.O_WRONLY, "written") as descriptor:
                while data:
                    count = os.pwrite(descriptor, data, offset)
                    data, offset = data[count:], offset + count

    def _check_size(self, file: Path, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        if self.file_bytes not in (None, size):
            what = "truncated" if size < self.file_bytes else "damaged"
            raise CheckpointError(
                f"{file}: {what}: a chunk of {self.name} has {self.file_bytes:,} bytes, the file "
                f"has {size:,}; copy the checkpoint again or make it anew"
            )

    def files(self) -> list[Path]:
        """The files that hold elements, in order."""
        return list(dict.fromkeys(piece.file for piece in self.pieces))

    def _parts(self, array: np.ndarray, start: int) -> Iterator[tuple[Path, int, memoryview]]:
        """Cuts memory of the elements from `start` on as they lie: (file, byte in it, memory)."""
        if array.ndim != 1 or array.dtype != self.dtype or not array.flags.c_contiguous:
            raise ValueError(
                f"{self.name}: a contiguous {self.dtype} array of one axis is needed, not "
                f"{array.dtype}{list(array.shape)}"
            )
        stop = start + array.size
        if not 0 <= start <= stop <= self.size:
            raise ValueError(f"{self.name}: [{start}, {stop}) of its {self.size} elements")
        width, memory = self.dtype.itemsize, memoryview(array.view(np.uint8))
        number = bisect.bisect_right(self.pieces, start, key=lambda piece: piece.start) - 1
        position = start
        while position < stop:
            piece, number = self.pieces[number], number + 1
            last = number == len(self.pieces)
            end = stop if last else min(stop, self.pieces[number].start)
            part = memory[(position - start) * width : (end - start) * width]
            yield piece.file, piece.offset + (position - piece.start) * width, part
            position = end


def remote_bytes(file: Any, offset: int, length: int) -> bytes:
    """Returns bytes of an object in a bucket.

    Raises:
        CheckpointError: It is missing, or ends before.
    """
    try:
        return storage.read_range(file, offset, length)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except M2LError as error:
        raise CheckpointError(str(error)) from error


@contextlib.contextmanager
def opening(file: Path, flags: int, done: str) -> Iterator[int]:
    """A descriptor, for as long as the block runs.

    Args:
        file: The file.
        flags: As `os.open` takes them.
        done: What is done to the file, for the message: "read", "written".

    Raises:
        CheckpointError: Naming the file, for any OSError here or in the block.
    """
    descriptor = None
    try:
        descriptor = os.open(file, flags, 0o666)
        yield descriptor
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be {done} ({error.strerror})") from error
    finally:
        if descriptor is not None:
            os.close(descriptor)


def reserve(file: Path, size: int, start: bytes = b"") -> None:
    """Makes a file of `size` bytes that begins with `start`; one that exists keeps the rest.

    Raises:
        CheckpointError: It cannot be written, or the disk is full.
    """
    with opening(file, os.O_WRONLY | os.O_CREAT, "written") as descriptor:
        os.ftruncate(descriptor, size)
        if start:
            os.pwrite(descriptor, start, 0)
