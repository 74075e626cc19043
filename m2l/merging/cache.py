"""Thresholds that were computed before, cached between merges."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from m2l import files, storage
from m2l.checkpoints.opening import Checkpoint
from m2l.errors import DataError
from m2l.merging.thresholds import LARGEST, Trimming

Row = list[int]  # The bits of a threshold, and how many entries it keeps.


class Cache:
    """Thresholds that were computed before, by what base and experts are.

    An entry is a file for each expert: rank -> [bits of the threshold, entries kept], and a
    checksum of that and of what the entry is of. One that does not match is computed again.
    """

    def __init__(self, base: Checkpoint, experts: Sequence[Checkpoint], sizes: Mapping[str, int]):
        folder = files.cache_directory() / "thresholds"
        described = json.dumps(list(sizes.items()))
        self._files = []
        for expert in experts:
            # 2: entries with a checksum.
            text = f"2 {base.digest} {expert.digest} {described}"
            name = hashlib.sha256(text.encode()).hexdigest()
            self._files.append(folder / f"{name}.json")

    def get(self, ranks: Sequence[int], size: int) -> list[list[Trimming]] | None:
        """The thresholds of every expert for every rank; None unless all are known."""
        # All are read, so that each damaged one is named.
        entries = [_read(file) for file in self._files]
        if not all(str(rank) in entry for entry in entries for rank in ranks):
            return None
        rows = [[entry[str(rank)] for rank in ranks] for entry in entries]
        return [
            [Trimming(np.uint32(bits).view(np.float32), kept, size) for bits, kept in row]
            for row in rows
        ]

    def put(self, ranks: Sequence[int], found: Sequence[Sequence[Trimming]]) -> None:
        """Writes thresholds; what cannot be written is computed again."""
        for file, row in zip(self._files, found, strict=True):
            new = {
                str(rank): [int(np.float32(t.threshold).view(np.uint32)), t.kept]
                for rank, t in zip(ranks, row, strict=True)
            }
            entry = _read(file) | new
            content = {**entry, files.CHECKSUM: _checksum(file, entry)}
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                storage.write_atomic(file, json.dumps(content))
            except OSError:
                return


def _checksum(file: Path, entry: Mapping[str, Row]) -> str:
    return files.checksum([file.stem, entry])


def _read(file: Path) -> dict[str, Row]:
    """An entry; an empty one where there is none, or a damaged one, which is named in a warning."""
    if not file.exists():
        return {}
    advice = "its thresholds are computed again"
    try:
        entry = files.read_json(file, kind=dict, advice=advice)
    except DataError as error:
        warnings.warn(str(error), stacklevel=1)
        return {}
    recorded = entry.pop(files.CHECKSUM, None)
    if recorded == _checksum(file, entry) and all(map(_is_row, entry.values())):
        return entry
    warnings.warn(f"{file}: damaged, it does not match its checksum; {advice}", stacklevel=1)
    return {}


def _is_row(row: object) -> bool:
    return (
        isinstance(row, list)
        and [type(value) for value in row] == [int, int]
        and 0 <= row[0] <= LARGEST + 1
        and row[1] >= 0
    )
