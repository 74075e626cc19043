"""A run's figures, as JSON lines (the record) and TensorBoard events (a view of it)."""

import contextlib
import hashlib
import importlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from m2l import files, storage
from m2l.errors import ConfigError, DataError, Stopped
from m2l.storage import AnyPath

Log = Callable[[int, Mapping[str, float]], None]
FIGURES = "metrics.jsonl"


def read_figures(directory: AnyPath) -> list[dict[str, float]]:
    """Returns the lines of a run's metrics.jsonl: {"step": steps done, name: figure, ...} each.

    A line that a kill cut short is left out; a damaged one as well, with a warning.
    """
    path, rows = directory / FIGURES, []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            continue
        try:
            row = files.parse_json(line, f"{path}:{number}", kind=dict, advice="it is left out")
        except DataError as error:
            warnings.warn(str(error), stacklevel=2)
            continue
        if type(row.get("step")) is int and all(type(v) in (int, float) for v in row.values()):
            rows.append(row)
            continue
        message = f"{path}:{number}: damaged, not the figures of a step; it is left out"
        warnings.warn(message, stacklevel=2)
    return rows


@contextlib.contextmanager
def wandb_log(project: str, directory: Path, run: Mapping[str, Any]) -> Iterator[Log]:
    """Yields a function that logs to Weights & Biases, in the run of that folder.

    It is made, or gone on with, and finished at the end of the block: as failed, if that fails.

    Raises:
        ConfigError: wandb is not installed.
    """
    try:
        wandb = importlib.import_module("wandb")  # an extra
    except ImportError as error:
        raise ConfigError("--wandb: wandb is not installed: pip install 'm2l[wandb]'") from error
    name = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
    made = wandb.init(
        project=project, id=name, name=directory.name, resume="allow", config=dict(run)
    )
    failed = True
    try:
        yield lambda step, figures: made.log(dict(figures), step=step)
        failed = False
    except Stopped:
        failed = False
        raise
    finally:
        made.finish(exit_code=int(failed))


class MetricsWriter:
    """Appends figures to `DIRECTORY/metrics.jsonl` and `DIRECTORY/tensorboard/`.

    In a bucket they are those of the last `flush` or of the end.

    Args:
        directory: The run's directory.
        after: The step a resumed run goes on from: lines of later steps, written before the run
            was killed, are dropped, for they will be written again.
        also: Given (step, figures by part/name) as well, such as `wandb_log`'s.
    """

    def __init__(self, directory: AnyPath, *, after: int, also: Log | None = None):
        self._also = also
        self._directory = directory
        self._exits = contextlib.ExitStack()
        # Nothing can be appended to an object: files grow here, and are uploaded whole.
        self._local = (
            directory
            if isinstance(directory, Path)
            else Path(self._exits.enter_context(tempfile.TemporaryDirectory(prefix="m2l-")))
        )
        path = self._local / FIGURES
        if (directory / FIGURES).exists():
            rows = [row for row in read_figures(directory) if row["step"] <= after]
            storage.write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a")
        events = self._local / "tensorboard"
        events.mkdir(exist_ok=True)
        # Not SummaryWriter: its thread dies of a full disk, and the run then hangs on its queue.
        self._events = EventsWriter(str(events / "events"))
        self._event(after + 1, session_log=SessionLog(status=SessionLog.START))

    def _event(self, step: int, **content: object) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    def write(self, step: int, figures: Mapping[str, float], part: str = "train") -> None:
        """Records the figures of one step, to be seen at once.

        Args:
            step: The number of steps done.
            figures: The values by name.
            part: "train", or "validation": then names begin with it in the JSON lines as well.
        """
        prefix = "" if part == "train" else f"{part}_"
        line = {f"{prefix}{name}": value for name, value in figures.items()}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        for name, value in figures.items():
            self._event(step, summary=summary.scalar(f"{part}/{name}", value))
        if self._also is not None:
            self._also(step, {f"{part}/{name}": value for name, value in figures.items()})
        self._file.flush()
        self._events.flush()

    def flush(self) -> None:
        """Puts everything written so far on the disk, or into the bucket."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._events.flush()
        self._upload()

    def _upload(self) -> None:
        if self._local != self._directory:
            storage.upload(self._local, self._directory)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        with self._exits:
            try:
                self._file.close()
            finally:
                self._events.close()
            self._upload()
