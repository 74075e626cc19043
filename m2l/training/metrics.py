"""A run's figures, as JSON lines (the record) and TensorBoard events (a view of it)."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tensorboardX import SummaryWriter


class MetricsWriter:
    """Appends figures to `DIRECTORY/metrics.jsonl` and `DIRECTORY/tensorboard/`.

    Args:
        directory: The run's directory.
        after: The step a resumed run goes on from: lines of later steps, written before the run
            was killed, are dropped, for they will be written again.
    """

    def __init__(self, directory: Path, *, after: int):
        path = directory / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines(keepends=True):
                # A kill can cut the last line short.
                if line.endswith("\n") and json.loads(line)["step"] <= after:
                    kept.append(line)
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text("".join(kept))
            unfinished.rename(path)
        self._file = path.open("a")
        self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=after + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Records the figures of one step."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        for name, value in figures.items():
            self._events.add_scalar(f"train/{name}", value, step)

    def flush(self) -> None:
        """Puts everything written so far on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._events.flush()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._file.close()
        self._events.close()
