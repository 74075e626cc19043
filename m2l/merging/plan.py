"""What a merge will take, told before a byte is read: bytes, blocks, memory, time."""

import dataclasses
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from m2l.checkpoints import zarr
from m2l.checkpoints.digest import is_digest
from m2l.checkpoints.opening import Checkpoint, recorded_digest
from m2l.checkpoints.spans import Span
from m2l.errors import MergeError
from m2l.merging.passes import BLOCK, LARGE_CHUNK, SHORT, cores
from m2l.merging.sources import memory_of

K = TypeVar("K")

DEFAULT_MEMORY = 1 << 30

# Beside what the process holds now: the compiler, threads, and JAX's own.
_OVERHEAD = 160 << 20
_SMALLEST = 1 << 16
_MEASURED = 256 << 20

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


def parse_bytes(text: str) -> int:
    """The number of bytes that "2GiB", "1.5 GB" or "800M" means.

    Raises:
        MergeError: It means none.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?I?)B?\s*", text.upper())
    try:
        return int(float(match[1]) * (_UNITS | _BINARY)[match[2]])
    except (TypeError, ValueError, KeyError):
        raise MergeError(f"{text!r} is no amount of memory such as 2GiB or 800MB") from None


def spell(count: float) -> str:
    """Bytes as people read them: 1.03 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def resident() -> int:
    """The bytes that this process holds in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a merge will take.

    Attributes:
        parameters: Of the model; `mine` of them this process's.
        mine: See above.
        experts: How many.
        read: Bytes that this process reads, all readings together.
        write: Bytes that it writes.
        readings: How many times the inputs are read.
        verified: Bytes of inputs that are read once more for their SHA-256.
        block: Elements of a block.
        at_once: Elements of a chunk, or of a part of one, that are read at once.
        blocks: How many blocks this process merges.
        threads: How many threads work.
        memory: Bytes that the process will hold in memory at most.
        free: Bytes free where the result goes; None where that is not known.
        size: Bytes of the result.
        whole: Bytes of the memory that the largest of the parameters takes that are merged whole.
    """

    parameters: int
    mine: int
    experts: int
    read: int
    write: int
    readings: int
    verified: int
    block: int
    at_once: int
    blocks: int
    threads: int
    memory: int
    free: int | None
    size: int
    whole: int

    def seconds(self, bandwidth: float) -> float:
        """How long reading and writing take at so many bytes a second."""
        return (self.read + self.write) / bandwidth

    def rows(self) -> list[tuple[str, str]]:
        """What it says, for a table."""
        return [
            ("parameters", f"{self.parameters:,}" + self._share()),
            ("experts", f"{self.experts}"),
            ("read", f"{spell(self.read)}, in {self.readings} reading{'s'[: self.readings > 1]}"),
            ("write", f"{spell(self.write)}" + self._room()),
            ("blocks", f"{self.blocks:,} of {self.block:,}, {self.threads} threads"),
            ("memory", f"{spell(self.memory)} at most" + self._at_once()),
        ]

    def _share(self) -> str:
        return "" if self.mine == self.parameters else f", {self.mine:,} of them here"

    def _at_once(self) -> str:
        return f", {spell(self.whole)} of it for the largest kernel and its Grams" * bool(
            self.whole
        )

    def _room(self) -> str:
        return "" if self.free is None else f" ({spell(self.free)} are free)"

    def __str__(self) -> str:
        return "; ".join(f"{name} {value}" for name, value in self.rows())


def make(
    sources: Sequence[Checkpoint],
    sizes: Mapping[str, int],
    mine: Sequence[str],
    *,
    described: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    readings: int,
    verify: bool,
    states: int,
    memory: int | None,
    block: int | None,
    whole: int,
    to_orbax: bool,
    out: Any,
) -> Plan:
    """Works out blocks and threads that keep to the memory limit.

    Args:
        sources: All that are read.
        sizes: Name -> elements, of all that is merged.
        mine: Those of this process.
        described: name -> (shape, dtype) of the result.
        readings: How many times all is read.
        verify: Whether inputs' digests are checked.
        states: Bytes that counts and tables take.
        memory: The limit; None: 1 GiB, or what a process that holds much already needs.
        block: Elements of a block; None: chosen by the limit.
        whole: The most bytes that a parameter takes which is merged at once; 0: none is.
        to_orbax: Whether the result is written by chunks.
        out: Where the result goes.

    Raises:
        MergeError: No block is small enough for the limit; says which limit works. Or the block
            that is asked for is too long.
    """
    if block is not None and not 1 <= block <= BLOCK:
        raise MergeError(f"a block of {block:,} elements: it may have 1 to {BLOCK:,}")
    # A Gram checkpoint may have no parameters.
    widths = [max((p.dtype.itemsize for p in s.parameters.values()), default=0) for s in sources]
    kernel = 4 * len(sources) + 8
    chunks = _chunks(sources, sizes)
    longest = max((length for length, _, _ in chunks), default=0)
    # As it is stored, decoded, and as it is handed over.
    decoded = 3 * max((length * width for length, width, _ in chunks), default=0)
    memory = memory or max(DEFAULT_MEMORY, resident() + (DEFAULT_MEMORY >> 1))
    fixed = resident() + _OVERHEAD + states + sum(map(memory_of, sources)) + whole
    largest = max(sizes.values())
    result_width = max((dtype.itemsize for _, dtype in described.values()), default=0)

    def needs(block: int, at_once: int, threads: int) -> int:
        length = min(block, max(largest, SHORT))
        read = max(length, at_once if longest else 0)
        # Chunks of the result, and one more where they are not one piece of memory.
        written = max(zarr.CHUNK_BYTES, result_width * at_once) + zarr.CHUNK_BYTES
        a_thread = read * sum(widths) + min(written, 2 * result_width * largest) * to_orbax
        at_a_time = threads if decoded < LARGE_CHUNK else 1
        # One block more: what the threads' results leave for the next.
        blocks = (threads + 1) * length * kernel + length * sum(widths)
        return fixed + threads * a_thread + blocks + at_a_time * decoded

    def cost(choice: tuple[int, int, int]) -> tuple[float, ...]:
        size, at_once, threads = choice
        decoding = sum(-(-length // at_once) * elements for length, _, elements in chunks)
        return -size, decoding / min(threads, cores()), -threads

    choices = [
        (size, max(longest >> halved, size), threads)
        for size in ([block] if block else [BLOCK, BLOCK >> 2, _SMALLEST])
        for halved in range(8 if longest else 1)
        for threads in (cores() + 1, cores(), 1)
    ]
    fitting = sorted((choice for choice in choices if needs(*choice) <= memory), key=cost)
    if not fitting:
        least = min(needs(*choice) for choice in choices)
        raise MergeError(
            f"--memory {spell(memory)} is too little for this merge: {spell(least)} is the least "
            f"that works ({len(sources)} models at once, and {spell(fixed)} for all else"
            + (f", {spell(whole)} of it for the largest kernel and its Grams)" if whole else ")")
        )
    size, at_once, threads = fitting[0]
    size = min(size, max(largest, SHORT))
    share = sum(sizes[name] for name in mine)
    total = sum(sizes.values())
    stored = sum(
        source.parameters[name].size * source.parameters[name].dtype.itemsize
        for source in sources
        for name in mine
        if name in source.parameters
    )
    verified = sum(
        source.parameters[name].size * source.parameters[name].dtype.itemsize
        for source in sources
        for name in mine
        if verify and name in source.parameters
        if (recorded := recorded_digest(source.parameters[name])) and not is_digest(recorded)
    )
    result = sum(math.prod(shape) * dtype.itemsize for shape, dtype in described.values())
    local = (out, *out.parents) if isinstance(out, Path) else ()
    parent = next((p for p in local if p.is_dir()), None)
    status = None if parent is None else os.statvfs(parent)
    return Plan(
        parameters=total,
        mine=share,
        experts=0,
        read=stored * (readings + 1),
        write=result * share // max(1, total),
        readings=readings + 1,
        verified=verified,
        block=size,
        at_once=at_once,
        blocks=sum(-(-sizes[name] // size) for name in mine),
        threads=threads,
        memory=needs(size, at_once, threads),
        free=None if status is None else status.f_bavail * status.f_frsize,
        size=result,
        whole=whole,
    )


def _chunks(sources: Sequence[Checkpoint], sizes: Mapping[str, int]) -> list[tuple[int, int, int]]:
    """Of each parameter in chunks: elements of a chunk, bytes of an element, and its elements."""
    stored = [s.parameters[name] for s in sources for name in sizes if name in s.parameters]
    return [(math.prod(p.chunk), p.dtype.itemsize, p.size) for p in stored if p.chunk is not None]


def shares(sizes: Mapping[K, int], processes: int) -> list[list[K]]:
    """Cuts parameters, or units, into consecutive parts of about equal size, one a process."""
    total, parts, done = sum(sizes.values()), [[] for _ in range(processes)], 0
    for name, size in sizes.items():
        # By where its middle lies.
        place = int((done + size / 2) * processes / max(1, total))
        parts[min(processes - 1, place)].append(name)
        done += size
    return parts


def measure_bandwidth(job: Any) -> float:
    """Bytes a second at which this machine reads the inputs' first megabytes."""
    buffer, read, start = np.empty(1 << 22, np.uint8), 0, time.perf_counter()
    for source in job.used:
        for stored in source.parameters.values():
            count = min(stored.size, buffer.nbytes // stored.dtype.itemsize)
            span = Span(stored.name, 0, count)
            stored.read_span(span, buffer[: count * stored.dtype.itemsize].view(stored.dtype))
            read += count * stored.dtype.itemsize
            if read >= _MEASURED:
                break
    return max(1, read) / (time.perf_counter() - start)
