"""Thresholds that were found once, kept between merges."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2l import files
from m2l.merging.sources import Source
from m2l.merging.thresholds import Trimming


class Cache:
    """Thresholds that were found before, by what base and experts are."""

    def __init__(self, base: Source, experts: Sequence[Source], sizes: Mapping[str, int]):
        folder = os.environ.get("M2L_CACHE") or os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "m2l"
        )
        what = json.dumps(list(sizes.items()))
        self._files = []
        for expert in experts:
            text = f"{base.digest} {expert.digest} {what}"
            name = hashlib.sha256(text.encode()).hexdigest()
            self._files.append(Path(folder) / "thresholds" / f"{name}.json")

    def get(self, ranks: Sequence[int], size: int) -> list[list[Trimming]] | None:
        """The thresholds of every expert for every rank; None unless all are known."""
        found = []
        for file in self._files:
            known = _read(file)
            if not all(str(rank) in known for rank in ranks):
                return None
            rows = [known[str(rank)] for rank in ranks]
            found.append([Trimming(np.uint32(b).view(np.float32), kept, size) for b, kept in rows])
        return found

    def put(self, ranks: Sequence[int], found: Sequence[Sequence[Trimming]]) -> None:
        """Keeps thresholds; what cannot be kept is found again."""
        for file, row in zip(self._files, found, strict=True):
            new = {
                str(rank): [int(np.float32(t.threshold).view(np.uint32)), t.kept]
                for rank, t in zip(ranks, row, strict=True)
            }
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                files.write(file, json.dumps(_read(file) | new))
            except OSError:
                return


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
