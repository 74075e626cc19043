"""A run's figures, as JSON lines (the record) and TensorBoard events (a view of it)."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from m2l import files


class MetricsWriter:
    """Appends figures to `DIRECTORY/metrics.jsonl` and `DIRECTORY/tensorboard/`.

    Args:
        directory: The run's directory.
        after: The step a resumed run goes on from: lines of later steps, written before the run
            was killed, are dropped, for they will be written again.
    """

    def __init__(self, directory: Path, *, after: int):
        path = directory / "metrics.jsonl"
        if path.exists():
            # A kill can cut the last line short.
            lines = [
                line for line in path.read_text().splitlines(keepends=True) if line[-1] == "\n"
            ]
            files.write(path, "".join(line for line in lines if json.loads(line)["step"] <= after))
        self._file = path.open("a")
        events = directory / "tensorboard"
        events.mkdir(exist_ok=True)
        # Not SummaryWriter: its thread dies of a full disk, and the run then hangs on its queue.
        self._events = EventsWriter(str(events / "events"))
        self._event(after + 1, session_log=SessionLog(status=SessionLog.START))

    def _event(self, step: int, **content: object) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Records the figures of one step."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        for name, value in figures.items():
            self._event(step, summary=summary.scalar(f"train/{name}", value))

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
        try:
            self._file.close()
        finally:
            self._events.close()
