"""Digests of what a merge reads and writes, part by part, and what they should be."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m2l.checkpoints import digest
from m2l.checkpoints.opening import Checkpoint, LazyTensor, recorded_digest
from m2l.checkpoints.spans import Span, TensorReader, cut
from m2l.distributed import Processes
from m2l.errors import CheckpointError

_READ = 1 << 20
_ADVICE = "its bytes do not have the digest that is recorded; copy it again or make it anew"

Key = tuple[int, str]
"""A source's place in a list, and a parameter's name."""


class InputDigests:
    """Digests of the parameters that are read, added up over the parts that this process reads.

    Args:
        read: The parameters that are read: of each source the names.
        verify: Whether any is to be checked.
    """

    def __init__(self, read: Sequence[tuple[Checkpoint, Sequence[str]]], verify: bool):
        self._sources = [source for source, _ in read]
        self._recorded = {
            (index, name): recorded
            for index, (source, names) in enumerate(read)
            for name in names
            if verify and (recorded := recorded_digest(source.parameters[name])) is not None
            if not isinstance(source.parameters[name], LazyTensor)
        }
        self._words: dict[Key, np.ndarray] = {}
        self._elements: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._recorded)

    def sums(self, source: Checkpoint, name: str) -> bool:
        """Whether a parameter's parts are to be digested as they are read."""
        recorded = self._recorded.get((self._index(source), name))
        return recorded is not None and digest.is_digest(recorded)

    def sha256(self, name: str) -> list[TensorReader]:
        """Returns the parameters of a name that are checked by reading them once more."""
        return [
            self._sources[index].parameters[name]
            for (index, other), recorded in self._recorded.items()
            if other == name and not digest.is_digest(recorded)
        ]

    def add(self, source: Checkpoint, name: str, words: np.ndarray, elements: int) -> None:
        """Adds the digest of a part of so many elements."""
        key = self._index(source), name
        self._words[key] = digest.add(self._words.get(key, np.zeros(4, np.uint32)), words)
        self._elements[key] = self._elements.get(key, 0) + elements

    def check(self, processes: Processes) -> list[tuple[Checkpoint, str]]:
        """Compares the digests of all that the processes have read together.

        Returns:
            What was not read completely, as after a merge that was killed, and is to be read now:
            this process's share.

        Raises:
            CheckpointError: Naming a parameter that is damaged, and where it is.
        """
        keys = [key for key, recorded in self._recorded.items() if digest.is_digest(recorded)]
        nothing = np.zeros(4, np.uint32)
        own = {
            "words": np.array([self._words.get(k, nothing) for k in keys], np.uint32),
            "elements": np.array([self._elements.get(k, 0) for k in keys], np.int64),
        }
        parts = processes.gather("inputs", own)
        words = np.sum([part["words"] for part in parts], axis=0, dtype=np.uint32)
        elements = np.sum([part["elements"] for part in parts], axis=0)
        unread = []
        for key, total, size in zip(keys, words, elements, strict=True):
            source, name = self._sources[key[0]], key[1]
            if size != source.parameters[name].size:
                unread.append((source, name))
            elif digest.to_hex(total) != self._recorded[key]:
                raise damaged(source, name)
        return unread[processes.index :: processes.count]

    def _index(self, source: Checkpoint) -> int:
        return next((i for i, each in enumerate(self._sources) if each is source), -1)


def damaged(source: Checkpoint, name: str) -> CheckpointError:
    """The error that names a parameter whose digest is not the recorded one."""
    return CheckpointError(f"{source.path}: {name} is damaged: {_ADVICE}")


def read_and_check(source: Checkpoint, name: str, at_once: int) -> None:
    """Reads a parameter whose digest of 128 bits is recorded, and compares it.

    Raises:
        CheckpointError: It is damaged.
    """
    stored, total = source.parameters[name], np.zeros(4, np.uint32)
    for span in cut(name, tuple(stored.shape), stored.chunk, at_once if stored.chunk else _READ):
        elements = np.empty(span.size, stored.dtype)
        stored.read_span(span, elements)
        total = digest.add(total, digest.of_span(elements, span))
    if digest.to_hex(total) != recorded_digest(stored):
        raise damaged(source, name)


def check_sha256(stored: Any) -> None:
    """Reads a parameter whose SHA-256 is recorded, and compares it.

    Raises:
        CheckpointError: It is damaged.
    """
    sha256 = hashlib.sha256()
    buffer = np.empty(min(_READ, max(1, stored.size)), stored.dtype)
    for start in range(0, stored.size, _READ):
        part = buffer[: min(_READ, stored.size - start)]
        stored.read_span(Span(stored.name, start, part.size), part)
        sha256.update(part.view(np.uint8))
    stored.check(sha256.hexdigest())


def gathered(
    words: Mapping[str, np.ndarray], names: Sequence[str], processes: Processes
) -> dict[str, str]:
    """Returns the digests, in hex, of arrays of which every process has digested some parts."""
    nothing = np.zeros(4, np.uint32)
    own = np.array([words.get(name, nothing) for name in names], np.uint32).reshape(-1, 4)
    parts = processes.gather("digests", {"words": own})
    total = np.sum([part["words"] for part in parts], axis=0, dtype=np.uint32)
    return {name: digest.to_hex(row) for name, row in zip(names, total, strict=True)}
