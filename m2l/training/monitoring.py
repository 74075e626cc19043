"""A run's figures: as JSON lines, as TensorBoard events and as a curve; and its speed."""

import contextlib
import hashlib
import importlib
import io
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
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
def wandb_log(project: str, directory: Path, run: Mapping[str, object]) -> Iterator[Log]:
    """Yields a function that logs to Weights & Biases, in the run of that folder.

    It is created or resumed, and finished at the end of the block: as failed, if that fails.

    Raises:
        ConfigError: wandb is not installed.
    """
    try:
        wandb = importlib.import_module("wandb")  # an extra
    except ImportError as error:
        raise ConfigError("--wandb: wandb is not installed: pip install 'm2l[wandb]'") from error
    name = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
    session = wandb.init(
        project=project, id=name, name=directory.name, resume="allow", config=dict(run)
    )
    failed = True
    try:
        yield lambda step, figures: session.log(dict(figures), step=step)
        failed = False
    except Stopped:
        failed = False
        raise
    finally:
        session.finish(exit_code=int(failed))


class MetricsWriter:
    """Appends figures to `DIRECTORY/metrics.jsonl` and `DIRECTORY/tensorboard/`.

    In a bucket they are those of the last `flush` or of the end.

    Args:
        directory: The run's directory.
        first_step: The step that a run resumes from: lines of later steps, written before it was
            killed, are dropped, for they will be written again.
        log: Is called with (step, figures by part/name) as well, such as `wandb_log`'s.
    """

    def __init__(self, directory: AnyPath, *, first_step: int, log: Log | None = None):
        self._log = log
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
            rows = [row for row in read_figures(directory) if row["step"] <= first_step]
            storage.write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a")
        events = self._local / "tensorboard"
        events.mkdir(exist_ok=True)
        # Not SummaryWriter: its thread dies of a full disk, and the run then hangs on its queue.
        self._events = EventsWriter(str(events / "events"))
        self._event(first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def _event(self, step: int, **content: object) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    def write(self, step: int, figures: Mapping[str, float], part: str = "train") -> None:
        """Writes and flushes the figures of one step.

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
        if self._log is not None:
            self._log(step, {f"{part}/{name}": value for name, value in figures.items()})
        self._file.flush()
        self._events.flush()

    def flush(self) -> None:
        """Writes everything written so far to the disk, or to the bucket."""
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
        traceback: TracebackType | None,
    ) -> None:
        with self._exits:
            try:
                self._file.close()
            finally:
                self._events.close()
            self._upload()


def draw_curve(out: AnyPath, title: str) -> None:
    """Draws loss.svg from metrics.jsonl; nothing if there is no loss yet."""
    names = {
        "loss": "training",
        "validation_loss": "validation",
        "validation_loss_of_average": "average",
    }
    rows = read_figures(out)
    curves = {
        label: [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
        for name, label in names.items()
    }
    if not any(curves.values()):
        return
    # Only here: importing matplotlib takes a second.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "m2l", "svg.fonttype": "none"}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot(title=title.replace("$", r"\$"), xlabel="step")
        colours = ("#3366cc", "#cc5500", "#339966")
        for (label, curve), colour in zip(curves.items(), colours, strict=True):
            if curve:
                axes.plot(*zip(*curve, strict=True), label=label, color=colour, gid=label)
        axes.grid(axis="y", color="#dddddd")
        axes.legend(frameon=False)
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
    storage.write_atomic(out / "loss.svg", picture.getvalue())


class ThroughputMeter:
    """Counts tokens, steps and seconds; only the time between `run` and `pause` counts.

    Args:
        flops: Operations of a step.
        peak: Operations a second that the devices could do; None: unknown, no MFU.
        shares: In how many shares a batch is fed: this process sees one.
    """

    def __init__(self, flops: float, peak: float | None, shares: int = 1):
        self._flops, self._peak, self._shares = flops, peak, shares
        self._since: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._tokens = self._targets = self._steps = 0
        self._seconds = self._waited = 0.0

    def run(self) -> None:
        """Starts the clock, if it does not run."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        """Stops the clock, outside training steps."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def count(self, batch: Mapping[str, np.ndarray], waited: float) -> None:
        """Counts a step on this batch, for which `waited` seconds were waited."""
        if self._since is None:
            return
        targets = int(np.count_nonzero(batch["decoder_loss_weights"]))
        if "encoder_input_tokens" in batch:
            tokens = int(np.count_nonzero(batch["encoder_input_tokens"])) + targets
        else:
            tokens = int(np.count_nonzero(batch["decoder_segment_ids"]))
        self._targets += targets * self._shares
        self._tokens += tokens * self._shares
        self._steps += 1
        self._waited += waited

    def read(self) -> dict[str, float]:
        """Returns the figures since the last reading, none before a step was counted.

        tokens_per_second and target_tokens_per_second (no padding), mfu (the share of the peak),
        input_wait (the share of the time in which the next batch was waited for).
        """
        running = self._since is not None
        self.pause()
        figures = {}
        if self._steps:
            figures = {
                "tokens_per_second": self._tokens / self._seconds,
                "target_tokens_per_second": self._targets / self._seconds,
                "input_wait": self._waited / self._seconds,
            }
            if self._peak:
                figures["mfu"] = self._flops * self._steps / self._seconds / self._peak
        self._reset()
        if running:
            self.run()
        return figures
