"""What a merge will take, told before a byte is read: bytes, blocks, memory, time."""

import dataclasses
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2l.errors import MergeError
from m2l.merging.passes import BLOCK, SHORT, cores
from m2l.merging.sources import Source, held

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
        verified: Bytes of inputs whose digests are checked.
        block: Elements of a block.
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
    sources: Sequence[Source],
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
    out: Path,
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
        out: Where the result goes.

    Raises:
        MergeError: No block is small enough for the limit; says which limit works. Or the block
            that is asked for is too long.
    """
    if block is not None and not 1 <= block <= BLOCK:
        raise MergeError(f"a block of {block:,} elements: it may have 1 to {BLOCK:,}")
    # A Gram checkpoint may have no parameters.
    widths = [max((p.dtype.itemsize for p in s.parameters.values()), default=0) for s in sources]
    element = sum(widths) + 4 * len(sources) + 8
    memory = memory or max(DEFAULT_MEMORY, resident() + (DEFAULT_MEMORY >> 1))
    fixed = resident() + _OVERHEAD + states + sum(map(held, sources)) + whole
    largest = max(sizes.values())

    def needs(block: int, threads: int) -> int:
        return fixed + (threads + 1) * min(block, max(largest, SHORT)) * element

    choices = [
        (size, threads)
        for size in ([block] if block else [BLOCK, BLOCK >> 2, _SMALLEST])
        for threads in (cores() + 1, cores(), 1)
    ]
    fitting = [choice for choice in choices if needs(*choice) <= memory]
    if not fitting:
        least = min(needs(*choice) for choice in choices)
        raise MergeError(
            f"--memory {spell(memory)} is too little for this merge: {spell(least)} is the least "
            f"that works ({len(sources)} models at once, and {spell(fixed)} for all else"
            + (f", {spell(whole)} of it for the largest kernel and its Grams)" if whole else ")")
        )
    size, threads = fitting[0]
    size = min(size, max(largest, SHORT))
    share = sum(sizes[name] for name in mine)
    total = sum(sizes.values())
    stored = sum(
        source.parameters[name].size * source.parameters[name].dtype.itemsize
        for source in sources
        for name in mine
        if name in source.parameters
    )
    result = sum(math.prod(shape) * dtype.itemsize for shape, dtype in described.values())
    parent = next((p for p in (out, *out.parents) if p.is_dir()), None)
    status = None if parent is None else os.statvfs(parent)
    return Plan(
        parameters=total,
        mine=share,
        experts=0,
        read=stored * (readings + 1),
        write=result * share // max(1, total),
        readings=readings + 1,
        verified=stored if verify else 0,
        block=size,
        blocks=sum(-(-sizes[name] // size) for name in mine),
        threads=threads,
        memory=needs(size, threads),
        free=None if status is None else status.f_bavail * status.f_frsize,
        size=result,
        whole=whole,
    )


def shares(sizes: Mapping[str, int], processes: int) -> list[list[str]]:
    """Cuts parameters into consecutive parts of about equal size, one for each process."""
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
            stored.read_into(0, count, buffer.view(stored.dtype)[:count])
            read += count * stored.dtype.itemsize
            if read >= _MEASURED:
                break
    return max(1, read) / (time.perf_counter() - start)
